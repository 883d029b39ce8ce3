// bfloat16 and float16 to float32, and back by rounding to nearest or stochastically: the rule sees only float32.
// Written so that loops over it vectorise, and with integers, so that it gives the same bits everywhere.
//
// prodigy_fused/low_precision.py says which tensors are rounded how, prodigy_fused/rounding.py with which random bits.
#pragma once

#include <cstdint>
#include <cstring>

#include "prodigy/rule.h"
#include "prodigy/type.h"

namespace prodigy {

template <class To, class From>
PRODIGY_INLINE To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(To));
  return to;
}

// -- random bits -----------------------------------------------------------------------------------------------------

constexpr std::uint32_t kSeed = 0x9E3779B9u;
// Separate streams for a step and for a later change, by `finish`, to an x that has taken its step.
enum Stream : std::uint32_t { kStepStream, kCorrectionStream };

PRODIGY_INLINE Stream stream_of(Finish how) { return how == Finish::kStep ? kStepStream : kCorrectionStream; }

// The hash "lowbias32" by Chris Wellons (https://nullprogram.com/blog/2018/07/31/).
constexpr std::uint32_t kFactor1 = 0x7feb352du, kFactor2 = 0x846ca68bu;

PRODIGY_INLINE std::uint32_t mix(std::uint32_t h) {
  h = (h ^ h >> 16) * kFactor1;
  h = (h ^ h >> 15) * kFactor2;
  return h ^ h >> 16;
}

// Of a multiplicative generator (Steele and Vigna, "Computationally easy, spectrally good multipliers for congruential
// pseudorandom number generators", 2021).
constexpr std::uint32_t kFactor = 0xadb4a92du;
// Elements that share a hash, and those that share a RandomBits: numbers of them that begin at a multiple.
constexpr int kEight = 8;
constexpr std::int64_t kSameBits = std::int64_t(kEight) << 32;

// kFactor to the power 1 + e, for 0 <= e < kEight.
PRODIGY_INLINE constexpr std::uint32_t power(std::uint32_t e) {
  constexpr std::uint32_t k2 = kFactor * kFactor, k4 = k2 * k2;
  return kFactor * (e & 1 ? kFactor : 1u) * (e & 2 ? k2 : 1u) * (e & 4 ? k4 : 1u);
}

// kFactor to the power e, the number of elements that are skipped.
PRODIGY_INLINE constexpr std::uint32_t skip(std::uint32_t e) { return e == 0 ? 1u : power(e - 1); }

// See Note [Random bits] of prodigy_fused/rounding.py. The part that the elements of a run have in common.
struct RandomBits {
  std::uint32_t a, b;

  // begin: one of the elements.
  PRODIGY_INLINE RandomBits(std::uint32_t step, std::uint32_t tensor, Stream stream, std::int64_t begin) {
    const std::uint32_t word = 2 * std::uint32_t(begin >> 35) + stream;
    a = mix(mix(mix(kSeed + step) + tensor) + word);
    b = mix(mix(mix(~kSeed + tensor) + word) + step);
  }
  // What the elements at positions 8 * eight to 8 * eight + 7 share; eight: the low 32 bits. lowbias32 with `b` added
  // between its two rounds.
  PRODIGY_INLINE std::uint32_t shared(std::uint32_t eight) const {
    std::uint32_t h = eight ^ a;
    h = (h ^ h >> 16) * kFactor1;
    h = ((h ^ h >> 15) + b) * kFactor2;
    return h ^ h >> 16;
  }
  PRODIGY_INLINE std::uint32_t of(std::int64_t position) const {
    return shared(std::uint32_t(position >> 3)) * power(std::uint32_t(position) % kEight);
  }
  // For a run of elements up to the next multiple of 8: of(begin + e) is run(begin) * power(e).
  PRODIGY_INLINE std::uint32_t run(std::int64_t begin) const {
    return shared(std::uint32_t(begin >> 3)) * skip(std::uint32_t(begin) % kEight);
  }
};

// Random bits for a second value of the same element (v, next to x): the halves, the lower one improved by the upper
// one, exchanged.
PRODIGY_INLINE std::uint32_t second(std::uint32_t bits) {
  bits ^= bits >> 16;
  return bits << 16 | bits >> 16;
}
// second(bits) >> 16, in fewer operations.
PRODIGY_INLINE std::uint32_t upper_half_of_second(std::uint32_t bits) { return (bits ^ bits >> 16) & 0xffffu; }
// For a third value (s).
PRODIGY_INLINE std::uint32_t third(std::uint32_t bits) { return bits * power(kEight - 1); }

// -- bfloat16 and float16, as bits -----------------------------------------------------------------------------------

// Bits of float32.
constexpr std::uint32_t kSign = 0x80000000u, kInfinity = 0x7f800000u, kQuietNaN = 0x7fc00000u;
constexpr std::uint32_t kOneHalf = 126u << 23;
// Of 2^-14, the smallest normal float16, and of 2^16, where float16 overflows.
constexpr std::uint32_t kHalfNormal = 113u << 23, kHalfInfinity = 143u << 23;
// The difference of the exponents' biases, 127 - 15, in the place of float32's exponent.
constexpr std::uint32_t kRebias = 112u << 23;
// Of float16, without the sign.
constexpr std::uint32_t kHalfNaN = 0x7e00u, kHalfInf = 0x7c00u;

