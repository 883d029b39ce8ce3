#include "cuda/unit.cuh"

namespace prodigy::cuda {
using Float32 = Stored<float, float>;
template KernelFunction update_function<Float32>(int);
template KernelFunction finish_function<Float32>(int);
}  // namespace prodigy::cuda
