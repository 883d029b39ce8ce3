// Prodigy's mathematics (docs/algorithm.md, Algorithm 4): the only place in C++ that knows it. No torch, no CUDA, no
// memory layout: numbers in registers in, numbers in registers out, for the CPU loop and for the CUDA kernels alike.
//
// Note [d is updated between the passes]
// Only `d_new * eps` in the last line of the algorithm needs the sums over all parameters. So `update` moves x with the
// old d while it gathers the sums, and `finish` adds the difference in the rare step in which d moved (`correct`).
//
// Note [Deferred steps]
// Some steps leave x to `finish`, which then takes the step with d_new (`step`):
// - the first one (k == 0): while all gradients are zero, x must stay bitwise unchanged;
// - those without momentum, where d_new is also a factor of the step;
// - those that `undo` could not invert accurately (beta3 == 0, or decay >= 0.5).
// `without_step` makes the step of `update` vanish for them, so that no kernel has to ask.
//
// Note [Infinite parameters]
// A mask may be -inf, with gradients that are always zero. It must stay so, and must not stop d: weight decay leaves
// alone what is not finite, and where the gradient is zero, x0 - x does not enter the sum.
#pragma once

#include <cmath>
#include <cstdint>

#include "prodigy/record.h"

namespace prodigy {

// dot: sum of <g, x0 - x>; norm: sum of |s|.
template <class T>
struct Sums {
  T dot, norm;
};

// The factors of one group in one step, in the precision T of the arithmetic.
template <class T>
struct Coefficients {
  T gradient_scale, l2;  // g = gradient_scale * grad + l2 * x
  T d, beta1, beta2, beta3;
  T one_minus_beta1, one_minus_beta2;
  T s_weight;
  T decay, dlr, d_eps;  // x -= decay * x + dlr * m / (sqrt(v) + d_eps)
  double dot_weight;    // of <g, x0 - x> in the sum over groups, which may differ in lr
  bool momentum, deferred;
  std::uint32_t k;  // for random bits
};

PRODIGY_INLINE double bias_correction(const Hyper& h, double k) {
  if (!h.use_bias_correction) return 1.0;
  return std::sqrt(1.0 - std::pow(h.beta2, k + 1.0)) / (1.0 - std::pow(h.beta1, k + 1.0));
}

// The factor of x in a step, rounded to the precision that the step uses. dlr: d * lr * bc.
template <class T>
PRODIGY_INLINE T decay_of(const Hyper& h, double dlr) {
  return T(h.decouple ? h.weight_decay * dlr : 0.0);
}

// Whether x waits for `finish`, see Note [Deferred steps].
template <class T>
PRODIGY_INLINE bool deferred(const Hyper& h, const EstimateOptions& options, const Estimate& old, T decay) {
  const bool hard_to_undo = options.beta3 == 0.0 || decay >= T(0.5);
  return !(h.beta1 > 0.0) || old.k == 0.0 || hard_to_undo;
}

// d_eps is computed from `d_new`, everything else from the old estimate. In `update`, where d_new is not known yet, d
// takes its place.
template <class T>
PRODIGY_INLINE Coefficients<T> coefficients(const Hyper& h, const EstimateOptions& options, const Estimate& old,
                                            double d_new, double grad_scale) {
  const double bc = bias_correction(h, old.k);
  const double dlr = old.d * h.lr * bc;
  Coefficients<T> c;
  c.gradient_scale = T((h.maximize ? -1.0 : 1.0) / grad_scale);
  c.l2 = T(h.decouple ? 0.0 : h.weight_decay);
  c.d = T(old.d);
  c.beta1 = T(h.beta1);
  c.beta2 = T(h.beta2);
  c.beta3 = T(options.beta3);
  c.one_minus_beta1 = T(1.0 - h.beta1);
  c.one_minus_beta2 = T(1.0 - h.beta2);
  c.s_weight = T(old.d / options.d0 * (h.safeguard_warmup ? old.d : dlr));
  c.decay = decay_of<T>(h, dlr);
  c.dlr = T(dlr);
  c.d_eps = T(d_new * h.eps);
  c.dot_weight = h.lr * bc;
  c.momentum = h.beta1 > 0.0;
  c.deferred = deferred(h, options, old, c.decay);
  c.k = std::uint32_t(std::int64_t(old.k));
  return c;
}

// The same for `update`, see Note [Deferred steps].
template <class T>
PRODIGY_INLINE Coefficients<T> without_step(Coefficients<T> c) {
  if (c.deferred) c.dlr = c.decay = T(0);
  return c;
}

// T and Number: float or double; or T is a vector of them.
template <class T>
PRODIGY_INLINE T select(bool condition, T a, T b) {
  return condition ? a : b;
}

// kFinite: that it is finite is known.
template <bool kFinite = false, class T>
PRODIGY_INLINE T finite_or_zero(T value) {
  using std::fabs;
  if constexpr (kFinite) return value;
  return select(fabs(value) < T(INFINITY), value, T(0));
}

// g: the gradient of the objective that is minimised, unscaled, with coupled weight decay. kL2: whether there may be
// any. kFinite: x is known to be finite.
template <bool kL2 = true, bool kFinite = false, class T, class Number>
PRODIGY_INLINE T gradient(T grad, T x, const Coefficients<Number>& c) {
  const T g = c.gradient_scale * grad;
  return kL2 ? g + c.l2 * finite_or_zero<kFinite>(x) : g;
}

// num and s, for the sampled positions. distance: x0 - x. Returns this element's part of the sums. A gradient that is
// not finite shows in the sums, which then leave the estimate alone, but does not enter the state. kFinite: g, and the
// distance, are known to be finite.
template <bool kFinite = false, class T, class Number>
PRODIGY_INLINE Sums<T> sample(T g, T distance, T& s, const Coefficients<Number>& c) {
  using std::fabs;
  s = c.beta3 * s + c.s_weight * finite_or_zero<kFinite>(g);
  return {kFinite ? g * distance : select(g == T(0), T(0), g * distance), fabs(s)};
}

// The same, added to `sums`: for a GPU, where an operation can depend on a condition, which saves 1.2 to 1.5 of 54
// instructions on sm_90. (A CPU's loop would have two more, or not be vectorised.)
template <bool kFinite = false, class T>
PRODIGY_INLINE void add_sample(T g, T distance, T& s, const Coefficients<T>& c, Sums<T>& sums) {
  s = c.beta3 * s + c.s_weight * finite_or_zero<kFinite>(g);
  if (kFinite || g != T(0)) sums.dot += g * distance;
  sums.norm += std::fabs(s);
}

// m and v: Adam's, of the gradient d * g.
template <bool kFinite = false, class T, class Number>
PRODIGY_INLINE void moments(T g, T& m, T& v, const Coefficients<Number>& c) {
  const T dg = c.d * finite_or_zero<kFinite>(g);
  m = c.momentum ? c.beta1 * m + c.one_minus_beta1 * dg : dg;
  v = c.beta2 * v + c.one_minus_beta2 * dg * dg;
}

// Note [Position]
// `at` is the stored quantity that a step updates: x itself, or delta = x - x0. `origin` is x - at: 0 or x0.

// Roots: how accurately the processor takes roots and quotients in the following functions. Exactly rounded ones:
struct ExactRoots {
  template <class T>
  static PRODIGY_INLINE T root(T value) {
    using std::sqrt;
    return sqrt(value);
  }
  template <class T>
  static PRODIGY_INLINE T quotient(T dividend, T divisor) {
    return dividend / divisor;
  }
};

// How far a step goes, in units of dlr.
template <class Roots, class T, class Number>
PRODIGY_INLINE T quotient(T m, T v, Number d_eps) {
  return Roots::quotient(m, Roots::root(v) + d_eps);
}

// The position after the step. kFinite: x is known to be finite.
template <class Roots = ExactRoots, bool kFinite = false, class T, class Number>
PRODIGY_INLINE T step(T at, T x, T m, T v, const Coefficients<Number>& c) {
  return at - (c.decay * finite_or_zero<kFinite>(x) + c.dlr * quotient<Roots>(m, v, c.d_eps));
}

// The same with the quotient given, for a GPU: as above, one instruction fewer. kDecays: whether c.decay is not 0.
template <bool kDecays, class T>
PRODIGY_INLINE T step_by(T quotient, T at, T x, const Coefficients<T>& c) {
  T change = c.dlr * quotient;
  if (kDecays && std::fabs(x) < T(INFINITY)) change = c.decay * x + change;
  return at - change;
}

// Replaces old_d*eps by d_new*eps in the step that `update` took.
template <class Roots = ExactRoots, class T>
PRODIGY_INLINE T correct(T at, T m, T v, T old_d_eps, const Coefficients<T>& c) {
  const T root = Roots::root(v);
  return at + c.dlr * (Roots::quotient(m, root + old_d_eps) - Roots::quotient(m, root + c.d_eps));
}

// Takes back, to within one rounding, the step of `update` where it turns out not to be a step. That can happen after
// the first step, too: if the only gradients are those of new parameters, or of positions that are not sampled.
template <class Roots = ExactRoots, class T>
PRODIGY_INLINE T undo(T at, T origin, T m, T v, const Coefficients<T>& c) {
  const T taken = c.dlr * quotient<Roots>(m, v, c.d_eps);
  return (at + c.decay * finite_or_zero(origin) + taken) / (T(1) - c.decay);
}

// The rule for d. False if this is not a step: no gradient has been non-zero yet, and d stays.
PRODIGY_INLINE bool advance(Estimate& e, const Sums<double>& sums, const EstimateOptions& options) {
  if (options.frozen) {  // there are no sums
    e.k += 1.0;
    return true;
  }
  if (sums.norm == 0.0) {
    e.nonfinite_steps += !std::isfinite(sums.dot);  // non-finite entries count as zero in the norm
    return false;
  }
  const double d = e.d;
  const double numerator = options.beta3 * e.d_numerator + d / options.d0 * d * sums.dot;
  const double d_hat = options.d_coef * numerator / sums.norm;
  e.k += 1.0;
  if (!std::isfinite(d_hat) || !std::isfinite(sums.norm)) {
    e.nonfinite_steps += 1.0;
    return true;
  }
  e.d_hat = d_hat;
  e.d_numerator = numerator;
  e.d_denom = sums.norm;
  if (d_hat > e.d_max) e.d_max = d_hat;
  const double reached = d == options.d0 && d_hat > d ? d_hat : d;
  const double grown = reached * options.growth_rate;
  const double bound = options.d_limit < e.d_max ? options.d_limit : e.d_max;
  e.d = grown < bound ? grown : bound;
  e.corrections += e.d != d;
  return true;
}

// An estimate before and after a step.
struct Progress {
  Estimate old, now;
  bool stepped;  // as `advance` returned it

