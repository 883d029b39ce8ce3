// Phase 1 for one block, where the state is in codes.
#pragma once

#include "cpu/code_block.h"
#include "cpu/codes.h"
#include "cpu/update.h"

namespace prodigy::cpu {

// As UpdateBlock. Whatever does not have samples only of some elements has delta in the place of x0.
template <bool kMomentum, Sampled kSampled>
struct UpdateCodedBlock {
  using C = Coefficients<float>;
  static constexpr bool kAll = kSampled == Sampled::kAll;

  struct Numbers {
    BlockOf<float> m, root, s, delta;
  };
  struct Sizes {
    Largest<kLanes> m, root, s;
  };

  // What is new before anything is rounded. i: of the block of codes.
  static PRODIGY_INLINE void element(float grad, float x, int i, int lane, const C& c, Numbers& numbers, Sizes& sizes,
                                     LaneSums<float>& sums) {
    const float g = gradient(grad, x, c);
    if constexpr (kAll) {
      sums.add(lane, sample(g, -numbers.delta[i], numbers.s[i], c));
      sizes.s.add(lane, numbers.s[i]);
    }
    float m = kMomentum ? numbers.m[i] : 0.0f, v = numbers.root[i] * numbers.root[i];
    moments(g, m, v, c);
    numbers.root[i] = ExactRoots::root(v);
    sizes.root.add(lane, numbers.root[i]);
    if constexpr (kMomentum) {
      numbers.m[i] = m;
      sizes.m.add(lane, m);
    }
  }

  static PRODIGY_INLINE void elements(const float* __restrict grad, const float* __restrict x, int n, const C& c,
                                      Numbers& numbers, Sizes& sizes, LaneSums<float>& sums) {
    int i = 0;
    for (; i + kLanes <= n; i += kLanes) {
      PRODIGY_VECTORIZE
      for (int lane = 0; lane < kLanes; ++lane) {
        element(grad[i + lane], x[i + lane], i + lane, lane, c, numbers, sizes, sums);
      }
    }
    for (int lane = 0; i < n; ++i, ++lane) element(grad[i], x[i], i, lane, c, numbers, sizes, sums);
  }

  static PRODIGY_INLINE void codes(const Arrays<float, float>& a, const Tensor& t, std::int64_t begin, int at, int n,
                                   std::uint8_t* scale, const C& c, LaneSums<float>& sums) {
    Numbers numbers;
    Sizes sizes;
    begin += at;
    if constexpr (kMomentum) decode<Code::kM>(t.m, begin, n, scale, numbers.m.of);
    decode<Code::kRoot>(t.v, begin, n, scale, numbers.root.of);
    if constexpr (kAll) {
      decode<Code::kS>(t.s, begin, n, scale, numbers.s.of);
      decode<Code::kDelta>(t.moved, begin, n, scale, numbers.delta.of);
    }
    elements(a.grad + at, a.x + at, n, c, numbers, sizes, sums);
    const std::uint32_t* bits = a.random + at;
    if constexpr (kAll) encode<Code::kS>(numbers.s.of, n, sizes.s.of_all(), bits, t.s, begin, scale);
    encode<Code::kRoot>(numbers.root.of, n, sizes.root.of_all(), bits, t.v, begin, scale);
    if constexpr (!kMomentum) return;
    encode<Code::kM>(numbers.m.of, n, sizes.m.of_all(), bits, t.m, begin, scale);
    float* __restrict x = a.x + at;
    PRODIGY_VECTORIZE
    for (int i = 0; i < n; ++i) x[i] = step<KeptRoots>(x[i], x[i], numbers.m[i], numbers.root[i], c);
  }

  static PRODIGY_INLINE Sums<double> run(Arrays<float, float> a, const Tensor* t, std::int64_t begin, int n,
                                         Samples samples, C c) {
    c.momentum = kMomentum;  // now the compiler knows
    LaneSums<float> sums;
    using Sampler = UpdateBlock<float, float, kMomentum, Beside::kNothing, kSampled>;
    if (kSampled == Sampled::kPacked) Sampler::packed(a, samples, t->slice_p, c, sums);
    if (kSampled == Sampled::kStrided) Sampler::strided(a, *t, begin, n, c, sums);
    each_code_block(*t, begin, n, [&](int at, int size, std::uint8_t* scale) {
      codes(a, *t, begin, at, size, scale, c, sums);
    });
    return sums.total();
  }
};

}  // namespace prodigy::cpu
