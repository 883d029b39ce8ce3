// Phase 1 for one block.
#pragma once

#include <cstdint>

#include "cpu/block.h"
#include "cpu/sums.h"
#include "cpu/vector.h"

namespace prodigy::cpu {

// Where samples come first, they read x and the gradient here and there in the next block: on the same machine, with
// bfloat16 state, 1.06 instead of 1.19 ns.
constexpr int kFetchSampled = kBlock;

// Which elements of a block have samples: all, those in its row-major arrays, those of another memory order, or none.
enum class Sampled { kAll, kPacked, kStrided, kNone };

// What is kept beside an x that is read where it lies: nothing; delta, of which x is x0 + delta; or 8 more bits of x.
enum class Beside { kNothing, kDelta, kLow };

// kMomentum: whether there is an m, and x takes its step.
template <class X, class S, bool kMomentum, Beside kBeside, Sampled kSampled>
struct UpdateBlock {
  using T = Wide<X>;
  static constexpr bool kDelta = kBeside == Beside::kDelta;
  static constexpr bool kRoundsX = std::is_same_v<X, Bits16>, kRoundsState = std::is_same_v<S, Bits16>;

  // random: 16 bits.
  static PRODIGY_INLINE S rounded_state(T value, std::uint32_t random) {
    if constexpr (kRoundsState) return stochastic_bfloat16(value, random);
    return S(value);
  }

  static PRODIGY_INLINE T load_x(const Arrays<X, S>& a, std::int64_t i) {
    if constexpr (kBeside == Beside::kLow) return kept_value(a.x[i], a.low[i]);
    return load(a.x[i]);
  }

  static PRODIGY_INLINE void element(const Arrays<X, S>& a, int i, int lane, const Coefficients<T>& c,
                                     LaneSums<T>& sums) {
    const std::uint32_t bits = kRoundsState || (kRoundsX && !kDelta) ? a.random[i] : 0u;
    const T x0 = kSampled == Sampled::kAll || kDelta ? load(a.x0[i]) : T(0);
    T x = load_x(a, i), at = x;
    if constexpr (kDelta) {
      at = a.delta[i];
      if (kRoundsX) at = displacement<Type::kBFloat16>(x, x0, at), x = x0 + at;
    }
    const T g = gradient(load(a.grad[i]), x, c);
    if constexpr (kSampled == Sampled::kAll) {
      T s = load(a.s[i]);
      sums.add(lane, sample(g, kDelta ? -at : x0 - x, s, c));
      a.s[i] = rounded_state(s, third(bits) >> 16);
    }
    T m = kMomentum ? load(a.m[i]) : T(0), v = load(a.v[i]);
    moments(g, m, v, c);
    a.v[i] = rounded_state(v, upper_half_of_second(bits));
    if constexpr (!kMomentum) return;
    if constexpr (kRoundsState) {
      a.m[i] = nearest<Type::kBFloat16>(m);
    } else {
      a.m[i] = m;
    }
    at = step(at, x, m, v, c);
    if constexpr (kDelta) {
      a.delta[i] = at;
      if constexpr (kRoundsX) a.x[i] = nearest<Type::kBFloat16>(x0 + at);
    } else if constexpr (kBeside == Beside::kLow) {
      const Kept kept = stochastic_24(at, bits);
      a.x[i] = kept.x;
      a.low[i] = kept.low;
    } else if constexpr (kRoundsX) {
      a.x[i] = stochastic_bfloat16(at, bits >> 16);
    } else {
      a.x[i] = at;
    }
  }

  static PRODIGY_INLINE void fetch_ahead(const Arrays<X, S>& a, int i) {
    const int first = i + (kSampled == Sampled::kPacked ? kFetchSampled : kFetchAhead);
    i += kFetchAhead;
    fetch(a.next_x, first - kFetchAhead, true);
    fetch(a.next_grad, first - kFetchAhead, false);
    fetch(a.v, i, true);
    if (kMomentum) fetch(a.m, i, true);
    if (kSampled == Sampled::kAll) fetch(a.s, i, true);
    if (kSampled == Sampled::kAll || kDelta) fetch(a.next_x0, i - kFetchAhead, false);
    if (kDelta) fetch(a.delta, i, true);
  }