  Progress() = default;
  PRODIGY_INLINE Progress(const Estimate& before, const Sums<double>& sums, const EstimateOptions& options)
      : old(before), now(before), stepped(advance(now, sums, options)) {}
};

// The change that `finish` makes to x.
enum class Finish { kNothing, kStep, kCorrect, kUndo };

PRODIGY_INLINE Finish finish_of(bool deferred, bool stepped, bool d_moved) {
  if (deferred) return stepped ? Finish::kStep : Finish::kNothing;
  if (!stepped) return Finish::kUndo;
  return d_moved ? Finish::kCorrect : Finish::kNothing;
}

// What all elements of one group have in common in a phase of a step.
template <class T>
struct GroupRow {
  Coefficients<T> c;
  T old_d_eps, d_new;  // of `finish`
  Finish how;          // of `finish`
  bool active;         // else the phase leaves the elements alone
};

template <class T>
PRODIGY_INLINE GroupRow<T> update_row(const Hyper& h, const EstimateOptions& options, const Estimate& old,
                                      double grad_scale) {
  const auto c = without_step(coefficients<T>(h, options, old, old.d, grad_scale));
  return {c, T(0), T(0), Finish::kNothing, h.lr > 0.0};
}

template <class T>
PRODIGY_INLINE GroupRow<T> finish_row(const Hyper& h, const EstimateOptions& options, const Progress& progress,
                                      double grad_scale) {
  const Estimate &old = progress.old, &now = progress.now;
  const auto c = coefficients<T>(h, options, old, now.d, grad_scale);
  const Finish how = finish_of(c.deferred, progress.stepped, now.d != old.d);
  return {c, T(old.d * h.eps), T(now.d), how, h.lr > 0.0 && how != Finish::kNothing};
}

// A compensated sum: TwoSum (Knuth, The Art of Computer Programming 2, 4.2.2) gives the rounding error of each
// addition, and the errors are added up as well (Sum2 of Ogita, Rump and Oishi, "Accurate sum and dot product", 2005).
//
// The total depends on the order of the terms only in its last bit, and rarely: before its own rounding it is off by at
// most about n^2 * 2^-53 units in the last place for n terms of one sign (ibid., Proposition 4.5), typically by about
// n * 2^-53, and two orders differ only if a point where rounding changes lies within that. For 8 terms, that is about
// once in 2^50 sums.
struct Accumulator {
  double sum = 0.0, error = 0.0;

  PRODIGY_INLINE void add(double term) {
    const double next = sum + term;
    const double part = next - sum;
    error += (sum - (next - part)) + (term - part);
    sum = next;
  }
  PRODIGY_INLINE double total() const { return sum + error; }
};

}  // namespace prodigy