// float16: after Fabian Giesen's half_to_float_fast4 (https://gist.github.com/rygorous/2144712), without its branches.
template <Type kType>
PRODIGY_INLINE float widen(std::uint16_t stored) {
  if constexpr (kType == Type::kBFloat16) return bits_as<float>(std::uint32_t(stored) << 16);
  const std::uint32_t size = std::uint32_t(stored & 0x7fff) << 13, sign = std::uint32_t(stored & 0x8000) << 16;
  const std::uint32_t normal = size + kRebias + (size >= 31u << 23 ? kRebias : 0u);
  const float subnormal = bits_as<float>(size + kHalfNormal) - bits_as<float>(kHalfNormal);
  return bits_as<float>(sign | (size < 1u << 23 ? bits_as<std::uint32_t>(subnormal) : normal));
}

// The bfloat16 of `value` whose rounded bits are in the upper half of `bits`: a NaN stays one, whatever was added to
// it.
PRODIGY_INLINE std::uint16_t upper_half(float value, std::uint32_t bits) {
  return std::uint16_t((bits | (value == value ? 0u : ~0u)) >> 16);
}

// random: 16 bits. Adding them cannot change infinity, whose lower half is zero.
PRODIGY_INLINE std::uint16_t stochastic_bfloat16(float value, std::uint32_t random) {
  return upper_half(value, bits_as<std::uint32_t>(value) + random);
}

// Ties to even.
template <Type kType>
PRODIGY_INLINE std::uint16_t nearest(float value) {
  const std::uint32_t bits = bits_as<std::uint32_t>(value), size = bits & ~kSign;
  if constexpr (kType == Type::kBFloat16) {
    return upper_half(value, bits + 0x7fffu + (bits >> 16 & 1u));
  }
  const std::uint32_t normal = (size - kRebias + 0xfffu + (size >> 13 & 1u)) >> 13;
  // The last place of a float32 in [1/2, 1) is 2^-24, the unit of float16's subnormal numbers: this addition rounds to
  // them, ties to even (Giesen's float_to_half_fast3_rtne).
  const std::uint32_t subnormal = bits_as<std::uint32_t>(bits_as<float>(size) + 0.5f) - kOneHalf;
  const std::uint32_t beyond = size > kInfinity ? kHalfNaN : kHalfInf;
  const std::uint32_t rounded = size >= kHalfInfinity ? beyond : size < kHalfNormal ? subnormal : normal;
  return std::uint16_t((bits >> 16 & 0x8000u) | rounded);
}

// Rounds away from zero with probability (|value| - lower) / ulp, where `lower` is the next smaller size, else towards
// zero.
template <Type kType>
PRODIGY_INLINE std::uint16_t stochastic(float value, std::uint32_t random) {
  const std::uint32_t bits = bits_as<std::uint32_t>(value), size = bits & ~kSign;
  if constexpr (kType == Type::kBFloat16) {
    return stochastic_bfloat16(value, random >> 16);
  }
  const std::uint32_t up = size + (random >> 19);
  const std::uint32_t normal = up >= kHalfInfinity ? kHalfInf : (up - kRebias) >> 13;
  // In units of 2^-24, the same for all subnormal numbers.
  const float units = bits_as<float>(size < kHalfNormal ? size : 0u) * 0x1p24f;
  const std::int32_t whole = std::int32_t(units);
  const float part = units - float(whole), draw = float(std::int32_t(random >> 8)) * 0x1p-24f;
  const std::uint32_t subnormal = std::uint32_t(draw < part ? whole + 1 : whole);
  const std::uint32_t finite = size < kHalfNormal ? subnormal : normal;
  const std::uint32_t rounded = size > kInfinity ? kHalfNaN : finite;
  return std::uint16_t((bits >> 16 & 0x8000u) | rounded);
}

// -- 24 bits ---------------------------------------------------------------------------------------------------------

// A bfloat16 and a byte, see Note [24 bits] of prodigy_fused/rounding.py.
// With 32-bit operations only, since loops that have others do not vectorise well. x: in the upper half of a word.

// Beside which numbers a byte counts: not zero, infinity and NaN.
PRODIGY_INLINE bool byte_counts(std::uint32_t x) { return (x & ~kSign) - 0x10000u < 0x7f7f0000u; }

PRODIGY_INLINE float kept_value(std::uint16_t stored, std::int32_t low) {
  const std::uint32_t x = std::uint32_t(stored) << 16;
  return bits_as<float>(x + (byte_counts(x) ? std::uint32_t(low) << 8 : 0u));
}

// A value rounded to 24 bits; low fits a byte.
struct Kept {
  std::uint16_t x;
  std::int32_t low;
};

PRODIGY_INLINE Kept stochastic_24(float value, std::uint32_t random) {
  const std::uint32_t word = bits_as<std::uint32_t>(value) + (random >> 24), nan = value == value ? 0u : ~0u;
  const std::uint32_t x = ((word + 0x8000u) | nan) & 0xffff0000u;
  return {std::uint16_t(x >> 16), byte_counts(x) ? std::int32_t(word - x) >> 8 : 0};
}

// The displacement of an x that is stored rounded: `delta`, unless something else has written to x since. rounded:
// x0 + delta, to nearest.
template <class F>
PRODIGY_INLINE F displacement(F rounded, F x, F x0, F delta) {
  return select(rounded == x, delta, x - x0);
}
template <Type kType>
PRODIGY_INLINE float displacement(float x, float x0, float delta) {
  return displacement(widen<kType>(nearest<kType>(x0 + delta)), x, x0, delta);
}

}  // namespace prodigy
