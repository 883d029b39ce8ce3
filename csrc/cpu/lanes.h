// Numbers in a vector register: for loops with bytes in them, which compilers do not vectorise well by themselves.
//
// To be included only where all code is compiled for one instruction set: a compiler takes operations on vectors apart
// before it inlines a function into one that is for better processors.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "cpu/sums.h"
#include "prodigy/eight_bits.h"

namespace prodigy::cpu {

template <class T, int kLanes>
struct RegisterOf {
#if defined(__GNUC__)
  using type [[gnu::vector_size(kLanes * int(sizeof(T)))]] = T;
  using in_memory [[gnu::vector_size(kLanes * int(sizeof(T))), gnu::aligned(1), gnu::may_alias]] = T;
#endif
};
template <class T, int kLanes>
using Register = typename RegisterOf<T, kLanes>::type;

// T: float or std::uint32_t.
template <class T, int kLanes>
struct Lanes {
  Register<T, kLanes> all;

  Lanes() = default;
  PRODIGY_INLINE Lanes(T each) : all(each - Register<T, kLanes>{}) {}
  static PRODIGY_INLINE Lanes of(Register<T, kLanes> all) {
    Lanes lanes;
    lanes.all = all;
    return lanes;
  }

  friend PRODIGY_INLINE Lanes operator+(Lanes a, Lanes b) { return of(a.all + b.all); }
  friend PRODIGY_INLINE Lanes operator-(Lanes a, Lanes b) { return of(a.all - b.all); }
  friend PRODIGY_INLINE Lanes operator-(Lanes a) { return of(-a.all); }
  friend PRODIGY_INLINE Lanes operator*(Lanes a, Lanes b) { return of(a.all * b.all); }
  friend PRODIGY_INLINE Lanes operator/(Lanes a, Lanes b) { return of(a.all / b.all); }
  friend PRODIGY_INLINE Lanes operator&(Lanes a, Lanes b) { return of(a.all & b.all); }
  friend PRODIGY_INLINE Lanes operator|(Lanes a, Lanes b) { return of(a.all | b.all); }
  friend PRODIGY_INLINE Lanes operator^(Lanes a, Lanes b) { return of(a.all ^ b.all); }
  friend PRODIGY_INLINE Lanes operator<<(Lanes a, int places) { return of(a.all << places); }
  friend PRODIGY_INLINE Lanes operator>>(Lanes a, int places) { return of(a.all >> places); }
  friend PRODIGY_INLINE auto operator<(Lanes a, Lanes b) { return a.all < b.all; }
  friend PRODIGY_INLINE auto operator>(Lanes a, Lanes b) { return a.all > b.all; }
  friend PRODIGY_INLINE auto operator==(Lanes a, Lanes b) { return a.all == b.all; }
};

// Functions that there are for float, too.
using prodigy::float_of;
using prodigy::larger;
using prodigy::lesser;
using prodigy::product_plus;
using prodigy::select;
using prodigy::whole_float;
using prodigy::word_of;
using std::fabs;
using std::sqrt;

template <class Mask, class T, int kLanes>
PRODIGY_INLINE Lanes<T, kLanes> select(Mask mask, Lanes<T, kLanes> a, Lanes<T, kLanes> b) {
  return Lanes<T, kLanes>::of(mask ? a.all : b.all);
}
template <class T, int kLanes>
PRODIGY_INLINE Lanes<T, kLanes> larger(Lanes<T, kLanes> a, Lanes<T, kLanes> b) {
  return Lanes<T, kLanes>::of(a.all > b.all ? a.all : b.all);
}
template <class T, int kLanes>
PRODIGY_INLINE Lanes<T, kLanes> lesser(Lanes<T, kLanes> a, Lanes<T, kLanes> b) {
  return Lanes<T, kLanes>::of(a.all < b.all ? a.all : b.all);
}
template <int kLanes>
PRODIGY_INLINE Lanes<std::uint32_t, kLanes> word_of(Lanes<float, kLanes> value) {
  return bits_as<Lanes<std::uint32_t, kLanes>>(value);
}
template <int kLanes>
PRODIGY_INLINE Lanes<float, kLanes> float_of(Lanes<std::uint32_t, kLanes> word) {
  return bits_as<Lanes<float, kLanes>>(word);
}
template <int kLanes>
PRODIGY_INLINE Lanes<float, kLanes> fabs(Lanes<float, kLanes> value) {
  return float_of(word_of(value) & Lanes<std::uint32_t, kLanes>(~kSign));
}

template <int kLanes>
PRODIGY_INLINE Lanes<float, kLanes> sqrt(Lanes<float, kLanes> value) {
  Lanes<float, kLanes> root;
  for (int lane = 0; lane < kLanes; ++lane) root.all[lane] = std::sqrt(value.all[lane]);
  return root;
}
template <int kLanes>
PRODIGY_INLINE Lanes<float, kLanes> whole_float(Lanes<std::uint32_t, kLanes> word) {
  const auto whole = bits_as<Register<std::int32_t, kLanes>>(word);
  return Lanes<float, kLanes>::of(__builtin_convertvector(whole, Register<float, kLanes>));
}
// value: fits 32 bits.
PRODIGY_INLINE float truncated(float value) { return float(std::int32_t(value)); }
template <int kLanes>
PRODIGY_INLINE Lanes<float, kLanes> truncated(Lanes<float, kLanes> value) {
  const auto whole = __builtin_convertvector(value.all, Register<std::int32_t, kLanes>);
  return Lanes<float, kLanes>::of(__builtin_convertvector(whole, Register<float, kLanes>));
}
template <int kLanes>
PRODIGY_INLINE Lanes<float, kLanes> product_plus(Lanes<float, kLanes> a, float factor, Lanes<float, kLanes> b) {
#if defined(__FMA__)
  for (int lane = 0; lane < kLanes; ++lane) b.all[lane] = __builtin_fmaf(a.all[lane], factor, b.all[lane]);
  return b;
#else
  return a * factor + b;
#endif
}

// -- memory -----------------------------------------------------------------------------------------------------------

// F: float, or Lanes of it.
template <class F>
constexpr int kLanesOf = int(sizeof(F) / sizeof(float));

// To, From: what the memory holds, or Lanes of it. By memcpy, a vector would be taken apart.
template <class To, class T>
PRODIGY_INLINE To load_as(const T* from) {
  if constexpr (std::is_same_v<To, T>) {
    return *from;
  } else {
    using InMemory = typename RegisterOf<T, kLanesOf<To>>::in_memory;
    return To::of(*reinterpret_cast<const InMemory*>(from));
  }
}
template <class From, class T>
PRODIGY_INLINE void store_as(From from, T* to) {
  if constexpr (std::is_same_v<From, T>) {
    *to = from;
  } else {
    using InMemory = typename RegisterOf<T, kLanesOf<From>>::in_memory;
    *reinterpret_cast<InMemory*>(to) = from.all;
  }
}

// Without it, GCC 12 warns of a register that it leaves undefined.
constexpr std::uint16_t kAllLanes = 0xffff;

// Bytes, of type std::uint8_t or std::int8_t, as words.
template <class F, class Byte>
PRODIGY_INLINE WordOf<F> load_bytes(const Byte* from) {
  [[maybe_unused]] constexpr bool kSigned = std::is_signed_v<Byte>;
  std::uint32_t words[kLanesOf<F>];
#if defined(__AVX512F__)
  if constexpr (kLanesOf<F> == 16) {
    const auto bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
    return bits_as<WordOf<F>>(kSigned ? _mm512_maskz_cvtepi8_epi32(kAllLanes, bytes)
                                      : _mm512_maskz_cvtepu8_epi32(kAllLanes, bytes));
  }
#elif defined(__AVX2__)
  if constexpr (kLanesOf<F> == 8) {
    const auto bytes = _mm_loadu_si64(from);
    return bits_as<WordOf<F>>(kSigned ? _mm256_cvtepi8_epi32(bytes) : _mm256_cvtepu8_epi32(bytes));
  }
#endif
  for (int lane = 0; lane < kLanesOf<F>; ++lane) words[lane] = std::uint32_t(std::int32_t(from[lane]));
  return load_as<WordOf<F>>(words);
}

// Stores the lowest bytes of words.
template <class W, class Byte>
PRODIGY_INLINE void store_bytes(W words, Byte* to) {
#if defined(__AVX512F__)
  if constexpr (kLanesOf<W> == 16)
    return _mm_storeu_si128(reinterpret_cast<__m128i*>(to),
                            _mm512_maskz_cvtepi32_epi8(kAllLanes, bits_as<__m512i>(words)));
#elif defined(__AVX2__)
  if constexpr (kLanesOf<W> == 8) {
    const auto lowest = _mm256_shuffle_epi8(bits_as<__m256i>(words), _mm256_set1_epi32(0x0c080400));
    const auto low = _mm256_castsi256_si128(lowest), high = _mm256_extracti128_si256(lowest, 1);
    return _mm_storeu_si64(to, _mm_unpacklo_epi32(low, high));
  }
#endif
  std::uint32_t each[kLanesOf<W>];
  store_as(words, each);
  for (int lane = 0; lane < kLanesOf<W>; ++lane) to[lane] = Byte(each[lane]);
}

// Calls visit(i, lane, F()) for vectors from element i on, and visit(i, lane, float()) for those that are left over at
// the end; lane: the first of kSumLanes that they are in.
template <class F, class Visit>
PRODIGY_INLINE void each_vector(int n, Visit visit) {
  int i = 0;
  for (; i + kSumLanes <= n; i += kSumLanes) {
    for (int lane = 0; lane < kSumLanes; lane += kLanesOf<F>) visit(i + lane, lane, F());
  }
  for (int lane = 0; i < n; ++i, ++lane) visit(i, lane, float());
}

}  // namespace prodigy::cpu
