// A block of a tensor's elements: the tensor's own memory if the loops know its types, else a copy in float32 that
// stays in the first-level cache.
#pragma once

#include <algorithm>
#include <type_traits>

#include "cpu/codes.h"
#include "cpu/halves.h"
#include "prodigy/rule.h"
#include "prodigy/table.h"

namespace prodigy::cpu {

// What a loop may find in memory: float, double, or bfloat16 as bits.
using Bits16 = std::uint16_t;

// The type of the arithmetic.
template <class Stored>
using Wide = std::conditional_t<std::is_same_v<Stored, double>, double, float>;

PRODIGY_INLINE float load(float stored) { return stored; }
PRODIGY_INLINE double load(double stored) { return stored; }
PRODIGY_INLINE float load(Bits16 stored) { return widen<Type::kBFloat16>(stored); }

// What an array is a copy of, or the array itself, from the element on that is fetched with the first of the block.
struct Ahead {
  const char* first;
  int size;  // of an element
};
PRODIGY_INLINE void fetch(const Ahead& next, int i, bool write) { fetch(next.first, i * next.size, write); }

// The arrays of one block; null where there is none. X: of x, x0 and gradient; S: of the state. With slice_p > 1, s and
// x0 hold its samples, and are null if memory is not in row-major order.
template <class X, class S>
struct Arrays {
  X* __restrict x;
  const X* __restrict grad;
  S* __restrict m, * __restrict v, * __restrict s;
  const X* __restrict x0;
  float* __restrict delta;
  std::int32_t* __restrict low;            // a copy
  const std::uint32_t* __restrict random;  // per element, if anything is rounded stochastically
  const float* __restrict before;          // a copy of x as it was, where x - x0 is in codes
  Ahead next_x, next_x0, next_grad;
};

// Room for the copies, in the first-level cache. float64 is never copied.
template <class T>
struct Scratch {
  static constexpr int kSize = std::is_same_v<T, float> ? kBlock : 1;
  alignas(64) T x[kSize], grad[kSize], m[kSize], v[kSize], s[kSize], x0[kSize], before[kSize];
  alignas(64) std::uint32_t random[kSize];
  alignas(64) std::int32_t low[kSize];  // Note [Bytes in words]
};

// The x0 of a tensor whose start is zero everywhere.
template <class X>
alignas(64) inline const X kZeros[kBlock] = {};

// The samples of a row-major block: the index of the first, their number, and where in the block the first is.
struct Samples {
  std::int64_t first;
  int count, start;

