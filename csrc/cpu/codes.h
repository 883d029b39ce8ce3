// Runs of codes of 8 bits, to and from float32: Note [8 bits] of prodigy_fused/eight_bits.py.
#pragma once

#include "prodigy/eight_bits.h"
#include "prodigy/table.h"

namespace prodigy::cpu {

// For the rule, where the root of v takes the place of v.
struct KeptRoots : ExactRoots {
  template <class T>
  static PRODIGY_INLINE T root(T kept) {
    return kept;
  }
};

// The numbers of m, and the roots of v, of n elements from `begin` on, where a block begins.
void m_run(const Tensor& t, std::int64_t begin, int n, float* to);
void root_run(const Tensor& t, std::int64_t begin, int n, float* to);

// delta grows by what the stored x has changed, from `before` to `x`; bits: of the elements.
void move_run(const Tensor& t, std::int64_t begin, int n, const float* before, const float* x,
              const std::uint32_t* bits);

}  // namespace prodigy::cpu
