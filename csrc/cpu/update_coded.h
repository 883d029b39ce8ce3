// Phase 1 for one block, where the state is in codes.
#pragma once

#include <algorithm>

#include "cpu/code_block.h"
#include "cpu/codes.h"
#include "cpu/update.h"

namespace prodigy::cpu {

// As kFetchAhead: on a Zen 4 that had other work, 2.0 ns instead of 2.3, with slice_p=11 1.4 instead of 1.7. Codes are
// too few bytes for it to matter.
constexpr int kFetchBesideCodes = kBlock;

// What there is of a block of codes.
struct CodedState {
  Words m_codes, root_codes, s_codes, delta_codes;
  Floats m, root, s, delta;  // new ones, not yet rounded
};

// As UpdateBlock. Where all elements have samples, there is a delta in the place of x0. kExact: x is stored as it is.
// Codes are those of every other backend but where a number, whose last bit depends on the order of the operations, is
// rounded to the other side of a limit.
template <bool kMomentum, Sampled kSampled, bool kExact>
struct UpdateCodedBlock {
  using C = Coefficients<float>;
  static constexpr float kNoDecay = -0.0f;  // what is added changes nothing, not even the sign of a zero
  static constexpr bool kAll = kSampled == Sampled::kAll;
  static constexpr bool kMoves = kAll && kMomentum && kExact;

  // The numbers that the old codes are.
  struct Old {
    Scale<Code::kM> m;
    Scale<Code::kRoot> root;
    Scale<Code::kS> s;
    Scale<Code::kDelta> delta;

    PRODIGY_INLINE explicit Old(const std::uint8_t* bytes) : m(bytes), root(bytes), s(bytes), delta(bytes) {}
  };

  static PRODIGY_INLINE void element(float grad, float x, int i, int lane, const C& c, const Old& old,
                                     CodedState& state, LaneSums<float>& sums) {
    const float g = gradient(grad, x, c);
    if constexpr (kAll) {
      float s = old.s.number(state.s_codes[i]);
      sums.add(lane, sample(g, -old.delta.number(state.delta_codes[i]), s, c));
      state.s[i] = s;
    }
    const float root = old.root.number(state.root_codes[i]);
    float m = kMomentum ? old.m.number(state.m_codes[i]) : 0.0f, v = root * root;
    moments(g, m, v, c);
    state.root[i] = ExactRoots::root(v);
    if constexpr (kMomentum) state.m[i] = m;
  }

  // In a loop of its own: sums do not stay in registers in one that has this in it.
  static PRODIGY_INLINE void fetch_ahead(const float* grad, const float* x, int n) {
    for (int i = 0; i < n; i += kLanes) {
      fetch(grad, i + kFetchBesideCodes, false);
      if (kMomentum) fetch(x, i + kFetchBesideCodes, true);
    }
  }

  template <bool kDecays>
  static PRODIGY_INLINE void elements(const float* __restrict grad, const float* __restrict x, int n, const C& c,
                                      const Old& old, CodedState& state, LaneSums<float>& sums) {
    int i = 0;
    for (; i + kLanes <= n; i += kLanes) {
      PRODIGY_VECTORIZE
      for (int lane = 0; lane < kLanes; ++lane) {
        element(grad[i + lane], kDecays ? x[i + lane] : kNoDecay, i + lane, lane, c, old, state, sums);
      }
    }
    for (int lane = 0; i < n; ++i, ++lane) element(grad[i], kDecays ? x[i] : kNoDecay, i, lane, c, old, state, sums);
  }

  // The codes of m and the root of v, and the step of x with the numbers that they are.
  template <bool kDecays>
  static PRODIGY_INLINE void move(const std::uint32_t* __restrict bits, float* __restrict x, int n, const C& c,
                                  const Old& old, CodedState& state, std::uint8_t* bytes) {
    const auto m = Scale<Code::kM>::renewed(state.m.of, n, bytes);
    const auto root = Scale<Code::kRoot>::renewed(state.root.of, n, bytes);
    PRODIGY_VECTORIZE
    for (int i = 0; i < n; ++i) {
      const Coded new_m = m.rounded(state.m[i], 0u), new_root = root.rounded(state.root[i], bits[i]);
      state.m_codes[i] = new_m.code;
      state.root_codes[i] = new_root.code;
      const float before = x[i], decaying = kDecays ? before : kNoDecay;
      const float after = step<KeptRoots>(before, decaying, new_m.number, new_root.number, c);
      x[i] = after;
      if constexpr (kMoves) {
        state.delta[i] = old.delta.number(state.delta_codes[i]) + finite_or_zero(after - before);
      }
    }
  }

  // kDecays: whether there is weight decay. Without, there is less to compute: x is then a constant for it.
  template <bool kDecays>
  static PRODIGY_INLINE void codes(const Arrays<float, float>& a, const Tensor& t, std::int64_t begin, int at, int n,
                                   const C& c, LaneSums<float>& sums) {
    CodedState state;
    begin += at;
    if constexpr (kMomentum) widen_codes<Code::kM>(t.m, begin, n, state.m_codes);
    widen_codes<Code::kRoot>(t.v, begin, n, state.root_codes);
    if constexpr (kAll) {
      widen_codes<Code::kS>(t.s, begin, n, state.s_codes);
      widen_codes<Code::kDelta>(t.moved, begin, n, state.delta_codes);
    }
    std::uint8_t* bytes = scale_at(t, begin);
    const std::uint32_t* bits = a.random + at;
    const Old old(bytes);
    fetch_ahead(a.grad + at, a.x + at, n);
    elements<kDecays>(a.grad + at, a.x + at, n, c, old, state, sums);
    if constexpr (kMomentum) {
      move<kDecays>(bits, a.x + at, n, c, old, state, bytes);
      narrow_codes(state.m_codes, n, t.m, begin);
      narrow_codes(state.root_codes, n, t.v, begin);
      if constexpr (kMoves) store_codes<Code::kDelta>(state.delta, n, bits, t.moved, begin, bytes);
    } else {
      store_codes<Code::kRoot>(state.root, n, bits, t.v, begin, bytes);
    }
    if constexpr (kAll) store_codes<Code::kS>(state.s, n, bits, t.s, begin, bytes);
  }

  static PRODIGY_INLINE Sums<double> run(Arrays<float, float> a, const Tensor* t, std::int64_t begin, int n,
                                         Samples samples, C c) {
    c.momentum = kMomentum;  // now the compiler knows
    LaneSums<float> sums;
    using Sampler = UpdateBlock<float, float, kMomentum, Beside::kNothing, kSampled>;
    if (kSampled == Sampled::kPacked) Sampler::packed(a, samples, t->slice_p, c, sums);
    if (kSampled == Sampled::kStrided) Sampler::strided(a, *t, begin, n, c, sums);
    const bool decays = c.l2 != 0.0f || c.decay != 0.0f;
    for (int at = 0; at < n; at += kCodeBlock) {
      const int size = std::min(kCodeBlock, n - at);
      decays ? codes<true>(a, *t, begin, at, size, c, sums) : codes<false>(a, *t, begin, at, size, c, sums);
    }
    return sums.total();
  }
};

}  // namespace prodigy::cpu
