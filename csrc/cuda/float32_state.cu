// 16-bit parameters with float32 state.
#include "cuda/unit.cuh"

namespace prodigy::cuda {
template KernelFunction update_function<Stored<BFloat16, float>>(int);
template KernelFunction finish_function<Stored<BFloat16, float>>(int);
template KernelFunction update_function<Stored<Float16, float>>(int);
}  // namespace prodigy::cuda
