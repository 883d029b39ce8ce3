#include "cuda/unit.cuh"

namespace prodigy::cuda {
template KernelFunction update_function<Stored<BFloat16, BFloat16>>(int);
template KernelFunction finish_function<Stored<BFloat16, BFloat16>>(int);
template KernelFunction update_function<Stored<float, BFloat16>>(int);
}  // namespace prodigy::cuda
