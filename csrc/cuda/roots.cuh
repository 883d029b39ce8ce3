// m / (sqrt(v) + d_eps) for a pack.
//
// Note [Quick quotients]
// nvcc makes of an exactly rounded root or quotient a quick way for ordinary numbers, a test, and a subroutine for
// others: with the test and the branch for each of them, a third of a kernel's instructions. Here a pack asks once. All
// its elements go the quick way, which is nvcc's; should a root or a quotient then be out of the range in which its
// remainder is a float32, and so the result rounded correctly, all go the careful way. The results are the same.
#pragma once

#include "cuda/array.cuh"

namespace prodigy::cuda {

// ordinary: becomes false if the result may be wrong, as it is if anything is infinite or NaN.
__device__ __forceinline__ float quick_quotient(float m, float v, float d_eps, bool& ordinary) {
  const float inverse = approximate_inverse_root(v), rough = v * inverse;
  const float root = __fmaf_rn(__fmaf_rn(-rough, rough, v), 0.5f * inverse, rough), divisor = root + d_eps;
  const float start = approximate_reciprocal(divisor);
  const float reciprocal = __fmaf_rn(start, __fmaf_rn(-divisor, start, 1.0f), start), near = m * reciprocal;
  const float result = __fmaf_rn(reciprocal, __fmaf_rn(-divisor, near, m), near);
  ordinary = ordinary & (root >= 0x1p-50f) & (std::fabs(result) >= 0x1p-48f);  // not &&, which are branches
  return result;
}

// Not inline: it is rare, and long.
template <class T>
__device__ __noinline__ T careful_quotient(T m, T v, T d_eps) {
  return quotient<ExactRoots>(m, v, d_eps);
}

template <class Roots, class T, int kCount>
__device__ __forceinline__ Pack<T, kCount> quotients(const Pack<T, kCount>& m, const Pack<T, kCount>& v, T d_eps) {
  Pack<T, kCount> found;
  if constexpr (std::is_same_v<Roots, ExactRoots> && std::is_same_v<T, float>) {
    bool ordinary = d_eps <= 0x1p60f;
#pragma unroll
    for (int e = 0; e < kCount; ++e) found.value[e] = quick_quotient(m.value[e], v.value[e], d_eps, ordinary);
    if (ordinary) return found;
#pragma unroll
    for (int e = 0; e < kCount; ++e) found.value[e] = careful_quotient(m.value[e], v.value[e], d_eps);
  } else {
#pragma unroll
    for (int e = 0; e < kCount; ++e) found.value[e] = quotient<Roots>(m.value[e], v.value[e], d_eps);
  }
  return found;
}

}  // namespace prodigy::cuda
