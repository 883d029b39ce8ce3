// Float16Runs: to be included by a file for each instruction set that converts float16, and by no other (see
// cpu/lanes.h).
#pragma once

#include "cpu/halves.h"
#include "cpu/lanes.h"
#include "cpu/vector.h"

#if defined(PRODIGY_HAS_CLONES) && !defined(__F16C__)
#error "to be compiled for x86-64-v3 or later, see csrc/CMakeLists.txt"
#endif

namespace prodigy::cpu {

template <class F>
PRODIGY_INLINE F load_float16(const std::uint16_t* from) {
#if defined(__AVX512F__)
  if constexpr (kLanesOf<F> == 16) {
    return bits_as<F>(_mm512_maskz_cvtph_ps(kAllLanes, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from))));
  }
#elif defined(__F16C__)
  if constexpr (kLanesOf<F> == 8) {
    return bits_as<F>(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
  }
#endif
  if constexpr (kLanesOf<F> == 1) return widen<Type::kFloat16>(*from);
}

// To nearest. value: not a NaN, but for the quiet one without a payload.
template <class F>
PRODIGY_INLINE void store_float16(F value, std::uint16_t* to) {
#if defined(__AVX512F__)
  if constexpr (kLanesOf<F> == 16) {
    return _mm256_storeu_si256(reinterpret_cast<__m256i*>(to),
                               _mm512_maskz_cvtps_ph(kAllLanes, bits_as<__m512>(value), _MM_FROUND_TO_NEAREST_INT));
  }
#elif defined(__F16C__)
  if constexpr (kLanesOf<F> == 8) {
    return _mm_storeu_si128(reinterpret_cast<__m128i*>(to),
                            _mm256_cvtps_ph(bits_as<__m256>(value), _MM_FROUND_TO_NEAREST_INT));
  }
#endif
  if constexpr (kLanesOf<F> == 1) *to = nearest<Type::kFloat16>(value);
}

// `rounded`, or that NaN where `value` is one.
template <class F>
PRODIGY_INLINE F unless_nan(F rounded, F value) {
  const WordOf<F> nan = kQuietNaN;
  return select(value == value, rounded, float_of((word_of(value) & WordOf<F>(kSign)) | nan));
}

// The float16 that `stochastic` of prodigy/rounding.h rounds to.
template <class F>
PRODIGY_INLINE F stochastic_float16(F value, WordOf<F> random) {
  using W = WordOf<F>;
  const W sign = word_of(value) & W(kSign), size = word_of(value) & W(~kSign);
  const F normal = float_of((size + (random >> 19)) & W(~0x1fffu));
  // In units of 2^-24, the same for all subnormal numbers.
  const auto is_subnormal = size < W(kHalfNormal);
  const F units = select(is_subnormal, float_of(size), F(0.0f)) * F(0x1p24f), whole = truncated(units);
  const F draw = whole_float(random >> 8) * F(0x1p-24f);
  const F subnormal = (whole + select(draw < units - whole, F(1.0f), F(0.0f))) * F(0x1p-24f);
  return unless_nan(float_of(word_of(select(is_subnormal, subnormal, normal)) | sign), value);
}

template <int kLanes>
void Float16Runs<kLanes>::widen(const std::uint16_t* from, int n, float* to) {
  each_vector<Lanes<float, kLanes>>(
      n, [&](int i, int, auto float_like) { store_as(load_float16<decltype(float_like)>(from + i), to + i); });
}

template <int kLanes>
void Float16Runs<kLanes>::nearest(const float* from, int n, std::uint16_t* to) {
  each_vector<Lanes<float, kLanes>>(n, [&](int i, int, auto float_like) {
    const auto value = load_as<decltype(float_like)>(from + i);
    store_float16(unless_nan(value, value), to + i);
  });
}

template <int kLanes>
void Float16Runs<kLanes>::stochastic(const float* from, int n, std::uint16_t* to, const std::uint32_t* bits) {
  each_vector<Lanes<float, kLanes>>(n, [&](int i, int, auto float_like) {
    using V = decltype(float_like);
    store_float16(stochastic_float16(load_as<V>(from + i), load_as<WordOf<V>>(bits + i)), to + i);
  });
}

template <int kLanes>
void Float16Runs<kLanes>::displaced(const std::uint16_t* from, int n, const float* x0, float* delta, float* x) {
  each_vector<Lanes<float, kLanes>>(n, [&](int i, int, auto float_like) {
    using V = decltype(float_like);
    const V start = load_as<V>(x0 + i), before = load_as<V>(delta + i);
    std::uint16_t rounded[kLanesOf<V>];
    store_float16(start + before, rounded);
    const V now = displacement(load_float16<V>(rounded), load_float16<V>(from + i), start, before);
    store_as(now, delta + i);
    store_as(start + now, x + i);
  });
}

template <int kLanes>
void Float16Runs<kLanes>::place(const float* x0, const float* delta, int n, std::uint16_t* to) {
  each_vector<Lanes<float, kLanes>>(n, [&](int i, int, auto float_like) {
    using V = decltype(float_like);
    const V x = load_as<V>(x0 + i) + load_as<V>(delta + i);
    store_float16(unless_nan(x, x), to + i);
  });
}

}  // namespace prodigy::cpu
