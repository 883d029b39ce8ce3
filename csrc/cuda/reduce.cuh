// Sums over the threads of a block, and over all chunks: always in the same order, without float atomics.
#pragma once

#include "cuda/arguments.h"

namespace prodigy::cuda {

constexpr int kWarpSize = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

__device__ __forceinline__ Sums<double> warp_sum(Sums<double> mine) {
#pragma unroll
  for (int offset = kWarpSize / 2; offset > 0; offset /= 2) {
    mine.dot += __shfl_down_sync(kAllLanes, mine.dot, offset);
    mine.norm += __shfl_down_sync(kAllLanes, mine.norm, offset);
  }
  return mine;
}

// Returns the largest number of the warp to all lanes.
__device__ __forceinline__ std::uint32_t warp_max(std::uint32_t mine) { return __reduce_max_sync(kAllLanes, mine); }

// Returns the sum over the block to thread 0. `scratch` must not be in use.
template <int kThreads>
__device__ __forceinline__ Sums<double> block_sum(Sums<double> mine, Sums<double>* scratch) {
  mine = warp_sum(mine);
  if (threadIdx.x % kWarpSize == 0) scratch[threadIdx.x / kWarpSize] = mine;
  __syncthreads();
  if (threadIdx.x != 0) return mine;
  for (int warp = 1; warp < kThreads / kWarpSize; ++warp) {
    mine.dot += scratch[warp].dot;
    mine.norm += scratch[warp].norm;
  }
  return mine;
}

__device__ __forceinline__ void merge(Accumulator& into, double sum, double error) {
  into.add(sum);
  into.error += error;
}

// Returns the total of one Accumulator per thread to thread 0. `scratch` must not be in use.
template <int kThreads>
__device__ __forceinline__ double block_total(Accumulator mine, Sums<double>* scratch) {
#pragma unroll
  for (int offset = kWarpSize / 2; offset > 0; offset /= 2) {
    const double sum = __shfl_down_sync(kAllLanes, mine.sum, offset);
    merge(mine, sum, __shfl_down_sync(kAllLanes, mine.error, offset));
  }
  if (threadIdx.x % kWarpSize == 0) scratch[threadIdx.x / kWarpSize] = {mine.sum, mine.error};
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int warp = 1; warp < kThreads / kWarpSize; ++warp) merge(mine, scratch[warp].dot, scratch[warp].norm);
  }
  return mine.total();
}

// Whether this block is the last of the launch to call this. It then sees all that the others wrote before their calls.
__device__ __forceinline__ bool is_last_block(unsigned* arrived) {
  __shared__ bool last;
  if (threadIdx.x == 0) {
    __threadfence();
    last = atomicAdd(arrived, 1u) == gridDim.x - 1;
    if (last) *arrived = 0;
    __threadfence();
  }
  __syncthreads();
  return last;
}

// The sums over each estimate's chunks, by one block. Which thread adds which of them depends on their positions within
// the range, so that the ranges before it do not affect the result.
template <int kThreads>
__device__ __forceinline__ void reduce_partials(const Arguments& a) {
  __shared__ Sums<double> scratch[2][kThreads / kWarpSize];
  for (std::int64_t e = 0; e < a.estimate_count; ++e) {
    const std::int64_t end = a.ranges[e + 1];
    Accumulator dot, norm;
#pragma unroll 4
    for (std::int64_t n = a.ranges[e] + threadIdx.x; n < end; n += kThreads) {
      // Bypasses L1, which is not coherent across multiprocessors.
      dot.add(__ldcg(&a.partials[n].dot));
      norm.add(__ldcg(&a.partials[n].norm));
    }
    // The barrier in each of the two totals keeps the next round from writing to the other's scratch too early.
    const Sums<double> sums{block_total<kThreads>(dot, scratch[0]), block_total<kThreads>(norm, scratch[1])};
    if (threadIdx.x == 0) a.sums[e] = sums;
  }
}

}  // namespace prodigy::cuda
