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

template <class T, bool kMixed>
Entry entry_of(Kernel kernel, const char* update, const char* finish) {
  if (kernel == Kernel::kUpdate) return {update, reinterpret_cast<const void*>(update_kernel<T, kMixed>)};
  return {finish, reinterpret_cast<const void*>(finish_kernel<T, kMixed>)};
}

Entry entry(Kernel kernel, Storage storage) {
  if (storage == Storage::kFloat32) {
    return entry_of<float, false>(kernel, "update_kernel<float>", "finish_kernel<float>");
  }
  if (storage == Storage::kFloat64) {
    return entry_of<double, false>(kernel, "update_kernel<double>", "finish_kernel<double>");
  }
  return entry_of<float, true>(kernel, "update_kernel<mixed>", "finish_kernel<mixed>");
}

void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // clear the sticky error, or torch would report it at its next call
  throw std::runtime_error(std::string("prodigy_fused: ") + what + " failed: " + cudaGetErrorString(error));
}

}  // namespace

std::string problem() {
  cudaFuncAttributes attributes;
  const cudaError_t error = cudaFuncGetAttributes(&attributes, entry(Kernel::kUpdate, Storage::kFloat32).function);
  if (error == cudaSuccess) return "";
  cudaGetLastError();
  return cudaGetErrorString(error);
}

int resident_blocks(Kernel kernel, Storage storage) {
  const Entry e = entry(kernel, storage);
  int device = 0, multiprocessors = 0, per_multiprocessor = 0;
  check(cudaGetDevice(&device), e.name);
  check(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device), e.name);
  check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&per_multiprocessor, e.function, kBlockSize, 0), e.name);
  return multiprocessors * per_multiprocessor;
}

void launch(Kernel kernel, Storage storage, int blocks, const Arguments& arguments, void* stream) {
  const Entry e = entry(kernel, storage);
  void* parameters[] = {const_cast<Arguments*>(&arguments)};
  check(cudaLaunchKernel(e.function, dim3(blocks), dim3(kBlockSize), parameters, 0, static_cast<cudaStream_t>(stream)),
        e.name);
}

}  // namespace prodigy::cuda
