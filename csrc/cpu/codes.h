// Codes of 8 bits, a run of elements at a time: Note [8 bits] of prodigy_fused/eight_bits.py.
#pragma once

#include "cpu/vector.h"
#include "prodigy/eight_bits.h"
#include "prodigy/rule.h"
#include "prodigy/table.h"

namespace prodigy::cpu {

template <class X, class S>
struct Arrays;

// For the rule, where the root of v takes the place of v.
struct KeptRoots : ExactRoots {
  template <class T>
  static PRODIGY_INLINE T root(T kept) {
    return kept;
  }
};

// The functions, for vectors of kLanes floats: each for one instruction set, which all of a file is compiled for. All
// begin where a block of codes does.
template <int kLanes>
struct CodeRuns {
  // The numbers of m, and the roots of v, of n elements from `begin` on.
  static void m(const Tensor& t, std::int64_t begin, int n, float* to);
  static void root(const Tensor& t, std::int64_t begin, int n, float* to);
  // delta grows by what the stored x has changed, from `before` to `x`; bits: of the elements.
  static void move(const Tensor& t, std::int64_t begin, int n, const float* before, const float* x,
                   const std::uint32_t* bits);
  // Phase 1, but for samples that are not of all elements: new codes; x takes its step. Returns the sums. If x is a
  // copy, a delta is left to `move`.
  static Sums<double> update(const Tensor& t, std::int64_t begin, int n, const Arrays<float, float>& a,
                             const Coefficients<float>& c);
};

#if defined(__GNUC__)
constexpr int kBaselineLanes = 4;
#else
constexpr int kBaselineLanes = 1;
#endif

// Calls run(CodeRuns<...>()) for the instruction set of the kernels.
template <class Run>
auto run_codes(Run run) {
#ifdef PRODIGY_HAS_CLONES
  if (instruction_set() == InstructionSet::kV4) return run(CodeRuns<16>());
  if (instruction_set() == InstructionSet::kV3) return run(CodeRuns<8>());
#endif
  return run(CodeRuns<kBaselineLanes>());
}

}  // namespace prodigy::cpu
