// State in 8 bits: Note [8 bits] of prodigy_fused/eight_bits.py, whose numbers these are. With integers, and operations
// that are rounded exactly, so that codes are the same everywhere.
#pragma once

#include <cstdint>

#include "prodigy/rounding.h"

namespace prodigy {

// Elements that share a word of scale: a byte for each Code, in this order.
constexpr int kCodeBlock = 256;
enum class Code { kM, kRoot, kS, kDelta };
constexpr int kCodes = 4;

// sign: the uppermost bit.
PRODIGY_INLINE float with_sign(float size, std::uint32_t sign) {
  return bits_as<float>(bits_as<std::uint32_t>(size) | (sign & kSign));
}

// What blocks of a code have in common.
template <Code kCode>
struct CodeTraits {
  static constexpr bool kRoot = kCode == Code::kRoot;
  // As bits of float32: the number of the largest code, 448, 255, 252 or 127; and the largest size that a number may
  // have.
  static constexpr std::uint32_t kLargest = kCode == Code::kM   ? 0x43e00000u
                                            : kRoot             ? 0x437f0000u
                                            : kCode == Code::kS ? 0x437c0000u
                                                                : 0x42fe0000u;
  static constexpr std::uint32_t kLargestSize = kRoot ? 0x5f7f0000u : 254u << 23;
  // Byte b is a unit of 2^(b - kBias).
  static constexpr int kBias = kRoot ? 74 : 126;

