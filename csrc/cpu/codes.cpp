#include "cpu/codes.h"

#include <algorithm>

#include "cpu/code_block.h"

namespace prodigy::cpu {
namespace {

template <Code kCode>
struct Decode {
  static PRODIGY_INLINE void block(const void* codes, const Tensor& t, std::int64_t begin, int n,
                                   float* __restrict to) {
    Words words;
    widen_codes<kCode>(codes, begin, n, words);
    const Scale<kCode> scale(scale_at(t, begin));
    PRODIGY_VECTORIZE
    for (int i = 0; i < n; ++i) to[i] = scale.number(words[i]);
  }
  static PRODIGY_INLINE void run(const void* codes, const Tensor* t, std::int64_t begin, int n, float* to) {
    for (int at = 0; at < n; at += kCodeBlock) block(codes, *t, begin + at, std::min(kCodeBlock, n - at), to + at);
  }
};

struct Move {
  static PRODIGY_INLINE void block(const Tensor& t, std::int64_t begin, int n, const float* __restrict before,
                                   const float* __restrict x, const std::uint32_t* __restrict bits) {
    Words words;
    Floats delta;
    std::uint8_t* bytes = scale_at(t, begin);
    widen_codes<Code::kDelta>(t.moved, begin, n, words);
    const Scale<Code::kDelta> old(bytes);
    PRODIGY_VECTORIZE
    for (int i = 0; i < n; ++i) delta[i] = old.number(words[i]) + finite_or_zero(x[i] - before[i]);
    store_codes<Code::kDelta>(delta, n, bits, t.moved, begin, bytes);
  }
  static PRODIGY_INLINE void run(const Tensor* t, std::int64_t begin, int n, const float* before, const float* x,
                                 const std::uint32_t* bits) {
    for (int at = 0; at < n; at += kCodeBlock) {
      block(*t, begin + at, std::min(kCodeBlock, n - at), before + at, x + at, bits + at);
    }
  }
};

}  // namespace

void m_run(const Tensor& t, std::int64_t begin, int n, float* to) { run<Decode<Code::kM>>(t.m, &t, begin, n, to); }

void root_run(const Tensor& t, std::int64_t begin, int n, float* to) {
  run<Decode<Code::kRoot>>(t.v, &t, begin, n, to);
}

void move_run(const Tensor& t, std::int64_t begin, int n, const float* before, const float* x,
              const std::uint32_t* bits) {
  run<Move>(&t, begin, n, before, x, bits);
}

}  // namespace prodigy::cpu
