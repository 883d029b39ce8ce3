#include "cuda/unit.cuh"

namespace prodigy::cuda {
template KernelFunction update_function<Extended<float>>(int);
template KernelFunction update_function<Extended<BFloat16>>(int);
}  // namespace prodigy::cuda
