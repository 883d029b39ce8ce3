// Codes of 8 bits and their numbers: Note [8 bits] of prodigy_fused/eight_bits.py.
//
// Note [A warp for each block of codes]
// A block is 256 elements, 8 for each lane: their codes are 8 bytes, moved at once, and stay in registers, as the
// numbers do. The largest size in a block is that of the warp, so no barrier is needed and nothing is read twice. All
// lanes come to a maximum, also those that a tensor's last block has no elements for: their numbers are zeros.
//
// The codes of given numbers are, bit by bit, those of csrc/prodigy/eight_bits.h, whose functions these are for eight
// elements and the instructions of a GPU. The numbers of a step are those of other backends but for the last bit (fused
// multiplications and additions, an approximate root and quotient); where a limit of rounding lies between, codes
// differ by one.
#pragma once

#include "cuda/e4m3.cuh"
#include "cuda/pack.cuh"
#include "cuda/reduce.cuh"
#include "prodigy/eight_bits.h"

namespace prodigy::cuda {

constexpr int kLaneCodes = kCodeBlock / kWarpSize;
static_assert(kLaneCodes == kEight, "the elements of a lane share a hash");
using Codes = Raw<std::uint8_t, kLaneCodes>;
using Numbers = Pack<float, kLaneCodes>;

// -- a block's word of scale -----------------------------------------------------------------------------------------

template <Code kCode>
__device__ __forceinline__ std::int32_t byte_in(std::uint32_t scale) {
  return std::int32_t(scale >> 8 * int(kCode) & 0xffu);
}

template <Code kCode>
__device__ __forceinline__ std::uint32_t with_byte(std::uint32_t scale, std::int32_t byte) {
  return (scale & ~(0xffu << 8 * int(kCode))) | std::uint32_t(byte) << 8 * int(kCode);
}

// The unit of this warp's block, from its numbers, which are limited to the sizes that codes can have; its byte enters
// the word of scale.
template <Code kCode>
__device__ __forceinline__ float renewed(Numbers& numbers, std::uint32_t& scale) {
  using Traits = CodeTraits<kCode>;
  float largest = 0.0f;
#pragma unroll
  for (int e = 0; e < kLaneCodes; ++e) largest = larger(largest, std::fabs(numbers.value[e]));
  std::uint32_t size = warp_max(word_of(largest));
  if (size > Traits::kLargestSize) {
#pragma unroll
    for (int e = 0; e < kLaneCodes; ++e) numbers.value[e] = Traits::limited(numbers.value[e]);
    size = Traits::kLargestSize;
  }
  const std::int32_t byte = Traits::byte(size);
  scale = with_byte<kCode>(scale, byte);
  return Traits::unit(byte);
}

// -- numbers of codes ------------------------------------------------------------------------------------------------

// kWhole plus the byte, one of four in a word.
__device__ __forceinline__ float whole_and_byte(std::uint32_t word, int which) {
  return bits_as<float>(__byte_perm(word, kWholeBits, 0x7640u + std::uint32_t(which)));
}

// E2M5::number() of the lower or the upper two of four bytes, in units of 2^19: a float16 whose exponent has its lowest
// two bits only, and the mantissa its upper five. Shifted by multiplications, for other parts of a multiprocessor do
// them, which have less to do.
__device__ __forceinline__ Two widen_e2m5(std::uint32_t word, int pair) {
  const std::uint32_t codes = __byte_perm(word, 0u, pair == 0 ? 0x4140u : 0x4342u), signs = codes & 0x00800080u;
  const std::uint32_t halves = codes * (1u << 5) + signs * ((1u << 8) - (1u << 5));
  return {widen_low<Type::kFloat16>(halves), widen_high<Type::kFloat16>(halves)};
}

template <Code kCode>
__device__ __forceinline__ Numbers numbers_of(const Codes& codes, std::uint32_t scale) {
  const float one = CodeTraits<kCode>::unit(byte_in<kCode>(scale));
  const float unit = kCode == Code::kM ? kE4M3Unit * one : one;  // finite, and exact
  Numbers numbers;
#pragma unroll
  for (int e = 0; e < kLaneCodes; ++e) {
    const std::uint32_t word = codes.word[e / 4];
    if constexpr (kCode == Code::kS) {
      const Two two = widen_e2m5(word, e % 4 / 2);
      numbers.value[e] = (e % 2 == 0 ? two.low : two.high) * 0x1p19f * unit;
    } else if constexpr (kCode == Code::kM) {
      const Two two = widen_e4m3(word >> e % 4 / 2 * 16);
      numbers.value[e] = (e % 2 == 0 ? two.low : two.high) * unit;
    } else if constexpr (CodeTraits<kCode>::kRoot) {
      numbers.value[e] = whole_and_byte(word, e % 4) * unit - kWhole * unit;  // one operation, exact
    } else {  // not as above: kWhole units may be infinite
      numbers.value[e] = (whole_and_byte(word ^ 0x80808080u, e % 4) - (kWhole + 128.0f)) * unit;
    }
  }
  return numbers;
}

// -- codes of numbers ------------------------------------------------------------------------------------------------

// The highest bytes of four words.
__device__ __forceinline__ std::uint32_t highest_bytes(const std::uint32_t* four) {
  return __byte_perm(__byte_perm(four[0], four[1], 0x73u), __byte_perm(four[2], four[3], 0x73u), 0x5410u);
}

// The codes of whole numbers of steps, see Fixed: two at a time, their 8 bits are moved to where a byte is.
template <Code kCode>
__device__ __forceinline__ Codes codes_of(const std::uint32_t (&steps)[kLaneCodes]) {
  constexpr int kPlaces = Fixed<kCode>::kPlaces;
  static_assert(8 < kPlaces && kPlaces <= 16);
  const auto two = [&](int e) { return __byte_perm(steps[e], steps[e + 1], 0x6521u) << (16 - kPlaces); };
  Codes codes;
#pragma unroll
  for (int w = 0; w < Codes::kWords; ++w) codes.word[w] = __byte_perm(two(4 * w), two(4 * w + 2), 0x7531u);
  return codes;
}

// Of m.
__device__ __forceinline__ Codes encoded_m(const Numbers& m, float unit) {
  const float units_per_one = float_of((254u << 23) - word_of(unit));
  Codes codes;
#pragma unroll
  for (int w = 0; w < Codes::kWords; ++w) {
    const float* four = m.value + 4 * w;
    codes.word[w] = e4m3_pair(four[0] * units_per_one, four[1] * units_per_one) |
                    e4m3_pair(four[2] * units_per_one, four[3] * units_per_one) << 16;
  }
  return codes;
}

// Of s. run: see RandomBits.
__device__ __forceinline__ Codes encoded_s(const Numbers& s, float unit, std::uint32_t run) {
  std::uint32_t steps[kLaneCodes], numbers[kLaneCodes];
#pragma unroll
  for (int e = 0; e < kLaneCodes; ++e) {
    steps[e] = steps_of_s(std::fabs(s.value[e]), unit, third(run * power(e)));
    numbers[e] = word_of(s.value[e]);
  }
  Codes codes = codes_of<Code::kS>(steps);
#pragma unroll
  for (int w = 0; w < Codes::kWords; ++w) {
    constexpr std::uint32_t kSigns = 0x80808080u;
    codes.word[w] = (codes.word[w] & ~kSigns) | (highest_bytes(numbers + 4 * w) & kSigns);
  }
  return codes;
}

// Of roots, which become the numbers of their codes.
__device__ __forceinline__ Codes encode_roots(Numbers& roots, float unit, std::uint32_t run) {
  using Steps = Fixed<Code::kRoot>;
  const float zero = Steps::kHigh * unit;
  std::uint32_t steps[kLaneCodes];
#pragma unroll
  for (int e = 0; e < kLaneCodes; ++e) {
    // A root that is not 0 is at least 2^-75.
    const float least = saturated(roots.value[e] * 0x1p127f) * unit + zero;
    steps[e] = prodigy::larger(steps_of<Code::kRoot>(roots.value[e], unit, run * power(e)), word_of(least));
    roots.value[e] = float_of(steps[e] & ~Steps::kFraction) - zero;
  }
  return codes_of<Code::kRoot>(steps);
}

// Of x - x0.
__device__ __forceinline__ Codes encoded_delta(const Numbers& delta, float unit, std::uint32_t run) {
  std::uint32_t steps[kLaneCodes];
#pragma unroll
  for (int e = 0; e < kLaneCodes; ++e) {
    steps[e] = steps_of<Code::kDelta>(delta.value[e], unit, third(run * power(e)));
  }
  Codes codes = codes_of<Code::kDelta>(steps);
#pragma unroll
  for (int w = 0; w < Codes::kWords; ++w) codes.word[w] ^= 0x80808080u;
  return codes;
}

}  // namespace prodigy::cuda
