// The samples of a chunk, where slice_p > 1.
//
// Note [Samples first]
// Only every p-th element has s and x0. A thread that walks packs would ask for each element whether it is one, load
// two scattered numbers if so, and keep registers for them: the kernel then moves 59 % of the bytes per second that a
// copy does. Instead, a chunk is walked in tiles, small enough that what one tile reads is still in the cache when it
// is read again. First the threads deal the tile's samples among themselves: their s and x0 lie side by side, and their
// g and x come into the cache. After a barrier, because x is about to change, the packs are walked as if there were no
// samples. 90 % (docs/design.md, "The CUDA kernels").
#pragma once

#include "cuda/pack.cuh"

namespace prodigy::cuda {

// A sample: where it is in the chunk, and its number among those of the tensor.
struct Found {
  int at;
  std::int64_t index;
};

// In another memory order than row-major, an element has to be asked whether it is a sample. Returns the first from
// `at` on, in steps of kThreads; at least `size` if there is none. Not inline: it is rare, and would take registers.
template <int kThreads>
__device__ __noinline__ Found search(const Tensor& t, std::int64_t begin, int at, int size) {
  for (; at < size; at += kThreads) {
    const std::int64_t position = row_major(t.order, begin + at), index = position / t.slice_p;
    if (index * t.slice_p == position) return {at, index};
  }
  return {at, 0};
}

// The quotient, rounded up. A 64-bit division takes longer than all else that is done for a sample.
__device__ __forceinline__ std::int64_t divided_up(std::int64_t number, std::int64_t by) {
  if (((number | by) >> 31) != 0) return (number + by - 1) / by;
  return (std::uint32_t(number) + std::uint32_t(by) - 1) / std::uint32_t(by);
}

// This thread's samples of a chunk, in the order of their positions.
template <int kThreads>
struct Samples {
  const Tensor& tensor;
  std::int64_t begin;
  int size;        // of the chunk
  int period = 0;  // from a sample to the next, at most `size`; 0: not row-major
  Found now;       // `at` is at least `size` if there is none left

  __device__ __forceinline__ Samples(const Tensor& t, const Chunk& chunk)
      : tensor(t), begin(chunk.begin), size(int(chunk.end - chunk.begin)) {
    if (t.order.dims > 0) {
      now = search<kThreads>(t, begin, int(threadIdx.x), size);
      return;
    }
    const std::int64_t g = begin + chunk.shift, first = divided_up(g, t.slice_p), distance = first * t.slice_p - g;
    period = t.slice_p < size ? int(t.slice_p) : size;
    now = {(distance < size ? int(distance) : size) + int(threadIdx.x) * period,
           first - chunk.sample_shift + threadIdx.x};
  }
  __device__ __forceinline__ void next() {
    if (period == 0) {
      now = search<kThreads>(tensor, begin, now.at + kThreads, size);
    } else {
      now = {now.at + kThreads * period, now.index + kThreads};
    }
  }
};

// s, and the sums, of this thread's samples before `end`, a position in the chunk.
template <class Storage, int kThreads, class T, class Bits>
__device__ __forceinline__ void take_samples(const Arrays<Storage>& a, Samples<kThreads>& samples, int end,
                                             const Coefficients<T>& c, const Bits& random, Sums<T>& sums) {
  for (; samples.now.at < end; samples.next()) {
    const std::int64_t i = samples.begin + samples.now.at, index = samples.now.index, place = i - a.begin;
    const T grad = load_one<T>(a.grad, place), x = a.load_x(place);
    T s = load_one<T>(a.s, index);
    const T x0 = a.x0.data != nullptr ? load_one<T>(a.x0, index) : T(0);
    add_sample(gradient(grad, x, c), x0 - x, s, c, sums);
    store_one(a.s, index, s, Storage::kRounds ? third(random.of(i)) : 0);
  }
}

}  // namespace prodigy::cuda