  // The size of a number, as bits.
  static PRODIGY_INLINE std::uint32_t size(float value) {
    const std::uint32_t size = bits_as<std::uint32_t>(value) & ~kSign;
    return size < kLargestSize ? size : kLargestSize;
  }
  // The number next to it that has a size.
  static PRODIGY_INLINE float limited(float value) {
    return with_sign(bits_as<float>(size(value)), bits_as<std::uint32_t>(value));
  }
  // The byte of a block, from the largest size in it.
  static PRODIGY_INLINE std::int32_t byte(std::uint32_t largest) {
    constexpr std::uint32_t kMantissa = 0x7fffffu, kCarry = kMantissa - (kLargest & kMantissa);
    const std::int32_t byte = std::int32_t((largest + kCarry) >> 23) - (std::int32_t(kLargest >> 23) - kBias);
    return byte > 0 ? byte : 0;
  }
  static PRODIGY_INLINE float unit(std::int32_t byte) {
    return bits_as<float>(std::uint32_t(byte - kBias + 127) << 23);
  }
  static PRODIGY_INLINE float units_per_one(std::int32_t byte) {
    return bits_as<float>(std::uint32_t(kBias - byte + 127) << 23);
  }
};

// Random bits for a fourth value of an element (delta), next to x, v and s.
PRODIGY_INLINE std::uint32_t fourth(std::uint32_t bits) { return bits * power(kEight - 1) * power(kEight - 1); }

// A number, not negative and less than 2^24, rounded to a whole one: up with the probability of its fractional part.
PRODIGY_INLINE std::int32_t whole_number(float value, std::uint32_t random) {
  const std::int32_t whole = std::int32_t(value);
  return float(std::int32_t(random >> 8)) * 0x1p-24f < value - float(whole) ? whole + 1 : whole;
}

// -- e4m3 -------------------------------------------------------------------------------------------------------------

// Bits of 2^-6, the smallest normal number; and the difference of the exponents' biases, 127 - 7, in e4m3's place.
constexpr std::uint32_t kE4M3Normal = 121u << 23, kE4M3Rebias = 120u << 3;

// A code, in the lower 8 bits, and its number.
struct Coded {
  std::int32_t code;
  float number;
};

// Of a size in units, at most 448; ties to even.
PRODIGY_INLINE Coded e4m3_nearest(float units) {
  const std::uint32_t power = bits_as<std::uint32_t>(units) & kInfinity;
  const std::uint32_t at_least = power > kE4M3Normal ? power : kE4M3Normal;
  // The last place of a sum with 2^20 times that power of two is the one that e4m3 has. The lower 8 bits of the sum are
  // 56 more than so many places, and 56 is what the exponent, in e4m3's place, lacks, modulo 256.
  const float high = bits_as<float>(at_least + (20u << 23) + (0u - (kE4M3Normal >> 20)) % 256u);
  const float sum = units + high;
  return {std::int32_t(bits_as<std::uint32_t>(sum) + (at_least >> 20)), sum - high};
}

PRODIGY_INLINE float e4m3_size(std::uint32_t code) {
  const std::uint32_t size = code << 20 & 0x7f00000u;
  const float subnormal = bits_as<float>(size | kE4M3Normal) - bits_as<float>(kE4M3Normal);
  return size < 8u << 20 ? subnormal : bits_as<float>(size + (120u << 23));
}

// -- e2m5 -------------------------------------------------------------------------------------------------------------

// Of a size in units, at most 252, in steps of 1, 2 or 4 units: from 64 units on the steps are twice as long, from 128
// on once more.
PRODIGY_INLINE Coded e2m5_stochastic(float units, std::uint32_t random) {
  const std::int32_t exponent = std::int32_t(bits_as<std::uint32_t>(units) >> 23) - (127 + 5);
  const std::int32_t doublings = exponent > 0 ? exponent : 0;
  const std::int32_t whole = whole_number(units * bits_as<float>(std::uint32_t(127 - doublings) << 23), random);
  return {whole + 32 * doublings, float(whole) * bits_as<float>(std::uint32_t(127 + doublings) << 23)};
}

// Of the lower 7 bits of a code.
PRODIGY_INLINE float e2m5_size(std::uint32_t code) {
  const std::int32_t size = std::int32_t(code & 0x7fu), exponent = (size >> 5) - 1;
  const std::int32_t doublings = exponent > 0 ? exponent : 0;
  return float(size - 32 * doublings) * bits_as<float>(std::uint32_t(127 + doublings) << 23);
}

// -- codes and numbers ------------------------------------------------------------------------------------------------

// The number of a code, a byte; of a root, 0 to 255; of delta, -127 to 127. unit: of its block.
template <Code kCode>
PRODIGY_INLINE float decoded(std::int32_t code, float unit) {
  if constexpr (kCode == Code::kRoot || kCode == Code::kDelta) return float(code) * unit;
  const float size = kCode == Code::kM ? e4m3_size(std::uint32_t(code)) : e2m5_size(std::uint32_t(code));
  return with_sign(size * unit, std::uint32_t(code) << 24);
}

// A number whose size is at most kLargestSize, rounded. unit, units: of its block, units_per_one. random: 32 bits, not
// used for m.
template <Code kCode>
PRODIGY_INLINE Coded coded(float value, float unit, float units, std::uint32_t random) {
  const std::uint32_t sign = bits_as<std::uint32_t>(value) & kSign;
  const float scaled = (kCode == Code::kRoot ? value : std::fabs(value)) * units;
  if constexpr (kCode == Code::kM || kCode == Code::kS) {
    const Coded size = kCode == Code::kM ? e4m3_nearest(scaled) : e2m5_stochastic(scaled, random);
    return {size.code | std::int32_t(sign >> 24), with_sign(size.number * unit, sign)};
  }
  const std::int32_t whole = whole_number(scaled, random);
  if constexpr (kCode == Code::kRoot) {
    const std::int32_t size = bits_as<std::int32_t>(value), least = size < 1 ? size : 1;
    const std::int32_t code = whole > least ? whole : least;
    return {code, float(code) * unit};
  }
  const std::int32_t code = sign != 0 ? -whole : whole;
  return {code, float(code) * unit};
}

// The code, in the lower 8 bits, of any number.
template <Code kCode>
PRODIGY_INLINE std::int32_t encoded(float value, float units, std::uint32_t random) {
  return coded<kCode>(CodeTraits<kCode>::limited(value), 1.0f, units, random).code & 0xff;
}

}  // namespace prodigy
