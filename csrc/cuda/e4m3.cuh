// e4m3 codes, two at a time: with the hardware's conversions where it has them, which is from sm_89 on; else with those
// of float16. The same bits as by coded_m() and E4M3 of csrc/prodigy/eight_bits.h.
#pragma once

#include "cuda/intrinsics.cuh"
#include "prodigy/eight_bits.h"

namespace prodigy::cuda {

struct Two {
  float low, high;
};

#if __CUDA_ARCH__ >= 890

// Of numbers that are at most 448 in size, to nearest; the first in the lower byte.
__device__ __forceinline__ std::uint32_t e4m3_pair(float low, float high) {
  std::uint16_t pair;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(pair) : "f"(high), "f"(low));
  return pair;
}

// The numbers of the lowest two bytes are these, times kE4M3Unit.
constexpr float kE4M3Unit = 1.0f;
__device__ __forceinline__ Two widen_e4m3(std::uint32_t pair) {
  std::uint32_t halves;
  asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(halves) : "h"(std::uint16_t(pair)));
  return {widen_low<Type::kFloat16>(halves), widen_high<Type::kFloat16>(halves)};
}

#else

// The code of a number is, but for the place of the sign, the upper bits of the float16 of 2^-8 times the number: the
// exponents' biases are 7 and 15. That holds for subnormal numbers, too.
constexpr float kE4M3Unit = 256.0f;
constexpr std::uint32_t kSigns = 0x80008000u;  // of two halves

// Of numbers of e4m3.
__device__ __forceinline__ std::uint32_t exact_e4m3_pair(float low, float high) {
  const std::uint32_t halves = nearest_pair<Type::kFloat16>(low * (1 / kE4M3Unit), high * (1 / kE4M3Unit));
  return __byte_perm((halves & kSigns) | (halves << 1 & 0x7f007f00u), 0u, 0x4431u);
}

// The nearest number of e4m3, ties to even. The last place of a number that is 1.5 * 2^20 times as large as a power of
// two is an eighth of that.
__device__ __forceinline__ float nearest_e4m3(float value) {
  const std::uint32_t smallest_normal = E4M3::smallest_normal(1.0f);
  const float large = float_of(prodigy::larger(word_of(value) & kInfinity, smallest_normal) + (20u << 23 | 1u << 22));
  return float_of(word_of(std::fabs((value + large) - large)) | (word_of(value) & kSign));
}

__device__ __forceinline__ std::uint32_t e4m3_pair(float low, float high) {
  return exact_e4m3_pair(nearest_e4m3(low), nearest_e4m3(high));
}

__device__ __forceinline__ Two widen_e4m3(std::uint32_t pair) {
  const std::uint32_t halves = __byte_perm(pair, 0u, 0x1404u);
  const std::uint32_t moved = (halves & kSigns) | (halves >> 1 & 0x3f803f80u);
  return {widen_low<Type::kFloat16>(moved), widen_high<Type::kFloat16>(moved)};
}

#endif

}  // namespace prodigy::cuda
