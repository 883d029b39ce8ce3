// Rounding as csrc/prodigy/rounding.h does it, bit by bit but for those of a NaN, in the instructions of a GPU.
#pragma once

#include "cuda/intrinsics.cuh"
#include "prodigy/eight_bits.h"
#include "prodigy/rounding.h"

namespace prodigy::cuda {

// The bits of a result, to which up to 0xffff may be added. A NaN is positive then, with all bits set on a GPU: it
// would overflow.
__device__ __forceinline__ std::uint32_t addable(float value) {
  const std::int32_t bits = bits_as<std::int32_t>(value);
  return std::uint32_t(bits < 0x7fff0000 ? bits : 0x7fff0000);
}

// In the upper half.
__device__ __forceinline__ std::uint32_t stochastic_bfloat16_above(float value, std::uint32_t random) {
  return addable(value) + (random >> 16);
}

// As a float32: infinity may still be a finite number, which is rounded to it.
__device__ __forceinline__ float stochastic_float16(float value, std::uint32_t random) {
  const std::uint32_t bits = addable(value);
  const float normal = bits_as<float>((bits + (random >> 19)) & 0xffffe000u);
  const float units = whole_above(before_whole(std::fabs(value) * 0x1p24f, random)) * 0x1p-24f - kWhole * 0x1p-24f;
  return std::fabs(value) < 0x1p-14f ? std::copysign(units, value) : normal;
}

struct Nearest {
  template <Type kType>
  __device__ __forceinline__ std::uint32_t pair(float low, float high, int) const {
    return nearest_pair<kType>(low, high);
  }
};

// Which values of an element are rounded stochastically: each has bits of its own.
enum class Rounded { kX, kV, kS };

// run: of the pack, see RandomBits.
template <Rounded kWhich>
struct Stochastic {
  std::uint32_t run;

  __device__ __forceinline__ std::uint32_t bits(int e) const {
    const std::uint32_t bits = run * power(e);
    return kWhich == Rounded::kX ? bits : kWhich == Rounded::kV ? second(bits) : third(bits);
  }
  template <Type kType>
  __device__ __forceinline__ std::uint32_t pair(float low, float high, int e) const {
    if constexpr (kType == Type::kBFloat16) {
      return __byte_perm(stochastic_bfloat16_above(low, bits(e)), stochastic_bfloat16_above(high, bits(e + 1)), 0x7632);
    } else {
      return nearest_pair<kType>(stochastic_float16(low, bits(e)), stochastic_float16(high, bits(e + 1)));
    }
  }
};

// -- 24 bits ---------------------------------------------------------------------------------------------------------

// byte_counts() of a bfloat16 in the upper half of a word, whatever is in the lower one.
__device__ __forceinline__ bool byte_counts_beside(std::uint32_t word) { return word + word - 0x20000u < 0xfefe0000u; }

// kept_value() of a widened bfloat16 and one of four bytes.
__device__ __forceinline__ float kept(float x, std::uint32_t bytes, int which) {
  const bool counts = (x != 0.0f) & (std::fabs(x) < INFINITY);  // not &&, which are branches
  return bits_as<float>(bits_as<std::uint32_t>(x) + (counts ? byte_above(bytes, which) : 0u));
}

// stochastic_24(): the bfloat16 in the upper half of `x`, and the byte, the second lowest of `low`.
struct KeptWords {
  std::uint32_t x, low;

  __device__ __forceinline__ KeptWords(float value, std::uint32_t random) {
    const std::uint32_t word = addable(value) + (random >> 24);
    x = word + 0x8000u;
    low = byte_counts_beside(x) ? word : 0u;  // its byte is that of the difference: the upper half has none
  }
};

}  // namespace prodigy::cuda
