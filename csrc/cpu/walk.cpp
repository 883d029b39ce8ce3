#include "cpu/walk.h"

#include <algorithm>

#include "prodigy/storage.h"

// One build serves every x86-64: the loader picks the widest version of each function marked so.
#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 12
#define PRODIGY_CLONES __attribute__((target_clones("default", "arch=x86-64-v3", "arch=x86-64-v4")))
#define PRODIGY_HAS_CLONES 1
#else
#define PRODIGY_CLONES
#endif

// Iterations touch different elements of arrays that do not overlap: no run-time checks for that.
#if defined(__GNUC__) && !defined(__clang__)
#define PRODIGY_VECTORIZE _Pragma("GCC ivdep")
#elif defined(__clang__)
#define PRODIGY_VECTORIZE _Pragma("clang loop vectorize(assume_safety)")
#else
#define PRODIGY_VECTORIZE
#endif

namespace prodigy::cpu {
namespace {

using std::int64_t;

// Sums are gathered in kLanes independent accumulators, which is what lets the compiler use vector registers, and are
// passed on in float64 after kBlock elements, so that float32 does not have to hold a long sum.
constexpr int kLanes = 16;
constexpr int64_t kBlock = 1024;
// How far ahead of its use an element is fetched: ten streams are more than the hardware follows by itself
// (measured on Zen 5: 9 % of a step that comes from memory, nothing in cache).
constexpr int64_t kFetchAhead = 512;

template <class T>
struct LaneSums {
  T dot[kLanes] = {}, norm[kLanes] = {};

  PRODIGY_INLINE void add(int lane, const Sums<T>& term) {
    dot[lane] += term.dot;
    norm[lane] += term.norm;
  }
  PRODIGY_INLINE Sums<double> total() const {
    Sums<double> sums{0.0, 0.0};
    for (int lane = 0; lane < kLanes; ++lane) {
      sums.dot += double(dot[lane]);
      sums.norm += double(norm[lane]);
    }
    return sums;
  }
};

// The arrays of one tensor. They are read and written by `load` and `store` only.
template <class T>
struct Arrays {
  T* __restrict x;
  const T* __restrict grad;
  T* __restrict m, * __restrict v, * __restrict s;
  const T* __restrict x0;

  explicit PRODIGY_INLINE Arrays(const Tensor& t)
      : x(static_cast<T*>(t.x)),
        grad(static_cast<const T*>(t.grad)),
        m(static_cast<T*>(t.m)),
        v(static_cast<T*>(t.v)),
        s(static_cast<T*>(t.s)),
        x0(static_cast<const T*>(t.x0)) {}

