// Elements in registers, and their way from memory and back: 16 bytes at a time where addresses allow.
#pragma once

#include <type_traits>

#include "cuda/arguments.h"

namespace prodigy::cuda {

template <class T>
constexpr int kILP = 16 / sizeof(T);

// kILP consecutive elements of an array.
template <class T>
struct alignas(16) Pack {
  T at[kILP<T>];
};

// The compiler cannot know where an address read from a table points to; generic loads are slower than global ones.
template <class T>
__device__ __forceinline__ T* global(T* address) {
  __builtin_assume(__isGlobal(address));
  return address;
}

// kFull: all elements are there, at an aligned address. Else only the first `count`, one by one; the rest are 0.
template <bool kFull, class T>
__device__ __forceinline__ Pack<T> load(const T* from, int count) {
  if constexpr (kFull) {
    return *reinterpret_cast<const Pack<T>*>(global(from));
  } else {
    Pack<T> pack;
#pragma unroll
    for (int e = 0; e < kILP<T>; ++e) pack.at[e] = e < count ? global(from)[e] : T(0);
    return pack;
  }
}

template <bool kFull, class T>
__device__ __forceinline__ void store(T* to, const Pack<T>& pack, int count) {
  if constexpr (kFull) {
    *reinterpret_cast<Pack<T>*>(global(to)) = pack;
  } else {
#pragma unroll
    for (int e = 0; e < kILP<T>; ++e) {
      if (e < count) global(to)[e] = pack.at[e];
    }
  }
}

// The arrays of one tensor, in the types they are stored in.
template <class T>
struct Arrays {
  T* __restrict__ x;
  const T* __restrict__ grad;
  T* __restrict__ m;
  T* __restrict__ v;
  T* __restrict__ s;
  const T* __restrict__ x0;
  bool aligned;  // all that are walked with one index; chunks begin at multiples of 16 bytes

  __device__ __forceinline__ Arrays(const Tensor& t, const void* gradient)
      : x(static_cast<T*>(t.x)),
        grad(static_cast<const T*>(gradient)),
        m(static_cast<T*>(t.m)),
        v(static_cast<T*>(t.v)),
        s(static_cast<T*>(t.s)),
        x0(static_cast<const T*>(t.x0)) {
    const auto bits = [](const void* address) { return reinterpret_cast<std::uintptr_t>(address); };
    const std::uintptr_t samples = t.slice_p == 1 ? bits(s) | bits(x0) : 0;
    aligned = ((bits(x) | bits(grad) | bits(m) | bits(v) | samples) & 15) == 0;
  }
};

// Calls visit(i, count, full) for this thread's packs of a chunk. Which thread gets which elements does not depend on
// addresses, so neither do the sums.
template <class T, class Visit>
__device__ __forceinline__ void each_pack(const Chunk& chunk, bool aligned, Visit visit) {
  for (std::int64_t i = chunk.begin + threadIdx.x * kILP<T>; i < chunk.end; i += kBlockSize * kILP<T>) {
    const std::int64_t left = chunk.end - i;
    const int count = left < kILP<T> ? int(left) : kILP<T>;
    if (aligned && count == kILP<T>) {
      visit(i, count, std::true_type());
    } else {
      visit(i, count, std::false_type());
    }
  }
}

}  // namespace prodigy::cuda
