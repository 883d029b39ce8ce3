// The sums of a block.
#pragma once

#include "prodigy/rule.h"

namespace prodigy::cpu {

// Sums are gathered in kSumLanes independent accumulators, so that the compiler can use vector registers, and passed on
// in float64 after every block, so that float32 does not have to hold a long sum.
constexpr int kSumLanes = 16;
template <class T>
struct LaneSums {
  T dot[kSumLanes] = {}, norm[kSumLanes] = {};

  PRODIGY_INLINE void add(int lane, const Sums<T>& term) {
    dot[lane] += term.dot;
    norm[lane] += term.norm;
  }
  PRODIGY_INLINE Sums<double> total() const {
    Sums<double> sums{0.0, 0.0};
    for (int lane = 0; lane < kSumLanes; ++lane) {
      sums.dot += double(dot[lane]);
      sums.norm += double(norm[lane]);
    }
    return sums;
  }
};

}  // namespace prodigy::cpu
