#include "cuda/unit.cuh"

namespace prodigy::cuda {
template KernelFunction update_function<AnyStorage>(int);
template KernelFunction finish_function<AnyStorage>(int);
}  // namespace prodigy::cuda
