// Phase 2 for one block.
#pragma once

#include "cpu/block.h"
#include "cpu/vector.h"

namespace prodigy::cpu {

// Roots: of the numbers in v.
template <class T, class Roots = ExactRoots>
struct FinishBlock {
  // at = rule(i, at, origin) for all positions, see Note [Position].
  template <class Rule>
  static PRODIGY_INLINE void each_position(const Arrays<T, T>& a, int n, Rule rule) {
    if (a.delta != nullptr) {
      PRODIGY_VECTORIZE
      for (int i = 0; i < n; ++i) a.delta[i] = rule(i, a.delta[i], a.x0[i]);
    } else {
      PRODIGY_VECTORIZE
      for (int i = 0; i < n; ++i) a.x[i] = rule(i, a.x[i], T(0));
    }
  }

  static PRODIGY_INLINE void run(Arrays<T, T> a, int n, GroupRow<T> group) {
    const Coefficients<T>& c = group.c;
    if (group.how == Finish::kCorrect) {
      each_position(a, n, [&](int i, T at, T) { return correct<Roots>(at, a.m[i], a.v[i], group.old_d_eps, c); });
    } else if (group.how == Finish::kUndo) {
      each_position(a, n, [&](int i, T at, T origin) { return undo<Roots>(at, origin, a.m[i], a.v[i], c); });
    } else if (c.momentum) {
      each_position(a, n, [&](int i, T at, T) { return step<Roots>(at, a.x[i], a.m[i], a.v[i], c); });
    } else {
      each_position(a, n, [&](int i, T at, T) {
        return step<Roots>(at, a.x[i], group.d_new * finite_or_zero(gradient(a.grad[i], a.x[i], c)), a.v[i], c);
      });
    }
  }
};

}  // namespace prodigy::cpu
