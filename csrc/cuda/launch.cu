#include <stdexcept>
#include <string>

#include "cuda/entry.h"

namespace prodigy::cuda {
namespace {

const char* name(Variant variant) { return variant.kernel == Kernel::kUpdate ? "update_kernel" : "finish_kernel"; }

const void* address(KernelFunction function) { return reinterpret_cast<const void*>(function); }

void check(cudaError_t error, Variant variant) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // clear the sticky error, or torch would report it at its next call
  throw std::runtime_error(std::string("prodigy_fused: ") + name(variant) + " failed: " + cudaGetErrorString(error));
}

}  // namespace

std::string problem() {
  cudaFuncAttributes attributes;
  const cudaError_t error = cudaFuncGetAttributes(&attributes, address(entry({Kernel::kUpdate, 0}).function));
  if (error == cudaSuccess) return "";
  cudaGetLastError();
  return cudaGetErrorString(error);
}

int resident_blocks(Variant variant) {
  const auto [function, threads] = entry(variant);
  int device = 0, multiprocessors = 0, each = 0;
  check(cudaGetDevice(&device), variant);
  check(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device), variant);
  check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&each, address(function), threads, 0), variant);
  return multiprocessors * each;
}

void launch(Variant variant, std::int64_t blocks, const Arguments& arguments, void* stream) {
  const auto [function, threads] = entry(variant);
  void* parameters[] = {const_cast<Arguments*>(&arguments)};
  check(cudaLaunchKernel(address(function), dim3(unsigned(blocks)), dim3(threads), parameters, 0,
                         static_cast<cudaStream_t>(stream)),
        variant);
}

}  // namespace prodigy::cuda
