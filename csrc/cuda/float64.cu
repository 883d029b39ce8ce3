#include "cuda/unit.cuh"

namespace prodigy::cuda {
using Float64 = Stored<double, double>;
template KernelFunction update_function<Float64>(int);
template KernelFunction finish_function<Float64>(int);
}  // namespace prodigy::cuda
