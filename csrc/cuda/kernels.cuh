// The two kernels of a step.
//
// update_kernel has a block for each chunk: no block then waits for another, and a block has one group, one tensor and
// one partial sum. finish_kernel, which in most steps has nothing to do, has as many blocks as the device holds at a
// time.
//
// Note [The grid does not affect the result]
// A chunk's sums go to its own place in `partials`, whichever block walked it, and one block adds them up in an order
// that depends only on the chunks. So the result depends neither on the size of the device nor on the order in which
// blocks ran.
#pragma once

#include "cuda/coded_walk.cuh"
#include "cuda/reduce.cuh"
#include "cuda/walk.cuh"

namespace prodigy::cuda {

__device__ __forceinline__ Progress progress_of(const Arguments& a, std::int64_t estimate) {
  return Progress(a.row[estimate], a.sums[estimate], a.groups[estimate].options);
}

template <class T>
__device__ __forceinline__ GroupRow<T> make_update_row(const Arguments& a, std::int64_t n) {
  const Group& group = a.groups[n];
  const EstimateOptions& options = a.groups[group.estimate].options;
  return update_row<T>(group.read(), options, a.row[group.estimate], a.step.grad_scale.read());
}

template <class T>
__device__ __forceinline__ GroupRow<T> make_finish_row(const Arguments& a, std::int64_t n, const Progress& progress) {
  const Group& group = a.groups[n];
  const EstimateOptions& options = a.groups[group.estimate].options;
  return finish_row<T>(group.read(), options, progress, a.step.grad_scale.read());
}

// Phase 1 of a chunk.
template <class Policy>
__device__ __forceinline__ Sums<double> update_chunk(const Tensor& t, const Gradient& grad, const Chunk& chunk,
                                                     const Coefficients<typename Policy::T>& c) {
  if constexpr (Policy::Storage::kCoded) {
    return update_codes<Policy>(t, grad, chunk, c);
  } else {
    return update_packs<Policy>(t, grad, chunk, c);
  }
}

// Phase 2 of a chunk.
template <class Policy>
__device__ __forceinline__ void finish_chunk(const Tensor& t, const Gradient& grad, const Chunk& chunk,
                                             const GroupRow<typename Policy::T>& group) {
  if constexpr (Policy::Storage::kCoded) {
    finish_codes<Policy>(t, grad, chunk, group);
  } else {
    finish_packs<Policy>(t, grad, chunk, group);
  }
}

// m, v, s, x with the old d in d*eps; for each estimate, sums = (sum lr*bc*<g, x0 - x>, sum |s|). There is a block even
// if there are no chunks, to write the sums.
template <class Policy>
__global__ void __launch_bounds__(Policy::kThreads, Policy::kMinBlocks) update_kernel(const Arguments a) {
  __shared__ GroupRow<typename Policy::T> row;
  __shared__ Sums<double> scratch[Policy::kThreads / kWarpSize];
  if (a.step.found_inf.read() != 0.0) return;
  const std::int64_t n = a.first_chunk + blockIdx.x;
  if (n < a.chunk_count) {
    const Chunk chunk = a.chunks[n];
    const Tensor& tensor = a.tensors[chunk.tensor];
    const Gradient grad = a.only.data != nullptr ? a.only : a.grads[chunk.tensor];
    Sums<double> sums{0.0, 0.0};
    if (threadIdx.x == 0) row = make_update_row<typename Policy::T>(a, tensor.group);
    __syncthreads();
    if (grad.data != nullptr && row.active) {
      const Coefficients<typename Policy::T> c = row.c;
      sums = block_sum<Policy::kThreads>(update_chunk<Policy>(tensor, grad, chunk, c), scratch);
      sums.dot *= row.c.dot_weight;
    }
    if (threadIdx.x == 0) a.partials[n] = sums;
  }
  if (a.adds_up && is_last_block(a.arrived)) reduce_partials<Policy::kThreads>(a);
}

// Rows of shared memory for the factors of groups; those of group n are in row n % kGroupRows.
constexpr int kGroupRows = 32;

template <class T>
struct SharedRow {
  GroupRow<T> row;
  std::int64_t group;
};

// Derived by one thread when a chunk of the group comes up, and kept.
template <class T>
__device__ __forceinline__ const GroupRow<T>& group_row(SharedRow<T>* rows, std::int64_t group, const Arguments& a) {
  __shared__ Progress progress;  // with it in registers, finish_kernel<float> has 88 instead of 80 of them on sm_100
  SharedRow<T>& shared = rows[group % kGroupRows];
  if (shared.group != group) {  // the same for all threads
    if (threadIdx.x == 0) progress = progress_of(a, a.groups[group].estimate);
    __syncthreads();
    if (threadIdx.x == 0) {
      shared.row = make_finish_row<T>(a, group, progress);
      shared.group = group;
    }
    __syncthreads();
  }
  return shared.row;
}

// Whether `finish` changes the x of some group: in most steps it does not.
template <class T, int kThreads>
__device__ __forceinline__ bool anything_to_finish(const Arguments& a) {
  bool any = false;
  for (std::int64_t n = threadIdx.x; n < a.group_count; n += kThreads)
    any |= make_finish_row<T>(a, n, progress_of(a, a.groups[n].estimate)).active;
  return __syncthreads_or(any);
}

// For each estimate, d_new from the sums, and the change that it makes to x.
template <class Policy>
__global__ void __launch_bounds__(Policy::kThreads, Policy::kMinBlocks) finish_kernel(const Arguments a) {
  using T = typename Policy::T;
  constexpr int kThreads = Policy::kThreads;
  __shared__ SharedRow<T> rows[kGroupRows];
  const bool skipped = a.step.found_inf.read() != 0.0;
  for (int n = threadIdx.x; n < kGroupRows; n += kThreads) rows[n].group = -1;  // read after the next barrier
  if (!skipped && anything_to_finish<T, kThreads>(a)) {
    for (std::int64_t n = blockIdx.x; n < a.chunk_count; n += gridDim.x) {
      const Chunk chunk = a.chunks[n];
      const Tensor& tensor = a.tensors[chunk.tensor];
      const Gradient grad = a.grads[chunk.tensor];
      const GroupRow<T>& row = group_row<T>(rows, tensor.group, a);
      if (grad.data != nullptr && row.active) finish_chunk<Policy>(tensor, grad, chunk, row);
    }
  }
  // Every block derives the new estimates from the old ones, which the last block to finish may overwrite.
  if (!a.last || !is_last_block(a.arrived)) return;
  for (std::int64_t e = threadIdx.x; e < a.estimate_count; e += kThreads) {
    a.new_row[e] = skipped ? a.row[e] : progress_of(a, e).now;
  }
}

}  // namespace prodigy::cuda
