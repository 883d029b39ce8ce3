// Instructions of NVIDIA's GPUs that C++ has no expression for. tests/emulation/intrinsics.h has them for the CPU.
#pragma once

#include "cuda/policy.h"
#include "prodigy/rounding.h"

namespace prodigy::cuda {

// 1.5 * 2^23: the lowest bits of it and a whole number, as a float32, are those of the number.
constexpr float kWhole = 0x1.8p23f;
constexpr std::uint32_t kWholeBits = 0x4b400000u;

}  // namespace prodigy::cuda

#if defined(__CUDACC__)
namespace prodigy::cuda {

// A number that the compiler keeps, rather than compute it anew where it is used.
__device__ __forceinline__ int held(int number) {
  asm volatile("" : "+r"(number));
  return number;
}

// To within 1 unit in the last place; of subnormal numbers, too.
__device__ __forceinline__ float approximate_root(float value) {
  float root;
  asm("sqrt.approx.f32 %0, %1;" : "=f"(root) : "f"(value));
  return root;
}

// The same, but 0 for subnormal numbers.
__device__ __forceinline__ float approximate_root_of_normal(float value) {
  float root;
  asm("sqrt.approx.ftz.f32 %0, %1;" : "=f"(root) : "f"(value));
  return root;
}

// 1 / root, infinite for subnormal numbers.
__device__ __forceinline__ float approximate_inverse_root(float value) {
  float inverse;
  asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(value));
  return inverse;
}

// Two numbers rounded to nearest, the first in the low half. As nearest<kType>() of prodigy/rounding.h, but for the
// bits of a NaN.
template <Type kType>
__device__ __forceinline__ std::uint32_t nearest_pair(float low, float high) {
  std::uint32_t pair;
  if constexpr (kType == Type::kBFloat16) {
#if __CUDA_ARCH__ >= 800
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
#else
    pair = nearest<kType>(low) | std::uint32_t(nearest<kType>(high)) << 16;
#endif
  } else {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  }
  return pair;
}

// As widen<kType>() of the lower and of the upper half.
template <Type kType>
__device__ __forceinline__ float widen_low(std::uint32_t pair) {
  if constexpr (kType == Type::kBFloat16) return __uint_as_float(pair << 16);
  float wide;
  asm("{.reg .b16 low, high; mov.b32 {low, high}, %1; cvt.f32.f16 %0, low;}" : "=f"(wide) : "r"(pair));
  return wide;
}

template <Type kType>
__device__ __forceinline__ float widen_high(std::uint32_t pair) {
  if constexpr (kType == Type::kBFloat16) return __uint_as_float(pair & 0xffff0000u);
  float wide;
  asm("{.reg .b16 low, high; mov.b32 {low, high}, %1; cvt.f32.f16 %0, high;}" : "=f"(wide) : "r"(pair));
  return wide;
}

// The reciprocal, to within 1 unit in the last place for 2^-126 <= value <= 2^126.
__device__ __forceinline__ float approximate_reciprocal(float value) {
  float reciprocal;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(reciprocal) : "f"(value));
  return reciprocal;
}

// The larger one of two sizes; NaN is the largest.
__device__ __forceinline__ float larger(float a, float b) {
  float size;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(size) : "f"(a), "f"(b));
  return size;
}

// 256 times one of four bytes, which have signs.
__device__ __forceinline__ std::uint32_t byte_above(std::uint32_t word, int which) {
  std::uint32_t above;
  asm("prmt.b32 %0, %1, 0, %2;" : "=r"(above) : "r"(word), "r"(0x8804 + 0x1110 * which));
  return above;
}

// The nearest number from 0 to 1; 0 of a NaN.
__device__ __forceinline__ float saturated(float value) { return __saturatef(value); }

// A number that, rounded up to a whole one, is `value`, less than 2^22, rounded stochastically; at most `value`.
__device__ __forceinline__ float before_whole(float value, std::uint32_t random) {
  return __fmaf_ru(float(std::int32_t(random >> 8)), -0x1p-24f, value);
}

// kWhole plus the number, rounded up to a whole one.
__device__ __forceinline__ float whole_above(float value) { return __fadd_ru(value, kWhole); }

}  // namespace prodigy::cuda
#else
#include "intrinsics.h"
#endif

namespace prodigy::cuda {

// Where m and v are stored with 16 bits, a root and a quotient that are off by at most 3 units in the last of float32's
// places are exact: the rounding of m and v is 2^14 times as coarse. The kernel would else wait for arithmetic, not for
// memory. A root is taken of 2^24 v, which is a normal number if v > 0: a divisor is then at least 2^-75. (From 2^104
// on the root is infinite, as it would be from 2^128 on: what has such a gradient does not move.)
struct ApproximateRoots {
  static __device__ __forceinline__ float root(float value) {
    return approximate_root_of_normal(value * 0x1p24f) * 0x1p-12f;
  }
  static __device__ __forceinline__ float quotient(float dividend, float divisor) {
    return dividend * approximate_reciprocal(divisor);
  }
};

// For new roots, which are stored as codes of 8 bits.
struct RootsForCodes {
  static __device__ __forceinline__ float root(float value) { return approximate_root(value); }
};

// For m and v in codes of 8 bits, where v is its root.
struct KnownRoots {
  static __device__ __forceinline__ float root(float root) { return root; }
  static __device__ __forceinline__ float quotient(float dividend, float divisor) {
    return dividend * approximate_reciprocal(divisor);
  }
};

}  // namespace prodigy::cuda
