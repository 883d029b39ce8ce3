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

// The byte of this warp's block, from its numbers.
template <Code kCode>
__device__ __forceinline__ std::int32_t block_byte(const Numbers& numbers) {
  float largest = 0.0f;
#pragma unroll
  for (int e = 0; e < kLaneCodes; ++e) largest = larger(largest, std::fabs(numbers.value[e]));
  return CodeTraits<kCode>::byte(CodeTraits<kCode>::size(bits_as<float>(warp_max(bits_as<std::uint32_t>(largest)))));
}

// The sizes of a block's numbers in units.
template <Code kCode>
struct Scaling {
  float units_per_one, largest;

  __device__ __forceinline__ explicit Scaling(std::int32_t byte)
      : units_per_one(CodeTraits<kCode>::units_per_one(byte)),
        largest(bits_as<float>(CodeTraits<kCode>::kLargestSize) * units_per_one) {}
  __device__ __forceinline__ float units(float value) const { return fminf(std::fabs(value) * units_per_one, largest); }
};

// -- numbers of codes ------------------------------------------------------------------------------------------------

// kWhole plus the byte, one of four in a word.
__device__ __forceinline__ float whole_and_byte(std::uint32_t word, int which) {
  return bits_as<float>(__byte_perm(word, kWholeBits, 0x7640u + std::uint32_t(which)));
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
      numbers.value[e] = decoded<kCode>(std::int32_t(word >> e % 4 * 8 & 0xffu), unit);
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

// The lowest bytes of four words.
__device__ __forceinline__ std::uint32_t lowest_bytes(const std::uint32_t* four) {
  const std::uint32_t low = __byte_perm(four[0], four[1], 0x40), high = __byte_perm(four[2], four[3], 0x40);
  return __byte_perm(low, high, 0x5410);
}

__device__ __forceinline__ Codes codes_of(const std::uint32_t (&words)[kLaneCodes]) {
  Codes codes;
#pragma unroll
  for (int w = 0; w < Codes::kWords; ++w) codes.word[w] = lowest_bytes(words + 4 * w);
  return codes;
}

// Of m.
__device__ __forceinline__ Codes encoded_m(const Numbers& numbers, std::int32_t byte) {
  const Scaling<Code::kM> scaling(byte);
  const auto units = [&](int e) {
    return with_sign(scaling.units(numbers.value[e]), bits_as<std::uint32_t>(numbers.value[e]));
  };
  Codes codes;
#pragma unroll
  for (int e = 0; e < kLaneCodes; e += 4) {
    codes.word[e / 4] = e4m3_pair(units(e), units(e + 1)) | e4m3_pair(units(e + 2), units(e + 3)) << 16;
  }
  return codes;
}

// Of s: e2m5_stochastic(). run: see RandomBits.
__device__ __forceinline__ Codes encoded_s(const Numbers& numbers, std::int32_t byte, std::uint32_t run) {
  const Scaling<Code::kS> scaling(byte);
  std::uint32_t words[kLaneCodes];
#pragma unroll
  for (int e = 0; e < kLaneCodes; ++e) {
    const float units = scaling.units(numbers.value[e]);
    const int exponent = int(bits_as<std::uint32_t>(units) >> 23) - (127 + 5), doublings = exponent > 0 ? exponent : 0;
    const float parts = units * bits_as<float>(std::uint32_t(127 - doublings) << 23);
    const auto whole = bits_as<std::uint32_t>(whole_above(before_whole(parts, third(run * power(e)))));
    words[e] = (whole + std::uint32_t(doublings << 5)) | (bits_as<std::uint32_t>(numbers.value[e]) & kSign) >> 24;
  }
  return codes_of(words);
}

// Of roots, which become the numbers of their codes.
__device__ __forceinline__ Codes encode_roots(Numbers& roots, std::int32_t byte, std::uint32_t run) {
  const Scaling<Code::kRoot> scaling(byte);
  const float unit = CodeTraits<Code::kRoot>::unit(byte);
  std::uint32_t words[kLaneCodes];
#pragma unroll
  for (int e = 0; e < kLaneCodes; ++e) {
    const float units = scaling.units(roots.value[e]);
    // What is not 0 is at least one unit. (A root is at least 2^-75: in units, too, it is not 0.)
    const float whole = whole_above(fmaxf(before_whole(units, second(run * power(e))), fminf(units, 0.5f)));
    words[e] = bits_as<std::uint32_t>(whole);
    roots.value[e] = whole * unit - kWhole * unit;
  }
  return codes_of(words);
}

// Of x - x0.
__device__ __forceinline__ Codes encoded_delta(const Numbers& delta, std::int32_t byte, std::uint32_t run) {
  const Scaling<Code::kDelta> scaling(byte);
  std::uint32_t words[kLaneCodes];
#pragma unroll
  for (int e = 0; e < kLaneCodes; ++e) {
    const float units = scaling.units(delta.value[e]);
    const auto whole = bits_as<std::uint32_t>(whole_above(before_whole(units, fourth(run * power(e)))));
    words[e] = delta.value[e] < 0.0f ? 0u - whole : whole;
  }
  return codes_of(words);
}

}  // namespace prodigy::cuda
