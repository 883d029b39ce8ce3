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

// To within 1 unit in the last place; of subnormal numbers, too.
__device__ __forceinline__ float approximate_root(float value) {
  float root;
  asm("sqrt.approx.f32 %0, %1;" : "=f"(root) : "f"(value));
  return root;
}

// To within 2 units in the last place for 2^-126 <= |divisor| <= 2^126.
__device__ __forceinline__ float approximate_quotient(float dividend, float divisor) {
  return __fdividef(dividend, divisor);
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

}  // namespace prodigy::cuda
#else
#include "intrinsics.h"
#endif

namespace prodigy::cuda {

// Where m and v are stored with 16 bits, a root and a quotient that are off by at most 3 units in the last of float32's
// places are exact: the rounding of m and v is 2^14 times as coarse. The kernel would else wait for arithmetic, not for
// memory. A divisor is in approximate_quotient's range: a root is at least 2^-75 and less than 2^64, or 0; then m is 0,
// too, or so is the quotient's share of a 16-bit x.
struct ApproximateRoots {
  static __device__ __forceinline__ float root(float value) { return approximate_root(value); }
  static __device__ __forceinline__ float quotient(float dividend, float divisor) {
    return approximate_quotient(dividend, divisor);
  }
};

// The same for m and v in codes of 8 bits, where v is its root.
struct KnownRoots {
  static __device__ __forceinline__ float root(float root) { return root; }
  static __device__ __forceinline__ float quotient(float dividend, float divisor) {
    return dividend * approximate_reciprocal(divisor);
  }
};

}  // namespace prodigy::cuda
