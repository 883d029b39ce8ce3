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
  const float unit = CodeTraits<kCode>::kFloats ? kE4M3Unit * one : one;  // finite, and exact
  Numbers numbers;
#pragma unroll
  for (int e = 0; e < kLaneCodes; ++e) {
    const std::uint32_t word = codes.word[e / 4];
    if constexpr (CodeTraits<kCode>::kFloats) {
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

// A size, in units, rounded stochastically to the number of a code: e4m3_stochastic().
__device__ __forceinline__ float drawn_e4m3(float units, std::uint32_t random) {
  const std::uint32_t bits = bits_as<std::uint32_t>(units);
  const float normal = bits_as<float>((bits + (random >> 12)) & 0xfff00000u);
  const float subnormal = (whole_above(before_whole(units * 0x1p9f, random)) - kWhole) * 0x1p-9f;
  return bits < kE4M3Normal ? subnormal : normal;
}

// Of m or s. run: see RandomBits; it is for s.
template <Code kCode>
__device__ __forceinline__ Codes encoded_floats(const Numbers& numbers, std::int32_t byte, std::uint32_t run) {
  const Scaling<kCode> scaling(byte);
  const auto units = [&](int e) {
    float size = scaling.units(numbers.value[e]);
    if constexpr (kCode == Code::kS) size = drawn_e4m3(size, third(run * power(e)));
    return with_sign(size, bits_as<std::uint32_t>(numbers.value[e]));
  };
  const auto pair = [&](int e) {
    return kCode == Code::kS ? exact_e4m3_pair(units(e), units(e + 1)) : e4m3_pair(units(e), units(e + 1));
  };
  Codes codes;
#pragma unroll
  for (int e = 0; e < kLaneCodes; e += 4) codes.word[e / 4] = pair(e) | pair(e + 2) << 16;
  return codes;
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
  Codes codes;
#pragma unroll
  for (int w = 0; w < Codes::kWords; ++w) codes.word[w] = lowest_bytes(words + 4 * w);
  return codes;
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
  Codes codes;
#pragma unroll
  for (int w = 0; w < Codes::kWords; ++w) codes.word[w] = lowest_bytes(words + 4 * w);
  return codes;
}

}  // namespace prodigy::cuda
