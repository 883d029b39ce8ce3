// csrc/cuda/intrinsics.cuh for the CPU.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "prodigy/eight_bits.h"

namespace prodigy::cuda {

// Off by `units` in the last place, as approximations may be.
inline float off_by(float value, int units) {
  if (!(std::fabs(value) < INFINITY) || value == 0.0f) return value;
  return bits_as<float>(bits_as<std::uint32_t>(value) + std::uint32_t(units));
}

inline int held(int number) { return number; }

// In a way that depends on the argument, so that errors do not cancel.
inline float approximate_root(float value) {
  return off_by(std::sqrt(value), int(bits_as<std::uint32_t>(value) % 3) - 1);
}
inline float approximate_root_of_normal(float value) { return value < 0x1p-126f ? 0.0f : approximate_root(value); }
inline float approximate_inverse_root(float value) {
  if (value < 0x1p-126f) return INFINITY;
  return off_by(1.0f / std::sqrt(value), int(bits_as<std::uint32_t>(value) % 3) - 1);
}

template <Type kType>
std::uint32_t nearest_pair(float low, float high) {
  return nearest<kType>(low) | std::uint32_t(nearest<kType>(high)) << 16;
}
template <Type kType>
float widen_low(std::uint32_t pair) {
  return widen<kType>(std::uint16_t(pair));
}
template <Type kType>
float widen_high(std::uint32_t pair) {
  return widen<kType>(std::uint16_t(pair >> 16));
}

inline float approximate_reciprocal(float value) {
  if (value < 0x1p-126f) return INFINITY;
  return off_by(1.0f / value, int(bits_as<std::uint32_t>(value) % 3) - 1);
}

inline float larger(float a, float b) {
  return bits_as<float>(std::max(bits_as<std::uint32_t>(a), bits_as<std::uint32_t>(b)));
}
inline std::uint32_t byte_above(std::uint32_t word, int which) {
  return std::uint32_t(std::int8_t(word >> 8 * which)) << 8;
}
inline float saturated(float value) { return value > 0.0f ? std::min(value, 1.0f) : 0.0f; }
inline float before_whole(float value, std::uint32_t random) {
  if (!(value < 0x1p22f)) return value;
  const float whole = std::floor(value), draw = float(random >> 8) * 0x1p-24f;
  return draw < value - whole ? whole + 1.0f : whole;
}
inline float whole_above(float value) { return kWhole + std::ceil(value); }

}  // namespace prodigy::cuda
