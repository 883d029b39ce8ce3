// Reductions over a block of codes, of vectors F and the floats that are left over at its end.
#pragma once

#include "cpu/lanes.h"

namespace prodigy::cpu {

// The largest of sizes, as bits.
template <class F>
struct Largest {
  WordOf<F> each = 0u;
  std::uint32_t left_over = 0u;

  PRODIGY_INLINE void take(F size) { each = larger(each, word_of(size)); }
  template <class One, class = std::enable_if_t<!std::is_same_v<One, F>>>
  PRODIGY_INLINE void take(One size) {
    left_over = larger(left_over, word_of(size));
  }
  PRODIGY_INLINE std::uint32_t size() const {
    std::uint32_t words[kLanesOf<F>], largest = left_over;
    store_as(each, words);
    for (const std::uint32_t word : words) largest = larger(largest, word);
    return largest;
  }
};

// The sums of the lanes of a block. Those of the elements that are left over have memory of their own, and nothing else
// has, or it would not stay in registers.
template <class F>
struct VectorSums {
  static constexpr int kVectors = kSumLanes / kLanesOf<F>;
  F dot[kVectors], norm[kVectors];

  PRODIGY_INLINE VectorSums() {
    for (int k = 0; k < kVectors; ++k) dot[k] = norm[k] = F(0.0f);
  }
  PRODIGY_INLINE void add(int lane, const Sums<F>& term, LaneSums<float>&) {
    F &dots = dot[lane / kLanesOf<F>], &norms = norm[lane / kLanesOf<F>];
    dots = dots + term.dot;
    norms = norms + term.norm;
  }
  template <class One, class = std::enable_if_t<!std::is_same_v<One, F>>>
  PRODIGY_INLINE void add(int lane, const Sums<One>& term, LaneSums<float>& left_over) {
    left_over.add(lane, term);
  }
  PRODIGY_INLINE Sums<double> total(const LaneSums<float>& left_over) const {
    LaneSums<float> lanes;
    for (int k = 0; k < kVectors; ++k) {
      store_as(dot[k], lanes.dot + k * kLanesOf<F>);
      store_as(norm[k], lanes.norm + k * kLanesOf<F>);
    }
    for (int lane = 0; lane < kSumLanes; ++lane) lanes.add(lane, {left_over.dot[lane], left_over.norm[lane]});
    return lanes.total();
  }
};

}  // namespace prodigy::cpu
