#include <stdexcept>
#include <string>

#include "cuda/kernels.cuh"
#include "cuda/launch.h"

namespace prodigy::cuda {
namespace {

struct Entry {
  const char* name;
  const void* function;
};

Entry entry(Kernel kernel, int bits) {
  const auto of = [](void (*function)(Arguments)) { return reinterpret_cast<const void*>(function); };
  if (kernel == Kernel::kUpdate) {
    if (bits == 32) return {"update_kernel<float>", of(update_kernel<float>)};
    return {"update_kernel<double>", of(update_kernel<double>)};
  }
  if (bits == 32) return {"finish_kernel<float>", of(finish_kernel<float>)};
  return {"finish_kernel<double>", of(finish_kernel<double>)};
}

void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // or the next caller, torch, would report it as its own
  throw std::runtime_error(std::string("prodigy_fused: ") + what + " failed: " + cudaGetErrorString(error));
}

}  // namespace

std::string problem() {
  cudaFuncAttributes attributes;
  const cudaError_t error = cudaFuncGetAttributes(&attributes, entry(Kernel::kUpdate, 32).function);
  if (error == cudaSuccess) return "";
  cudaGetLastError();
  return cudaGetErrorString(error);
}

int resident_blocks(Kernel kernel, int bits) {
  const Entry e = entry(kernel, bits);
  int device = 0, multiprocessors = 0, per_multiprocessor = 0;
  check(cudaGetDevice(&device), e.name);
  check(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device), e.name);
  check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&per_multiprocessor, e.function, kBlockSize, 0), e.name);
  return multiprocessors * per_multiprocessor;
}

void launch(Kernel kernel, int bits, int blocks, const Arguments& arguments, void* stream) {
  const Entry e = entry(kernel, bits);
  void* parameters[] = {const_cast<Arguments*>(&arguments)};
  check(cudaLaunchKernel(e.function, dim3(blocks), dim3(kBlockSize), parameters, 0, static_cast<cudaStream_t>(stream)),
        e.name);
}

}  // namespace prodigy::cuda
