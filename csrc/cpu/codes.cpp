#include "cpu/codes.h"

#include "cpu/code_block.h"

namespace prodigy::cpu {
namespace {

template <Code kCode>
struct Decode {
  static PRODIGY_INLINE void run(const void* codes, const Tensor* t, std::int64_t begin, int n, float* to) {
    each_code_block(*t, begin, n, [&](int at, int size, const std::uint8_t* scale) {
      decode<kCode>(codes, begin + at, size, scale, to + at);
    });
  }
};

struct Move {
  static PRODIGY_INLINE void run(const Tensor* t, std::int64_t begin, int n, const float* __restrict before,
                                 const float* __restrict x, const std::uint32_t* bits) {
    each_code_block(*t, begin, n, [&](int at, int size, std::uint8_t* scale) {
      BlockOf<float> delta;
      decode<Code::kDelta>(t->moved, begin + at, size, scale, delta.of);
      Largest<1> largest;
      PRODIGY_VECTORIZE
      for (int i = 0; i < size; ++i) {
        delta[i] += finite_or_zero(x[at + i] - before[at + i]);
        largest.add(0, delta[i]);
      }
      encode<Code::kDelta>(delta.of, size, largest.of_all(), bits + at, t->moved, begin + at, scale);
    });
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
