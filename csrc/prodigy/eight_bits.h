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

// What blocks of a code have in common.
template <Code kCode>
struct CodeTraits {
  static constexpr bool kRoot = kCode == Code::kRoot, kIsDelta = kCode == Code::kDelta, kFloats = !kRoot && !kIsDelta;
  // As bits of float32: the number of the largest code, 448, 255 or 127; and the largest size that a number may have.
  static constexpr std::uint32_t kLargest = kFloats ? 0x43e00000u : kRoot ? 0x437f0000u : 0x42fe0000u;
  static constexpr std::uint32_t kLargestSize = kRoot ? 0x5f7f0000u : 254u << 23;
  // Byte b is a unit of 2^(b - kBias).
  static constexpr int kBias = kRoot ? 74 : 126;

  // The size of a number, as bits.
  static PRODIGY_INLINE std::uint32_t size(float value) {
    const std::uint32_t size = bits_as<std::uint32_t>(value) & ~kSign;
    return size < kLargestSize ? size : kLargestSize;
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
  return whole + (float(std::int32_t(random >> 8)) * 0x1p-24f < value - float(whole));
}

// -- e4m3 -------------------------------------------------------------------------------------------------------------

// Bits of 2^-6, the smallest normal number; and the difference of the exponents' biases, 127 - 7, in e4m3's place.
constexpr std::uint32_t kE4M3Normal = 121u << 23, kE4M3Rebias = 120u << 3;

// Of a size in units, at most 448; ties to even.
PRODIGY_INLINE std::uint32_t e4m3_nearest(float units) {
  const std::uint32_t bits = bits_as<std::uint32_t>(units);
  const std::uint32_t normal = ((bits + 0x7ffffu + (bits >> 20 & 1u)) >> 20) - kE4M3Rebias;
  // The last place of a number from 2^14 on is 2^-9, the unit of subnormal ones.
  const std::uint32_t subnormal = bits_as<std::uint32_t>(units + 0x1p14f) - bits_as<std::uint32_t>(0x1p14f);
  return bits < kE4M3Normal ? subnormal : normal;
}

PRODIGY_INLINE std::uint32_t e4m3_stochastic(float units, std::uint32_t random) {
  const std::uint32_t bits = bits_as<std::uint32_t>(units);
  const std::uint32_t normal = ((bits + (random >> 12)) >> 20) - kE4M3Rebias;
  const float small = bits < kE4M3Normal ? units : 0.0f;
  return bits < kE4M3Normal ? std::uint32_t(whole_number(small * 0x1p9f, random)) : normal;
}

// Of the lower 7 bits of a code.
PRODIGY_INLINE float e4m3_size(std::uint32_t code) {
  const float subnormal = bits_as<float>(code << 20 | kE4M3Normal) - bits_as<float>(kE4M3Normal);
  return code < 8u ? subnormal : bits_as<float>((code << 20) + (120u << 23));
}

// -- codes and numbers ------------------------------------------------------------------------------------------------

// The number of a code, a byte. unit: of its block.
template <Code kCode>
PRODIGY_INLINE float decoded(std::int32_t code, float unit) {
  if constexpr (kCode == Code::kRoot) return float(code & 0xff) * unit;
  if constexpr (kCode == Code::kDelta) return float(std::int8_t(code)) * unit;
  const float size = e4m3_size(std::uint32_t(code) & 0x7fu) * unit;
  return bits_as<float>(bits_as<std::uint32_t>(size) | (std::uint32_t(code) & 0x80u) << 24);
}

// The code of a number, of whose block `units` is units_per_one; in the lower 8 bits. random: 32 bits, not used for m.
template <Code kCode>
PRODIGY_INLINE std::int32_t encoded(float value, float units, std::uint32_t random) {
  const std::uint32_t size = CodeTraits<kCode>::size(value), sign = bits_as<std::uint32_t>(value) & kSign;
  const float scaled = bits_as<float>(size) * units;
  if constexpr (kCode == Code::kM) return std::int32_t(e4m3_nearest(scaled) | sign >> 24);
  if constexpr (kCode == Code::kS) return std::int32_t(e4m3_stochastic(scaled, random) | sign >> 24);
  const std::int32_t whole = whole_number(scaled, random);
  if constexpr (kCode == Code::kRoot) return size > 0 && whole == 0 ? 1 : whole;
  return sign != 0 ? -whole : whole;
}

}  // namespace prodigy