  template <bool kMomentum, bool kZeroX0>
  PRODIGY_INLINE void fetch(int64_t i) const {
#if defined(__GNUC__)
    const auto at = [i](const T* array) { return reinterpret_cast<std::uintptr_t>(array) + i * sizeof(T); };
    __builtin_prefetch(reinterpret_cast<void*>(at(x)), 1);
    __builtin_prefetch(reinterpret_cast<void*>(at(grad)));
    if (kMomentum) __builtin_prefetch(reinterpret_cast<void*>(at(m)), 1);
    __builtin_prefetch(reinterpret_cast<void*>(at(v)), 1);
    __builtin_prefetch(reinterpret_cast<void*>(at(s)), 1);
    if (!kZeroX0) __builtin_prefetch(reinterpret_cast<void*>(at(x0)));
#endif
  }
};

template <class T>
PRODIGY_INLINE T gradient_at(const Arrays<T>& a, int64_t i, const Coefficients<T>& c) {
  return gradient(load<T>(a.grad, i), load<T>(a.x, i), c);
}

// The element at memory position i, whose sample is at position j.
template <class T, bool kZeroX0>
PRODIGY_INLINE Sums<T> sample_element(const Arrays<T>& a, int64_t i, int64_t j, const Coefficients<T>& c) {
  T s = load<T>(a.s, j);
  const T x0 = kZeroX0 ? T(0) : load<T>(a.x0, j);
  const Sums<T> sums = sample(gradient_at(a, i, c), load<T>(a.x, i), x0, s, c);
  store(a.s, j, s);
  return sums;
}

template <class T, bool kMomentum>
PRODIGY_INLINE void update_element(const Arrays<T>& a, int64_t i, const Coefficients<T>& c) {
  T m = kMomentum ? load<T>(a.m, i) : T(0);
  T v = load<T>(a.v, i);
  moments(gradient_at(a, i, c), m, v, c);
  store(a.v, i, v);
  if (kMomentum) {
    store(a.m, i, m);
    store(a.x, i, step(load<T>(a.x, i), m, v, c));
  }
}

// slice_p == 1: one loop does everything.
template <class T, bool kMomentum, bool kZeroX0>
PRODIGY_INLINE Sums<double> update_whole(const Arrays<T>& a, int64_t begin, int64_t end, const Coefficients<T>& c) {
  LaneSums<T> sums;
  const auto element = [&](int64_t i, int lane) {
    sums.add(lane, sample_element<T, kZeroX0>(a, i, i, c));
    update_element<T, kMomentum>(a, i, c);
  };
  int64_t i = begin;
  for (; i + kLanes <= end; i += kLanes) {
    a.template fetch<kMomentum, kZeroX0>(i + kFetchAhead);
    PRODIGY_VECTORIZE
    for (int lane = 0; lane < kLanes; ++lane) element(i + lane, lane);
  }
  for (int lane = 0; i < end; ++i, ++lane) element(i, lane);
  return sums.total();
}

// slice_p > 1: first the samples, which need the old x, then the rest.
template <class T, bool kMomentum, bool kZeroX0>
PRODIGY_INLINE Sums<double> update_sampled(const Arrays<T>& a, const Tensor& t, int64_t begin, int64_t end,
                                           const Coefficients<T>& c) {
  LaneSums<T> sums;
  const int64_t p = t.slice_p;
  if (t.order.dims == 0) {
    for (int64_t j = (begin + p - 1) / p; j * p < end; ++j) {
      sums.add(int(j % kLanes), sample_element<T, kZeroX0>(a, j * p, j, c));
    }
  } else {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t position = row_major(t.order, i);
      if (position % p == 0) sums.add(int(i % kLanes), sample_element<T, kZeroX0>(a, i, position / p, c));
    }
  }
  PRODIGY_VECTORIZE
  for (int64_t i = begin; i < end; ++i) update_element<T, kMomentum>(a, i, c);
  return sums.total();
}

template <class T, bool kMomentum, bool kZeroX0>
PRODIGY_INLINE Sums<double> update_blocks(const Tensor& t, const Chunk& chunk, const Coefficients<T>& c) {
  const Arrays<T> a(t);
  Sums<double> sums{0.0, 0.0};
  for (int64_t begin = chunk.begin; begin < chunk.end; begin += kBlock) {
    const int64_t end = std::min(begin + kBlock, chunk.end);
    const Sums<double> part = t.slice_p == 1 ? update_whole<T, kMomentum, kZeroX0>(a, begin, end, c)
                                             : update_sampled<T, kMomentum, kZeroX0>(a, t, begin, end, c);
    sums.dot += part.dot;
    sums.norm += part.norm;
  }
  return sums;
}

template <class T>
PRODIGY_INLINE Sums<double> update_any(const Tensor& t, const Chunk& chunk, const Coefficients<T>& c) {
  if (c.momentum) return t.x0 ? update_blocks<T, true, false>(t, chunk, c) : update_blocks<T, true, true>(t, chunk, c);
  return t.x0 ? update_blocks<T, false, false>(t, chunk, c) : update_blocks<T, false, true>(t, chunk, c);
}

// x = rule(x, v, i) for all elements of a chunk.
template <class T, class Rule>
PRODIGY_INLINE void each_x(const Arrays<T>& a, const Chunk& chunk, Rule rule) {
  PRODIGY_VECTORIZE
  for (int64_t i = chunk.begin; i < chunk.end; ++i) store(a.x, i, rule(load<T>(a.x, i), load<T>(a.v, i), i));
}

template <class T>
PRODIGY_INLINE void finish_any(const Tensor& t, const Chunk& chunk, const Coefficients<T>& c, T old_d_eps, T d_new,
                               Finish how) {
  const Arrays<T> a(t);
  if (how == Finish::kCorrect) {
    each_x(a, chunk, [&](T x, T v, int64_t i) { return correct(x, load<T>(a.m, i), v, old_d_eps, c); });
  } else if (how == Finish::kUndo) {
    each_x(a, chunk, [&](T x, T v, int64_t i) { return undo(x, load<T>(a.m, i), v, c); });
  } else if (c.momentum) {
    each_x(a, chunk, [&](T x, T v, int64_t i) { return step(x, load<T>(a.m, i), v, c); });
  } else {
    each_x(a, chunk, [&](T x, T v, int64_t i) { return step(x, d_new * finite_or_zero(gradient_at(a, i, c)), v, c); });
  }
}

}  // namespace

const char* instruction_set() {
#ifdef PRODIGY_HAS_CLONES
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl")) return "x86-64-v4";
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return "x86-64-v3";
#endif
  return "baseline";
}

template <>
PRODIGY_CLONES Sums<double> update_chunk(const Tensor& t, const Chunk& chunk, const Coefficients<float>& c) {
  return update_any(t, chunk, c);
}

template <>
PRODIGY_CLONES Sums<double> update_chunk(const Tensor& t, const Chunk& chunk, const Coefficients<double>& c) {
  return update_any(t, chunk, c);
}

template <>
PRODIGY_CLONES void finish_chunk(const Tensor& t, const Chunk& chunk, const Coefficients<float>& c, float old_d_eps,
                                 float d_new, Finish how) {
  finish_any(t, chunk, c, old_d_eps, d_new, how);
}

template <>
PRODIGY_CLONES void finish_chunk(const Tensor& t, const Chunk& chunk, const Coefficients<double>& c, double old_d_eps,
                                 double d_new, Finish how) {
  finish_any(t, chunk, c, old_d_eps, d_new, how);
}

}  // namespace prodigy::cpu
