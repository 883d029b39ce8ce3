// From the types that tensors are stored in to the type of the arithmetic, and back: the rule sees only the latter.
// Written so that loops over it vectorise, and with integers, so that it gives the same bits everywhere.
//
// Which numbers of 16 bits are rounded how, and with which random bits, prodigy_fused/low_precision.py says.
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
// What bits are drawn for: a step, or what is added to an x that is rounded already.
enum Stream : std::uint32_t { kStepStream, kCorrectionStream };

PRODIGY_INLINE Stream stream_of(Finish how) { return how == Finish::kStep ? kStepStream : kCorrectionStream; }

PRODIGY_INLINE std::uint32_t mix(std::uint32_t h) {
  h = (h ^ h >> 16) * 0x7feb352du;
  h = (h ^ h >> 15) * 0x846ca68bu;
  return h ^ h >> 16;
}

// Note [Random bits] of low_precision.py: what the elements of a run have in common.
struct RandomBits {
  std::uint32_t a, b;

  // begin: the first of the elements, which must agree in all but the low 32 bits of their positions.
  PRODIGY_INLINE RandomBits(std::uint32_t step, std::uint32_t tensor, Stream stream, std::int64_t begin) {
    const std::uint32_t word = 2 * std::uint32_t(begin >> 32) + stream;
    a = mix(mix(mix(kSeed + step) + tensor) + word);
    b = mix(mix(mix(~kSeed + tensor) + word) + step);
  }
  // low: the low 32 bits of the element's position.
  PRODIGY_INLINE std::uint32_t of(std::uint32_t low) const {
    std::uint32_t h = low ^ a;
    h = (h ^ h >> 16) * 0x7feb352du;
    h = ((h ^ h >> 15) + b) * 0x846ca68bu;
    return h ^ h >> 16;
  }
};

// For the second number of an element that is rounded.
PRODIGY_INLINE std::uint32_t exchanged(std::uint32_t bits) { return bits << 16 | bits >> 16; }

// -- bfloat16 and float16, as bits -----------------------------------------------------------------------------------

constexpr std::uint32_t kSign = 0x80000000u, kInfinity = 0x7f800000u;
// Of float16's 2^-14, the least normal number, and 2^16, which it does not have.
constexpr std::uint32_t kHalfNormal = 113u << 23, kHalfInfinity = 143u << 23;

template <Type kType>
PRODIGY_INLINE float widen(std::uint16_t stored) {
  if constexpr (kType == Type::kBFloat16) return bits_as<float>(std::uint32_t(stored) << 16);
  const std::uint32_t size = std::uint32_t(stored & 0x7fff) << 13, sign = std::uint32_t(stored & 0x8000) << 16;
  const std::uint32_t normal = size + (112u << 23) + (size >= 31u << 23 ? 112u << 23 : 0u);
  const float subnormal = bits_as<float>(size + kHalfNormal) - bits_as<float>(kHalfNormal);
  return bits_as<float>(sign | (size < 1u << 23 ? bits_as<std::uint32_t>(subnormal) : normal));
}

// Ties to even.
template <Type kType>
PRODIGY_INLINE std::uint16_t nearest(float value) {
  const std::uint32_t bits = bits_as<std::uint32_t>(value), size = bits & ~kSign;
  if constexpr (kType == Type::kBFloat16) {
    const std::uint32_t rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
    return std::uint16_t(size > kInfinity ? bits >> 16 | 0x40u : rounded);
  }
  const std::uint32_t normal = (size - (112u << 23) + 0xfffu + (size >> 13 & 1u)) >> 13;
  // To a sum with 1/2, float32's last place is float16's 2^-24.
  const std::uint32_t subnormal = bits_as<std::uint32_t>(bits_as<float>(size) + 0.5f) - (126u << 23);
  const std::uint32_t beyond = size > kInfinity ? 0x7e00u : 0x7c00u;
  const std::uint32_t rounded = size >= kHalfInfinity ? beyond : size < kHalfNormal ? subnormal : normal;
  return std::uint16_t((bits >> 16 & 0x8000u) | rounded);
}

// Up in size with the probability that is the part of a unit to the next smaller number.
template <Type kType>
PRODIGY_INLINE std::uint16_t stochastic(float value, std::uint32_t random) {
  const std::uint32_t bits = bits_as<std::uint32_t>(value), size = bits & ~kSign;
  if constexpr (kType == Type::kBFloat16) {
    return size < kInfinity ? std::uint16_t((bits + (random >> 16)) >> 16) : nearest<kType>(value);
  }
  const std::uint32_t up = size + (random >> 19);
  const std::uint32_t normal = up >= kHalfInfinity ? 0x7c00u : (up - (112u << 23)) >> 13;
  // In units of 2^-24, the same for all subnormal numbers.
  const float units = bits_as<float>(size < kHalfNormal ? size : 0u) * 0x1p24f;
  const std::int32_t whole = std::int32_t(units);
  const float part = units - float(whole), draw = float(std::int32_t(random >> 8)) * 0x1p-24f;
  const std::uint32_t subnormal = std::uint32_t(draw < part ? whole + 1 : whole);
  const std::uint32_t finite = size < kHalfNormal ? subnormal : normal;
  const std::uint32_t rounded = size > kInfinity ? 0x7e00u : finite;
  return std::uint16_t((bits >> 16 & 0x8000u) | rounded);
}

// The displacement of an x that is stored rounded: `delta`, unless somebody else has written x since.
template <Type kType>
PRODIGY_INLINE float displacement(float x, float x0, float delta) {
  return widen<kType>(nearest<kType>(x0 + delta)) == x ? delta : x - x0;
}

}  // namespace prodigy