  PRODIGY_INLINE Samples(const Tensor& t, const Chunk& chunk, std::int64_t begin, int n) {
    const std::int64_t g = begin + chunk.shift, number = samples_before(g, t.slice_p);
    first = number - chunk.sample_shift;
    count = int(samples_before(g + n, t.slice_p) - number);
    start = count > 0 ? int(number * t.slice_p - g) : 0;
  }
};

// -- to and from tensors ----------------------------------------------------------------------------------------------

PRODIGY_INLINE std::uint16_t* halves(const void* array, std::int64_t begin) {
  return const_cast<std::uint16_t*>(static_cast<const std::uint16_t*>(array)) + begin;
}

// The `n` elements from `begin` on, copied to `scratch` if a loop over `Stored` cannot read them.
template <class Stored>
PRODIGY_INLINE Stored* open(Type type, const void* array, std::int64_t begin, int n, Wide<Stored>* scratch) {
  if (array == nullptr) return nullptr;
  if constexpr (std::is_same_v<Stored, float>) {
    if (is_half(type)) {
      widen_run(type, halves(array, begin), n, scratch);
      return scratch;
    }
  }
  return const_cast<Stored*>(static_cast<const Stored*>(array)) + begin;
}

// Elements between the one that is used and the one that is fetched: ten streams are more than the hardware prefetches
// by itself, and those that are fetched wait in the first-level cache. On one core of a Zen 4, 24 million elements,
// float32 and stochastic bfloat16: 1.01 and 0.90 ns per element; 64: the same; 256: 1.14 and 1.00; 512: 1.29 and 1.09.
// On a Zen 5, whose cache is larger, float32: 1.55; 512: 1.47; 2048: 1.66; without: 1.59.
constexpr int kFetchAhead = 128;

// Where elements of a tensor are fetched from. distance: kFetchAhead, or a block if it is read before anything else;
// what is copied always is.
template <class Stored>
PRODIGY_INLINE Ahead ahead(Type type, const void* array, std::int64_t begin, int distance) {
  if (array == nullptr) return {reinterpret_cast<const char*>(kZeros<Stored>), 0};
  if (std::is_same_v<Stored, float> && is_half(type)) distance = kBlock;
  const int size = size_of(type);
  return {static_cast<const char*>(array) + (begin + distance) * size, size};
}

// x, and x0 and delta where x is computed from them.
template <class X, class S>
PRODIGY_INLINE void open_position(const Tensor& t, std::int64_t begin, int n, Scratch<Wide<X>>& scratch,
                                  Arrays<X, S>& a) {
  if (t.delta != nullptr) {
    a.x0 = t.x0 ? open<X>(t.type, t.x0, begin, n, scratch.x0) : kZeros<X>;
    a.delta = t.delta + begin;
    if constexpr (std::is_same_v<X, float>) {
      a.x = scratch.x;
      displaced_run(t.type, halves(t.x, begin), n, a.x0, a.delta, a.x);
      return;
    }
  }
  if (t.low != nullptr) {
    a.low = scratch.low;
    words_of_bytes_run(t.low + begin, n, a.low);
    if constexpr (std::is_same_v<X, float>) {
      a.x = scratch.x;
      kept_run(halves(t.x, begin), a.low, n, a.x);
      return;
    }
  }
  a.x = open<X>(t.type, t.x, begin, n, scratch.x);
}

// Stores the copies of x and low.
template <class X, class S>
PRODIGY_INLINE void store_position(const Tensor& t, std::int64_t begin, int n, const Arrays<X, S>& a) {
  if constexpr (std::is_same_v<X, float>) {
    if (!is_half(t.type)) return;
    std::uint16_t* to = halves(t.x, begin);
    if (t.delta != nullptr) {
      place_run(t.type, a.x0, a.delta, n, to);
    } else if (t.low != nullptr) {
      stochastic_24_run(a.x, n, to, a.low, a.random);
    } else if (t.stochastic) {
      stochastic_x_run(t.type, a.x, n, to, a.random);
    } else {
      nearest_run(t.type, a.x, n, to);
    }
  }
  if (t.low != nullptr) bytes_of_words_run(a.low, n, t.low + begin);
}

// For an x - x0 in codes: x as it was.
template <class X, class S>
PRODIGY_INLINE void keep_position(const Tensor& t, int n, Scratch<Wide<X>>& scratch, Arrays<X, S>& a) {
  if constexpr (std::is_same_v<X, float>) {
    if (t.moved != nullptr) a.before = std::copy_n(a.x, n, scratch.before) - n;
  }
}

// The end of a change to x.
template <class X, class S>
PRODIGY_INLINE void close_position(const Tensor& t, std::int64_t begin, int n, const Arrays<X, S>& a) {
  store_position(t, begin, n, a);
  if constexpr (std::is_same_v<X, float>) {
    if (a.before == nullptr) return;
    if (t.low != nullptr) {
      kept_run(halves(t.x, begin), a.low, n, a.x);
    } else if (is_half(t.type)) {
      widen_run(t.type, halves(t.x, begin), n, a.x);
    }
    run_codes([&](auto codes) { codes.move(t, begin, n, a.before, a.x, a.random); });
  }
}

// Random bits for the block, in `scratch`; null if it needs none. Unless g, the index of the block's first element in
// the whole tensor, is a multiple of 8, the block is the rest of an eight.
template <class T>
PRODIGY_INLINE const std::uint32_t* draw(const RandomBits& random, std::int64_t g, int n, bool needed,
                                         Scratch<T>& scratch) {
  if (std::is_same_v<T, double> || !needed) return nullptr;
  const int skipped = int(g % kEight);
  random_run(random, g - skipped, skipped + n, scratch.random);
  return scratch.random + skipped;
}

// -- the two phases ---------------------------------------------------------------------------------------------------

template <class X, class S>
PRODIGY_INLINE Arrays<X, S> open_update(const Tensor& t, const Gradient& grad, std::int64_t begin, int n, bool momentum,
                                        const Samples& samples, Scratch<Wide<X>>& scratch) {
  Arrays<X, S> a{};
  open_position(t, begin, n, scratch, a);
  a.grad = open<X>(grad.type, grad.data, begin, n, scratch.grad);
  const bool coded = is_coded(t.state_type);
  // Beside codes, a block of them, unless samples come first. On two cores of a Zen 4 0.80 ns per element, kBlock:
  // 0.87.
  const int distance = !coded ? kFetchAhead : t.slice_p > 1 ? kBlock : kCodeBlock;
  a.next_x = ahead<X>(t.type, t.x, begin, distance);
  a.next_x0 = ahead<X>(t.type, t.x0, begin, distance);
  a.next_grad = ahead<X>(grad.type, grad.data, begin, distance);
  if (!coded) {
    a.v = open<S>(t.state_type, t.v, begin, n, scratch.v);
    if (momentum) a.m = open<S>(t.state_type, t.m, begin, n, scratch.m);
  }
  if (momentum && is_half(t.type)) keep_position(t, n, scratch, a);
  if (t.s == nullptr || t.moved != nullptr || (t.slice_p > 1 && t.order.dims > 0)) return a;
  a.s = open<S>(t.state_type, t.s, samples.first, samples.count, scratch.s);
  if (t.delta == nullptr) {
    a.x0 = t.x0 ? open<X>(t.type, t.x0, samples.first, samples.count, scratch.x0) : kZeros<X>;
  }
  return a;
}

// Stores the copies.
template <class X, class S>
PRODIGY_INLINE void close_update(const Tensor& t, std::int64_t begin, int n, bool momentum, const Samples& samples,
                                 const Arrays<X, S>& a) {
  if constexpr (std::is_same_v<S, float>) {
    if (is_half(t.state_type)) {
      stochastic_v_run(t.state_type, a.v, n, halves(t.v, begin), a.random);
      if (momentum) nearest_run(t.state_type, a.m, n, halves(t.m, begin));
      if (a.s != nullptr) {
        std::uint16_t* s = halves(t.s, samples.first);
        stochastic_s_run(t.state_type, a.s, samples.count, s, a.random + samples.start, t.slice_p);
      }
    }
  }
  if (momentum) close_position(t, begin, n, a);
}

template <class T>
PRODIGY_INLINE Arrays<T, T> open_finish(const Tensor& t, const Gradient& grad, std::int64_t begin, int n, bool momentum,
                                        Scratch<T>& scratch) {
  Arrays<T, T> a{};
  open_position(t, begin, n, scratch, a);
  keep_position(t, n, scratch, a);
  if (!momentum) a.grad = open<T>(grad.type, grad.data, begin, n, scratch.grad);
  if constexpr (std::is_same_v<T, float>) {
    if (is_coded(t.state_type)) {
      run_codes([&](auto codes) { codes.root(t, begin, n, a.v = scratch.v); });
      if (momentum) run_codes([&](auto codes) { codes.m(t, begin, n, a.m = scratch.m); });
      return a;
    }
  }
  a.v = open<T>(t.state_type, t.v, begin, n, scratch.v);
  if (momentum) a.m = open<T>(t.state_type, t.m, begin, n, scratch.m);
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
