// A block of codes, which share a scale, and their numbers in float32, in the first-level cache.
#pragma once

#include <algorithm>
#include <cstdint>

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

// The largest size of the numbers that are added, by kLanes at once.
template <int kLanes>
struct Largest {
  std::uint32_t sizes[kLanes] = {};

  PRODIGY_INLINE void add(int lane, float value) {
    const std::uint32_t size = bits_as<std::uint32_t>(value) & ~kSign;
    sizes[lane] = sizes[lane] < size ? size : sizes[lane];
  }
  PRODIGY_INLINE float of_all() const { return bits_as<float>(*std::max_element(sizes, sizes + kLanes)); }
};

// Calls visit(at, number of elements, bytes of scale) for the blocks in the n elements from `begin` on, where a block
// begins; at: from `begin`.
template <class Visit>
PRODIGY_INLINE void each_code_block(const Tensor& t, std::int64_t begin, int n, Visit visit) {
  std::uint8_t* scale = t.scale + begin / kCodeBlock * kCodes;
  for (int at = 0; at < n; at += kCodeBlock, scale += kCodes) visit(at, std::min(kCodeBlock, n - at), scale);
}

// scale: of the block.
template <Code kCode>
PRODIGY_INLINE void decode(const void* codes, std::int64_t begin, int n, const std::uint8_t* scale,
                           float* __restrict to) {
  using Byte = std::conditional_t<kCode == Code::kDelta, std::int8_t, std::uint8_t>;
  const auto* __restrict from = static_cast<const Byte*>(codes) + begin;
  const float unit = CodeTraits<kCode>::unit(scale[int(kCode)]);
  BlockOf<std::int32_t> words;  // Note [Bytes in words]
  PRODIGY_VECTORIZE
  for (int i = 0; i < n; ++i) words[i] = from[i];
  PRODIGY_VECTORIZE
  for (int i = 0; i < n; ++i) to[i] = decoded<kCode>(words[i], unit);
}

// The `numbers` become those of the codes. largest: of them; bits: of the elements, not used for m.
template <Code kCode>
PRODIGY_INLINE void encode(float* __restrict numbers, int n, float largest, const std::uint32_t* __restrict bits,
                           void* codes, std::int64_t begin, std::uint8_t* scale) {
  using Traits = CodeTraits<kCode>;
  auto* __restrict to = static_cast<std::uint8_t*>(codes) + begin;
  const std::int32_t byte = Traits::byte(Traits::size(largest));
  const float unit = Traits::unit(byte), units = Traits::units_per_one(byte);
  scale[int(kCode)] = std::uint8_t(byte);
  BlockOf<std::int32_t> words;
  PRODIGY_VECTORIZE
  for (int i = 0; i < n; ++i) {
    const std::uint32_t draw = kCode == Code::kM      ? 0u
                               : kCode == Code::kRoot ? second(bits[i])
                               : kCode == Code::kS    ? third(bits[i])
                                                      : fourth(bits[i]);
    words[i] = encoded<kCode>(numbers[i], units, draw);
    numbers[i] = decoded<kCode>(words[i], unit);
  }
  PRODIGY_VECTORIZE
  for (int i = 0; i < n; ++i) to[i] = std::uint8_t(words[i]);
}

}  // namespace prodigy::cpu
