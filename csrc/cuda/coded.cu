// State in codes of 8 bits.
#include "cuda/unit.cuh"

namespace prodigy::cuda {
template KernelFunction update_function<Coded<float>>(int);
template KernelFunction update_function<Coded<BFloat16>>(int);
template KernelFunction update_function<ExtendedCoded>(int);
}  // namespace prodigy::cuda
