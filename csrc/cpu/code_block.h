// A block of codes, which share a scale, in the first-level cache: in words (Note [Bytes in words]) and in float32.
#pragma once

#include <cstdint>
#include <type_traits>

#include "cpu/vector.h"
#include "prodigy/eight_bits.h"
#include "prodigy/table.h"

namespace prodigy::cpu {

template <class T>
struct alignas(64) BlockOf {
  T of[kCodeBlock];

  PRODIGY_INLINE T& operator[](int i) { return of[i]; }
  PRODIGY_INLINE const T& operator[](int i) const { return of[i]; }
};
using Words = BlockOf<std::int32_t>;
using Floats = BlockOf<float>;

// As bits. A loop of its own over each array is faster than a maximum that is kept beside sums.
PRODIGY_INLINE std::uint32_t largest_size(const float* __restrict numbers, int n) {
  std::uint32_t largest = 0;
  PRODIGY_VECTORIZE
  for (int i = 0; i < n; ++i) {
    const auto size = bits_as<std::uint32_t>(std::fabs(numbers[i]));
    largest = largest < size ? size : largest;
  }
  return largest;
}

// Of the block of codes that begins at an element.
PRODIGY_INLINE std::uint8_t* scale_at(const Tensor& t, std::int64_t begin) {
  return t.scale + begin / kCodeBlock * kCodes;
}

template <Code kCode>
PRODIGY_INLINE void widen_codes(const void* codes, std::int64_t begin, int n, Words& words) {
  using Byte = std::conditional_t<kCode == Code::kDelta, std::int8_t, std::uint8_t>;
  const auto* __restrict from = static_cast<const Byte*>(codes) + begin;
  PRODIGY_VECTORIZE
  for (int i = 0; i < n; ++i) words[i] = from[i];
}

PRODIGY_INLINE void narrow_codes(const Words& words, int n, void* codes, std::int64_t begin) {
  auto* __restrict to = static_cast<std::uint8_t*>(codes) + begin;
  PRODIGY_VECTORIZE
  for (int i = 0; i < n; ++i) to[i] = std::uint8_t(words[i]);
}

// What the codes of a block have in common.
template <Code kCode>
struct Scale {
  using Traits = CodeTraits<kCode>;

  float unit, units;

  PRODIGY_INLINE explicit Scale(std::int32_t byte) : unit(Traits::unit(byte)), units(Traits::units_per_one(byte)) {}
  PRODIGY_INLINE explicit Scale(const std::uint8_t* scale) : Scale(std::int32_t(scale[int(kCode)])) {}

  // The new one of n numbers, which are limited to the sizes that codes can have.
  static PRODIGY_INLINE Scale renewed(float* __restrict numbers, int n, std::uint8_t* scale) {
    std::uint32_t largest = largest_size(numbers, n);
    if (largest > Traits::kLargestSize) {
      for (int i = 0; i < n; ++i) numbers[i] = Traits::limited(numbers[i]);
      largest = Traits::kLargestSize;
    }
    const std::int32_t byte = Traits::byte(largest);
    scale[int(kCode)] = std::uint8_t(byte);
    return Scale(byte);
  }

  PRODIGY_INLINE float number(std::int32_t code) const { return decoded<kCode>(code, unit); }
  // bits: of the element.
  PRODIGY_INLINE Coded rounded(float value, std::uint32_t bits) const {
    if constexpr (kCode == Code::kRoot) bits = second(bits);
    if constexpr (kCode == Code::kS) bits = third(bits);
    if constexpr (kCode == Code::kDelta) bits = fourth(bits);
    return coded<kCode>(value, unit, units, bits);
  }
};

// Stores n numbers as codes. bits: of the elements; bytes: of scale.
template <Code kCode>
PRODIGY_INLINE void store_codes(Floats& numbers, int n, const std::uint32_t* __restrict bits, void* codes,
                                std::int64_t begin, std::uint8_t* bytes) {
  Words words;
  const auto scale = Scale<kCode>::renewed(numbers.of, n, bytes);
  PRODIGY_VECTORIZE
  for (int i = 0; i < n; ++i) words[i] = scale.rounded(numbers[i], bits[i]).code;
  narrow_codes(words, n, codes, begin);
}

}  // namespace prodigy::cpu
