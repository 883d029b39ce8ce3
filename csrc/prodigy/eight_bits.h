// State in 8 bits: Note [8 bits] of prodigy_fused/eight_bits.py, whose numbers these are. With integers, and operations
// that are rounded exactly, so that codes are the same everywhere.
//
// F: float, or a vector of floats that has the same functions.
#pragma once

#include <cmath>
#include <cstdint>

#include "prodigy/rounding.h"

namespace prodigy {

// Elements that share a word of scale: a byte for each Code, in this order.
constexpr int kCodeBlock = 256;
enum class Code { kM, kRoot, kS, kDelta };
constexpr int kCodes = 4;

PRODIGY_INLINE std::uint32_t word_of(float value) { return bits_as<std::uint32_t>(value); }
PRODIGY_INLINE float float_of(std::uint32_t word) { return bits_as<float>(word); }
// Of a word that is a whole number with a sign.
PRODIGY_INLINE float whole_float(std::uint32_t word) { return float(std::int32_t(word)); }
PRODIGY_INLINE std::uint32_t larger(std::uint32_t a, std::uint32_t b) { return a > b ? a : b; }
PRODIGY_INLINE float lesser(float a, float b) { return std::fmin(a, b); }
// a * factor + b, where the product is exact: so it does not matter whether it is rounded before the sum.
PRODIGY_INLINE float product_plus(float a, float factor, float b) { return a * factor + b; }

template <class F>
using WordOf = decltype(word_of(F()));

// A row of the table in Note [8 bits].
struct CodeRow {
  // As bits of float32: the number of the largest code; and the largest size that a number may have.
  std::uint32_t largest, largest_size;
  std::int32_t bias, least_byte;  // byte b is a unit of 2^(b - bias)
};

// The sizes of the largest numbers, and the least byte, are such that sums with much larger numbers, and the
// differences of much smaller ones, are normal numbers.
constexpr CodeRow kCodeRows[kCodes] = {
    {0x43e00000u, 0x74e00000u, 126, 7},  // m: up to 448 units
    {0x437f0000u, 0x5f7f0000u, 74, 0},   // the root of v: 255
    {0x437c0000u, 0x7efc0000u, 126, 0},  // s: 252
    {0x42fe0000u, 0x7e7e0000u, 126, 0},  // x - x0: 127
};

// What blocks of a code have in common.
template <Code kCode>
struct CodeTraits {
  static constexpr CodeRow kRow = kCodeRows[int(kCode)];
  static constexpr std::uint32_t kLargest = kRow.largest, kLargestSize = kRow.largest_size;
  static constexpr std::int32_t kBias = kRow.bias, kLeastByte = kRow.least_byte;
  static constexpr bool kRoot = kCode == Code::kRoot;

  // The nearest number of a size that is allowed.
  static PRODIGY_INLINE float limited(float value) {
    const std::uint32_t bits = word_of(value), size = bits & ~kSign;
    return float_of((size < kLargestSize ? size : kLargestSize) | (bits & kSign));
  }
  // The byte of a block, from the largest size in it.
  static PRODIGY_INLINE std::int32_t byte(std::uint32_t largest) {
    constexpr std::uint32_t kMantissa = 0x7fffffu, kCarry = kMantissa - (kLargest & kMantissa);
    const std::int32_t byte = std::int32_t((largest + kCarry) >> 23) - (std::int32_t(kLargest >> 23) - kBias);
    return byte > kLeastByte ? byte : kLeastByte;
  }
  static PRODIGY_INLINE float unit(std::int32_t byte) {
    return float_of(std::uint32_t((byte > kLeastByte ? byte : kLeastByte) - kBias + 127) << 23);
  }
};

// -- floating point of 8 bits -----------------------------------------------------------------------------------------

// kMantissa: bits; kNormal: the exponent of the smallest normal number of units.
template <int kMantissa, int kNormal>
struct SmallFloat {
  static constexpr int kPlace = 23 - kMantissa;
  static constexpr std::uint32_t kOne = 1u << 23;

  static PRODIGY_INLINE std::uint32_t smallest_normal(float unit) {
    return word_of(unit) + std::uint32_t(kNormal) * kOne;
  }
  // The number of a code, a byte with its sign extended.
  template <class F>
  static PRODIGY_INLINE F number(WordOf<F> code, float unit) {
    // Half of the number if it is normal; of a subnormal one, the smallest normal number is still to be taken away from
    // twice this.
    const WordOf<F> normal = smallest_normal(unit), one = kOne;
    const WordOf<F> half = (code << kPlace & WordOf<F>(0x7fu << kPlace)) + (normal - one);
    const F size = float_of(half + one) - float_of(larger(half, normal));
    return float_of(word_of(size) | (code & WordOf<F>(kSign)));
  }
};
using E4M3 = SmallFloat<3, -6>;
using E2M5 = SmallFloat<5, 5>;

// -- fixed point ------------------------------------------------------------------------------------------------------

// A number in steps of its code: the lowest kPlaces bits are the fraction. They are the mantissa of a sum with a power
// of two. Random bits that are added carry into the steps with the probability that the fraction is; and since sums
// with `kHigh` units are in the right place, nothing has to be scaled.
template <Code kCode>
struct Fixed {
  static constexpr int kPlaces = kCode == Code::kS ? 16 : 15;
  static constexpr std::uint32_t kFraction = (1u << kPlaces) - 1;
  // The steps of negative numbers are the lower half of 256.
  static constexpr float kHigh = kCode == Code::kRoot ? 256.0f : kCode == Code::kS ? 128.0f : 384.0f;

