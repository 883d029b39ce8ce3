// The two kernels of a step. Both are persistent: a grid of as many blocks as the device holds walks the chunk list.
//
// Note [The grid does not affect the result]
// A chunk's sums go to its own place in `partials`, whichever block walked it, and one block adds them up in an order
// that depends only on the chunks. So the result depends neither on the size of the device nor on the order in which
// blocks ran.
#pragma once

#include "cuda/reduce.cuh"
#include "cuda/walk.cuh"

namespace prodigy::cuda {

// Blocks for which a multiprocessor must have registers. On sm_90, update_kernel has 108 to 112 of them, enough for 2
// blocks of 256 threads; a bound of 3 leaves it 80 and spills 54 to 126 bytes.
constexpr int kMinBlocks = 2;

// The factors for the elements of one group, derived once per block.
template <class T>
struct GroupRow {
  Coefficients<T> c;
  T old_d_eps;
  std::int64_t group;
  bool active;  // lr > 0
};

// Rows of shared memory; group n is in row n % kGroupRows.
constexpr int kGroupRows = 32;

template <class T>
__device__ __forceinline__ void make_group_row(GroupRow<T>& row, const Arguments& a, std::int64_t group,
                                               const Estimate& old, double d_new) {
  const Hyper hyper = a.groups[group].read();
  row.c = coefficients<T>(hyper, a.step.options, old, d_new, a.step.grad_scale.read());
  row.old_d_eps = T(old.d * hyper.eps);
  row.group = group;
  row.active = hyper.lr > 0.0;
}

// There must be a barrier between this and the first use of the rows.
template <class T>
__device__ __forceinline__ void clear_group_rows(GroupRow<T>* rows) {
  for (int n = threadIdx.x; n < kGroupRows; n += kBlockSize) rows[n].group = -1;
}

// Derived by one thread when a chunk of the group comes up, and kept.
template <bool kUpdate, class T>
__device__ __forceinline__ const GroupRow<T>& group_row(GroupRow<T>* rows, std::int64_t group, const Arguments& a,
                                                        const Estimate& old, double d_new) {
  GroupRow<T>& row = rows[group % kGroupRows];
  if (row.group != group) {  // the same for all threads
    __syncthreads();
    if (threadIdx.x == 0) {
      make_group_row(row, a, group, old, d_new);
      if (kUpdate) row.c = without_step(row.c);
    }
    __syncthreads();
  }
  return row;
}

// m, v, s, x with the old d in d*eps; sums = (sum lr*bc*<g, x0 - x>, sum |s|).
template <class T, bool kMixed>
__global__ void __launch_bounds__(kBlockSize, kMinBlocks) update_kernel(const Arguments a) {
  __shared__ GroupRow<T> rows[kGroupRows];
  __shared__ Sums<double> scratch[2][kWarps];
  __shared__ Estimate old;
  if (a.step.found_inf.read() != 0.0) return;
  if (threadIdx.x == 0) old = *a.row;
  clear_group_rows(rows);
  __syncthreads();
  bool odd = false;
  for (std::int64_t n = blockIdx.x; n < a.chunk_count; n += gridDim.x) {
    const Chunk chunk = a.chunks[n];
    const Tensor& tensor = a.tensors[chunk.tensor];
    const Gradient grad = a.grads[chunk.tensor];
    Sums<double> sums{0.0, 0.0};
    const GroupRow<T>& row = group_row<true>(rows, tensor.group, a, old, old.d);
    if (grad.data != nullptr && row.active) {
      sums = block_sum(update_chunk<T, kMixed>(tensor, grad, chunk, row.c), scratch[odd]);
      sums.dot *= row.c.dot_weight;
      odd = !odd;
    }
    if (threadIdx.x == 0) a.partials[n] = sums;
  }
  if (is_last_block(a.arrived)) reduce_partials(a);
}

// Whether `finish` changes the x of some group: in most steps it does not.
template <class T>
__device__ __forceinline__ bool anything_to_finish(const Arguments& a, const Estimate& old, bool stepped, bool moved) {
  bool any = false;
  for (std::int64_t n = threadIdx.x; n < a.group_count; n += kBlockSize) {
    const Hyper hyper = a.groups[n].read();
    const T decay = decay_of<T>(hyper, old.d * hyper.lr * bias_correction(hyper, old.k));
    any |= finish_of(deferred(hyper, a.step.options, old, decay), stepped, moved) != Finish::kNothing;
  }
  return __syncthreads_or(any);
}

// d_new from the sums, and the change that it makes to x.
template <class T, bool kMixed>
__global__ void __launch_bounds__(kBlockSize, kMinBlocks) finish_kernel(const Arguments a) {
  __shared__ GroupRow<T> rows[kGroupRows];
  __shared__ Estimate old, now;
  __shared__ bool stepped;
  if (a.step.found_inf.read() != 0.0) return;
  // Every block derives the same estimate. The last block to finish overwrites the old one.
  if (threadIdx.x == 0) {
    now = old = *a.row;
    stepped = advance(now, *a.sums, a.step.options);
  }
  clear_group_rows(rows);
  __syncthreads();
  const bool moved = now.d != old.d;
  if (anything_to_finish<T>(a, old, stepped, moved)) {
    for (std::int64_t n = blockIdx.x; n < a.chunk_count; n += gridDim.x) {
      const Chunk chunk = a.chunks[n];
      const Tensor& tensor = a.tensors[chunk.tensor];
      const Gradient grad = a.grads[chunk.tensor];
      const GroupRow<T>& row = group_row<false>(rows, tensor.group, a, old, now.d);
      const Finish how = finish_of(row.c.deferred, stepped, moved);
      if (grad.data == nullptr || !row.active || how == Finish::kNothing) continue;
      finish_chunk<T, kMixed>(tensor, grad, chunk, row.c, row.old_d_eps, T(now.d), how);
    }
  }
  if (a.last && is_last_block(a.arrived) && threadIdx.x == 0) *a.row = now;
}

}  // namespace prodigy::cuda
