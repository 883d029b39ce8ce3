#include "cuda/unit.cuh"

namespace prodigy::cuda {
template KernelFunction update_function<Displaced<BFloat16>>(int);
template KernelFunction update_function<Displaced<Float16>>(int);
}  // namespace prodigy::cuda