  // Of s: a size.
  template <class F>
  static PRODIGY_INLINE WordOf<F> of(F value, float unit) {
    F sum = value + F(kHigh * unit);
    if constexpr (kCode == Code::kS) {
      // From 64 units on the steps are twice as long, from 128 on once more.
      sum = lesser(sum, product_plus(value, 0.5f, F(160.0f * unit)));
      sum = lesser(sum, product_plus(value, 0.25f, F(192.0f * unit)));
    }
    return word_of(sum);
  }
};

// The steps of a root, or of delta. bits: random ones of the element; of delta, third() of them.
template <Code kCode, class F>
PRODIGY_INLINE WordOf<F> steps_of(F value, float unit, WordOf<F> bits) {
  using Steps = Fixed<kCode>;
  return Steps::of(value, unit) + ((bits ^ bits >> 16) & WordOf<F>(Steps::kFraction));
}
// Of a size of s. bits: third() of the element's.
template <class F>
PRODIGY_INLINE WordOf<F> steps_of_s(F size, float unit, WordOf<F> bits) {
  return Fixed<Code::kS>::of(size, unit) + (bits >> 16);
}

// -- codes and numbers ------------------------------------------------------------------------------------------------

// The number of a code, a byte with its sign extended; of a root, without. unit: of its block.
template <Code kCode, class F>
PRODIGY_INLINE F decoded(WordOf<F> code, float unit) {
  if constexpr (kCode == Code::kM) return E4M3::number<F>(code, unit);
  if constexpr (kCode == Code::kS) return E2M5::number<F>(code, unit);
  return whole_float(code) * F(unit);
}

// A code, in the lower 8 bits, and its number.
template <class F>
struct Coded {
  WordOf<F> code;
  F number;
};

// Of m, to nearest, ties to even. The size of a number that is encoded is at most kLargestSize.
template <class F>
PRODIGY_INLINE Coded<F> coded_m(F value, float unit) {
  using W = WordOf<F>;
  const std::uint32_t normal = E4M3::smallest_normal(unit);
  const W at_least = larger(word_of(value) & W(kInfinity), W(normal));
  // The last place of a sum with 2^20 times that power of two is the one that e4m3 has. The lower 8 bits of the sum are
  // more than so many places by what the exponent, in e4m3's place, lacks, modulo 256.
  const F high = float_of(at_least + W((20u << 23) + (0u - (normal >> 20)) % 256u));
  const F sum = float_of(word_of(value) & W(~kSign)) + high;
  return {(word_of(sum) + (at_least >> 20)) | (word_of(value) >> 24 & W(0x80u)),
          float_of(word_of(sum - high) | (word_of(value) & W(kSign)))};
}

// Of a root. bits: random ones of the element.
template <class F>
PRODIGY_INLINE Coded<F> coded_root(F root, float unit, WordOf<F> bits) {
  using Steps = Fixed<Code::kRoot>;
  using W = WordOf<F>;
  const F zero = F(Steps::kHigh * unit), one = F((Steps::kHigh + 1.0f) * unit);
  const W rounded = steps_of<Code::kRoot>(root, unit, bits);
  const W steps = select(root > F(0.0f), larger(rounded, word_of(one)), rounded);
  return {steps >> Steps::kPlaces, float_of(steps & W(~Steps::kFraction)) - zero};
}

// Of s, and of delta. bits: third() of the element's.
template <class F>
PRODIGY_INLINE WordOf<F> coded_s(F s, float unit, WordOf<F> bits) {
  using Steps = Fixed<Code::kS>;
  using W = WordOf<F>;
  const W steps = steps_of_s(float_of(word_of(s) & W(~kSign)), unit, bits);
  return (steps >> Steps::kPlaces & W(0x7fu)) | (word_of(s) >> 24 & W(0x80u));
}
template <class F>
PRODIGY_INLINE WordOf<F> coded_delta(F delta, float unit, WordOf<F> bits) {
  return steps_of<Code::kDelta>(delta, unit, bits) >> Fixed<Code::kDelta>::kPlaces ^ WordOf<F>(0x80u);
}

}  // namespace prodigy