  // One loop does everything, but for samples that are not of all elements.
  static PRODIGY_INLINE void elements(const Arrays<X, S>& a, int n, const Coefficients<T>& c, LaneSums<T>& sums) {
    int i = 0;
    for (; i + kSumLanes <= n; i += kSumLanes) {
      fetch_ahead(a, i);
      PRODIGY_VECTORIZE
      for (int lane = 0; lane < kSumLanes; ++lane) element(a, i + lane, lane, c, sums);
    }
    for (int lane = 0; i < n; ++i, ++lane) element(a, i, lane, c, sums);
  }

  // The samples, which need the old x: gathered, then walked as one.
  static PRODIGY_INLINE void packed(const Arrays<X, S>& a, const Samples& samples, std::int64_t slice_p,
                                    const Coefficients<T>& c, LaneSums<T>& sums) {
    T grad[kBlock / 2], x[kBlock / 2];
    std::uint32_t bits[kBlock / 2];
    std::int64_t i = samples.start;
    for (int j = 0; j < samples.count; ++j, i += slice_p) {
      grad[j] = load(a.grad[i]);
      x[j] = load_x(a, i);
      if (kRoundsState) bits[j] = a.random[i];
    }
    const auto one = [&](int j, int lane) {
      T s = load(a.s[j]);
      sums.add(lane, sample(gradient(grad[j], x[j], c), load(a.x0[j]) - x[j], s, c));
      a.s[j] = rounded_state(s, kRoundsState ? third(bits[j]) >> 16 : 0u);
    };
    int j = 0;
    for (; j + kSumLanes <= samples.count; j += kSumLanes) {
      PRODIGY_VECTORIZE
      for (int lane = 0; lane < kSumLanes; ++lane) one(j + lane, lane);
    }
    for (int lane = 0; j < samples.count; ++j, ++lane) one(j, lane);
  }

  static PRODIGY_INLINE void strided(const Arrays<X, S>& a, const Tensor& t, std::int64_t begin, int n,
                                     const Coefficients<T>& c, LaneSums<T>& sums) {
    for (int i = 0; i < n; ++i) {
      const std::int64_t position = row_major(t.order, begin + i), j = position / t.slice_p;
      if (position % t.slice_p != 0) continue;
      T s = load_sample<T>(t.state_type, t.s, j);
      const T x = load_x(a, i), x0 = t.x0 ? load_sample<T>(t.type, t.x0, j) : T(0);
      sums.add(i % kSumLanes, sample(gradient(load(a.grad[i]), x, c), x0 - x, s, c));
      store_sample(t.state_type, t.s, j, s, a.random ? third(a.random[i]) : 0u);
    }
  }

  static PRODIGY_INLINE Sums<double> run(Arrays<X, S> a, const Tensor* t, std::int64_t begin, int n, Samples samples,
                                         Coefficients<T> c) {
    c.momentum = kMomentum;  // now the compiler knows
    LaneSums<T> sums;
    if (kSampled == Sampled::kPacked) packed(a, samples, t->slice_p, c, sums);
    if (kSampled == Sampled::kStrided) strided(a, *t, begin, n, c, sums);
    elements(a, n, c, sums);
    return sums.total();
  }
};

// The samples alone, where they are not of all elements.
template <bool kMomentum, Sampled kSampled>
struct SampleBlock {
  static PRODIGY_INLINE Sums<double> run(Arrays<float, float> a, const Tensor* t, std::int64_t begin, int n,
                                         Samples samples, Coefficients<float> c) {
    LaneSums<float> sums;
    using Block = UpdateBlock<float, float, kMomentum, Beside::kNothing, kSampled>;
    if (kSampled == Sampled::kPacked) Block::packed(a, samples, t->slice_p, c, sums);
    if (kSampled == Sampled::kStrided) Block::strided(a, *t, begin, n, c, sums);
    return sums.total();
  }
};

}  // namespace prodigy::cpu
