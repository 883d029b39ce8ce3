#include "cuda/unit.cuh"

namespace prodigy::cuda {
template KernelFunction update_function<AnyCoded>(int);
template KernelFunction finish_function<AnyCoded>(int);
}  // namespace prodigy::cuda
