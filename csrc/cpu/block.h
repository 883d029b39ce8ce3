// A block of a tensor's elements in the type of the arithmetic: the tensor's own memory if it has that type, else a
// copy that stays in the first-level cache. The walk's loops need not know which.
#pragma once

#include <algorithm>
#include <type_traits>

#include "cpu/halves.h"
#include "cpu/vector.h"
#include "prodigy/rule.h"
#include "prodigy/table.h"

namespace prodigy::cpu {

// Elements per block; also the number of terms that float32 sums have to hold.
constexpr int kBlock = 1024;

// The arrays of one block; null where there is none. With slice_p > 1, s and x0 hold its samples, and are null if
// memory is not in row-major order.
template <class T>
struct Arrays {
  T* __restrict x;
  const T* __restrict grad;
  T* __restrict m, * __restrict v, * __restrict s;
  const T* __restrict x0;
  T* __restrict delta;
};

// Room for the copies, in the first-level cache. float64 is never copied.
template <class T>
struct Scratch {
  static constexpr int kSize = std::is_same_v<T, float> ? kBlock : 1;
  T x[kSize], grad[kSize], m[kSize], v[kSize], s[kSize], x0[kSize];
};

// -- to and from tensors ----------------------------------------------------------------------------------------------

PRODIGY_INLINE std::uint16_t* halves(const void* array, std::int64_t begin) {
  return const_cast<std::uint16_t*>(static_cast<const std::uint16_t*>(array)) + begin;
}

// The `n` elements from `begin` on, copied to `scratch` if they have another type.
template <class T>
PRODIGY_INLINE T* open(Type type, const void* array, std::int64_t begin, int n, T* scratch) {
  if (array == nullptr) return nullptr;
  if constexpr (std::is_same_v<T, float>) {
    if (is_half(type)) {
      widen_run(type, halves(array, begin), n, scratch);
      return scratch;
    }
  }
  return const_cast<T*>(static_cast<const T*>(array)) + begin;
}

// The samples of a row-major block: the index of the first, and their number.
struct Samples {
  std::int64_t first;
  int count;

  PRODIGY_INLINE Samples(const Tensor& t, std::int64_t begin, int n)
      : first((begin + t.slice_p - 1) / t.slice_p), count(int((begin + n - 1) / t.slice_p + 1 - first)) {}
};

// x, and x0 and delta where x is computed from them.
template <class T>
PRODIGY_INLINE void open_position(const Tensor& t, std::int64_t begin, int n, Scratch<T>& scratch, Arrays<T>& a) {
  if constexpr (std::is_same_v<T, float>) {
    if (t.delta != nullptr) {
      if (t.x0 == nullptr) std::fill_n(scratch.x0, n, 0.0f);
      open(t.type, t.x0, begin, n, scratch.x0);
      a.x0 = scratch.x0, a.x = scratch.x, a.delta = t.delta + begin;
      displaced_run(t.type, halves(t.x, begin), n, a.x0, a.delta, a.x);
      return;
    }
  }
  a.x = open(t.type, t.x, begin, n, scratch.x);
}

// Stores the x of a 16-bit tensor.
PRODIGY_INLINE void close_position(const Tensor& t, std::int64_t begin, int n, const Arrays<float>& a, std::uint32_t k,
                                   Stream stream) {
  std::uint16_t* to = halves(t.x, begin);
  if (t.delta != nullptr) {
    place_run(t.type, a.x0, a.delta, n, to);
  } else if (t.stochastic) {
    stochastic_x_run(t.type, a.x, n, to, RandomBits(k, t.index, stream, begin), begin);
  } else {
    nearest_run(t.type, a.x, n, to);
  }
}

// -- the two phases ---------------------------------------------------------------------------------------------------

template <class T>
PRODIGY_INLINE Arrays<T> open_update(const Tensor& t, const Gradient& grad, std::int64_t begin, int n, bool momentum,
                                     Scratch<T>& scratch) {
  Arrays<T> a{};
  open_position(t, begin, n, scratch, a);
  a.grad = open(grad.type, grad.data, begin, n, scratch.grad);
  a.v = open(t.state_type, t.v, begin, n, scratch.v);
  if (momentum) a.m = open(t.state_type, t.m, begin, n, scratch.m);
  if (t.slice_p > 1 && t.order.dims > 0) return a;
  const Samples samples(t, begin, n);
  a.s = open(t.state_type, t.s, samples.first, samples.count, scratch.s);
  if (t.delta == nullptr) a.x0 = open(t.type, t.x0, samples.first, samples.count, scratch.x0);
  return a;
}

// Stores the copies.
PRODIGY_INLINE void close_update(const Tensor& t, std::int64_t begin, int n, const Coefficients<float>& c,
                                 const Arrays<float>& a) {
  if (is_half(t.state_type)) {
    const RandomBits random(c.k, t.index, kStepStream, begin);
    stochastic_v_run(t.state_type, a.v, n, halves(t.v, begin), random, begin);
    if (c.momentum) nearest_run(t.state_type, a.m, n, halves(t.m, begin));
    const Samples samples(t, begin, n);
    if (a.s != nullptr) {
      stochastic_s_run(t.state_type, a.s, samples.count, halves(t.s, samples.first), random, samples.first * t.slice_p,
                       t.slice_p);
    }
  }
  if (c.momentum && is_half(t.type)) close_position(t, begin, n, a, c.k, kStepStream);
}

PRODIGY_INLINE void close_finish(const Tensor& t, std::int64_t begin, int n, const Coefficients<float>& c,
                                 const Arrays<float>& a, Finish how) {
  if (is_half(t.type)) close_position(t, begin, n, a, c.k, stream_of(how));
}

// float64 is never copied.
PRODIGY_INLINE void close_update(const Tensor&, std::int64_t, int, const Coefficients<double>&, const Arrays<double>&) {
}
PRODIGY_INLINE void close_finish(const Tensor&, std::int64_t, int, const Coefficients<double>&, const Arrays<double>&,
                                 Finish) {}

template <class T>
PRODIGY_INLINE Arrays<T> open_finish(const Tensor& t, const Gradient& grad, std::int64_t begin, int n, bool momentum,
                                     Scratch<T>& scratch) {
  Arrays<T> a{};
  open_position(t, begin, n, scratch, a);
  a.v = open(t.state_type, t.v, begin, n, scratch.v);
  if (momentum) {
    a.m = open(t.state_type, t.m, begin, n, scratch.m);
  } else {
    a.grad = open(grad.type, grad.data, begin, n, scratch.grad);
  }
  return a;
}

// -- samples ----------------------------------------------------------------------------------------------------------

// Element j of samples that are not in the order of memory.
template <class T>
PRODIGY_INLINE T load_sample(Type type, const void* array, std::int64_t j) {
  if constexpr (std::is_same_v<T, float>) {
    if (type == Type::kBFloat16) return widen<Type::kBFloat16>(*halves(array, j));
    if (type == Type::kFloat16) return widen<Type::kFloat16>(*halves(array, j));
  }
  return static_cast<const T*>(array)[j];
}

// bits: what it is rounded with.
template <class T>
PRODIGY_INLINE void store_sample(Type type, void* array, std::int64_t j, T value, std::uint32_t bits) {
  if constexpr (std::is_same_v<T, float>) {
    if (type == Type::kBFloat16) *halves(array, j) = stochastic<Type::kBFloat16>(value, bits);
    if (type == Type::kFloat16) *halves(array, j) = stochastic<Type::kFloat16>(value, bits);
    if (is_half(type)) return;
  }
  static_cast<T*>(array)[j] = value;
}

}  // namespace prodigy::cpu
