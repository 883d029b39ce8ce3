// Arrays in global memory, and packs of their elements in registers: loaded and stored 16 bytes at a time where
// addresses allow.
#pragma once

#include "cuda/policy.h"
#include "cuda/rounding.cuh"

namespace prodigy::cuda {

// Consecutive elements as the arithmetic sees them.
template <class T, int kCount>
struct Pack {
  T value[kCount];
};

// Consecutive elements as they lie in memory; those of 16 bits, two in a word, and of 8, four. They are widened only
// after all loads of a pack have been issued.
template <class Number, int kCount>
struct Raw {
  using Word = std::conditional_t<sizeof(Number) < 4, std::uint32_t, Number>;
  static constexpr int kBytes = kCount * sizeof(Number);
  static constexpr int kWords = kBytes < int(sizeof(Word)) ? 1 : kBytes / int(sizeof(Word));
  Word word[kWords];
};

// Room for floats.
template <int kCount>
struct Raw<AnyNumber, kCount> {
  std::uint32_t word[kCount];
};

// The compiler cannot know where an address read from a table points to; generic loads are slower than global ones.
template <class T>
__device__ __forceinline__ T* global(T* address) {
  __builtin_assume(__isGlobal(address));
  return address;
}

// Calls visit(std::true_type()) or visit(std::false_type()): there is code for both, in which the condition is known.
template <class Visit>
__device__ __forceinline__ void as_constant(bool condition, Visit visit) {
  condition ? visit(std::true_type()) : visit(std::false_type());
}

// The words that one access to memory moves.
template <class R>
constexpr int kWordsAtATime = sizeof(R) < 16 ? R::kWords : int(16 / sizeof(typename R::Word));

template <class R>
struct alignas(kWordsAtATime<R> * sizeof(typename R::Word)) Access {
  typename R::Word word[kWordsAtATime<R>];
};

// -- arrays of a known type ------------------------------------------------------------------------------------------

template <class Number>
struct Array {
  Number* data;

  __device__ __forceinline__ Array(const void* address, Type)
      : data(static_cast<Number*>(const_cast<void*>(address))) {}
  // The address of element i; of one of a chunk, by arithmetic of 32 bits.
  __device__ __forceinline__ Number* at(std::int64_t i) const { return data + i; }
  __device__ __forceinline__ Number* at(std::uint32_t i) const {
    return reinterpret_cast<Number*>(reinterpret_cast<char*>(data) + i * std::uint32_t(sizeof(Number)));
  }
  __device__ __forceinline__ void advance(std::int64_t count) {
    if (data != nullptr) data += count;
  }
  // Whether packs can be moved at once from element i on.
  template <int kCount>
  __device__ __forceinline__ bool aligned(std::int64_t i) const {
    return (reinterpret_cast<std::uintptr_t>(data) + i * sizeof(Number)) % sizeof(Access<Raw<Number, kCount>>) == 0;
  }
};

// kFull: all elements are there, at an aligned address. Else only the first `count`, one by one; the rest are 0.
template <bool kFull, int kCount, class Number, class Index>
__device__ __forceinline__ void load(const Array<Number>& from, Index i, int count, Raw<Number, kCount>& raw) {
  using R = Raw<Number, kCount>;
  const Number* first = from.at(i);
  if constexpr (kFull) {
#pragma unroll
    for (int w = 0; w < R::kWords; w += kWordsAtATime<R>) {
      const auto part = global(reinterpret_cast<const Access<R>*>(first))[w / kWordsAtATime<R>];
#pragma unroll
      for (int k = 0; k < kWordsAtATime<R>; ++k) raw.word[w + k] = part.word[k];
    }
  } else if constexpr (sizeof(Number) >= 4) {
#pragma unroll
    for (int e = 0; e < kCount; ++e) raw.word[e] = e < count ? global(first)[e] : Number(0);
  } else if constexpr (sizeof(Number) == 1) {
    raw = {};
#pragma unroll
    for (int e = 0; e < kCount; ++e) {
      if (e < count) raw.word[e / 4] |= std::uint32_t(std::uint8_t(global(first)[e])) << (e % 4 * 8);
    }
  } else {
#pragma unroll
    for (int e = 0; e < kCount; e += 2) {
      const std::uint32_t low = e < count ? global(first)[e].bits : 0,
                          high = e + 1 < count ? global(first)[e + 1].bits : 0;
      raw.word[e / 2] = low | high << 16;
    }
  }
}

template <bool kFull, int kCount, class Number, class Index>
__device__ __forceinline__ void store(const Array<Number>& to, Index i, int count, const Raw<Number, kCount>& raw) {
  using R = Raw<Number, kCount>;
  Number* first = to.at(i);
  if constexpr (kFull) {
#pragma unroll
    for (int w = 0; w < R::kWords; w += kWordsAtATime<R>) {
      Access<R> part;
#pragma unroll
      for (int k = 0; k < kWordsAtATime<R>; ++k) part.word[k] = raw.word[w + k];
      global(reinterpret_cast<Access<R>*>(first))[w / kWordsAtATime<R>] = part;
    }
  } else {
#pragma unroll
    for (int e = 0; e < kCount; ++e) {
      if (e >= count) continue;
      if constexpr (sizeof(Number) >= 4) {
        global(first)[e] = raw.word[e];
      } else if constexpr (sizeof(Number) == 1) {
        global(first)[e] = Number(raw.word[e / 4] >> (e % 4 * 8));
      } else {
        global(first)[e].bits = std::uint16_t(raw.word[e / 2] >> (e % 2 * 16));
      }
    }
  }
}

template <class T, class Number, int kCount>
__device__ __forceinline__ Pack<T, kCount> widened(const Array<Number>&, const Raw<Number, kCount>& raw) {
  Pack<T, kCount> pack;
#pragma unroll
  for (int e = 0; e < kCount; ++e) {
    if constexpr (sizeof(Number) >= 4) {
      pack.value[e] = raw.word[e];
    } else {
      const std::uint32_t two = raw.word[e / 2];
      pack.value[e] = e % 2 == 0 ? widen_low<kTypeOf<Number>>(two) : widen_high<kTypeOf<Number>>(two);
    }
  }
  return pack;
}

// The rounding is for arrays of 16 bits.
template <class Number, class T, int kCount, class Rounding>
__device__ __forceinline__ Raw<Number, kCount> narrowed(const Array<Number>&, const Pack<T, kCount>& pack,
                                                        const Rounding& rounding) {
  Raw<Number, kCount> raw;
#pragma unroll
  for (int w = 0; w < Raw<Number, kCount>::kWords; ++w) {
    if constexpr (sizeof(Number) >= 4) {
      raw.word[w] = pack.value[w];
    } else {
      raw.word[w] = rounding.template pair<kTypeOf<Number>>(pack.value[2 * w], pack.value[2 * w + 1], 2 * w);
    }
  }
  return raw;
}

template <class T, class Number>
__device__ __forceinline__ T load_one(const Array<Number>& from, std::int64_t i) {
  if constexpr (sizeof(Number) >= 4) {
    return global(from.data)[i];
  } else {
    return widen_low<kTypeOf<Number>>(global(from.data)[i].bits);
  }
}

// bits: for the rounding.
template <class Number, class T>
__device__ __forceinline__ void store_one(const Array<Number>& to, std::int64_t i, T value, std::uint32_t bits) {
  if constexpr (sizeof(Number) >= 4) {
    global(to.data)[i] = value;
  } else {
    global(to.data)[i].bits = stochastic<kTypeOf<Number>>(value, bits);
  }
}

// -- arrays of any type, in float32 ----------------------------------------------------------------------------------

// The type is the same for all threads of a block, so that asking costs little.
template <>
struct Array<AnyNumber> {
  void* data;
  Type type;

  __device__ __forceinline__ Array(const void* address, Type t) : data(const_cast<void*>(address)), type(t) {}
  template <int kCount>
  __device__ __forceinline__ bool aligned(std::int64_t i) const {
    return (reinterpret_cast<std::uintptr_t>(data) + i * size_of(type)) % unsigned(kCount * size_of(type)) == 0;
  }
  __device__ __forceinline__ void advance(std::int64_t count) {
    if (data != nullptr) data = static_cast<char*>(data) + count * size_of(type);
  }
  // Calls visit(array) with the array as one of its type.
  template <class Visit>
  __device__ __forceinline__ auto visit(Visit visit) const {
    if (type == Type::kFloat32) return visit(Array<float>(data, type));
    if (type == Type::kBFloat16) return visit(Array<BFloat16>(data, type));
    return visit(Array<Float16>(data, type));
  }
};

template <class To, class From, int kCount>
__device__ __forceinline__ Raw<To, kCount> raw_as(const Raw<From, kCount>& from) {
  constexpr int kFrom = sizeof(from.word) / 4, kTo = sizeof(Raw<To, kCount>) / 4;
  Raw<To, kCount> to{};
#pragma unroll
  for (int w = 0; w < (kFrom < kTo ? kFrom : kTo); ++w) {
    to.word[w] = bits_as<std::decay_t<decltype(to.word[w])>>(from.word[w]);
  }
  return to;
}

template <bool kFull, int kCount, class Index>
__device__ __forceinline__ void load(const Array<AnyNumber>& from, Index i, int count, Raw<AnyNumber, kCount>& raw) {
  from.visit([&](auto array) {
    Raw<std::decay_t<decltype(*array.data)>, kCount> typed;
    load<kFull>(array, i, count, typed);
    raw = raw_as<AnyNumber>(typed);
  });
}

template <bool kFull, int kCount, class Index>
__device__ __forceinline__ void store(const Array<AnyNumber>& to, Index i, int count,
                                      const Raw<AnyNumber, kCount>& raw) {
  to.visit([&](auto array) { store<kFull>(array, i, count, raw_as<std::decay_t<decltype(*array.data)>>(raw)); });
}

template <class T, int kCount>
__device__ __forceinline__ Pack<T, kCount> widened(const Array<AnyNumber>& from, const Raw<AnyNumber, kCount>& raw) {
  return from.visit([&](auto array) { return widened<T>(array, raw_as<std::decay_t<decltype(*array.data)>>(raw)); });
}

template <class T, int kCount, class Rounding>
__device__ __forceinline__ Raw<AnyNumber, kCount> narrowed(const Array<AnyNumber>& to, const Pack<T, kCount>& pack,
                                                           const Rounding& rounding) {
  return to.visit([&](auto array) { return raw_as<AnyNumber>(narrowed(array, pack, rounding)); });
}

template <class T>
__device__ __forceinline__ T load_one(const Array<AnyNumber>& from, std::int64_t i) {
  return from.visit([&](auto array) { return load_one<T>(array, i); });
}

template <class T>
__device__ __forceinline__ void store_one(const Array<AnyNumber>& to, std::int64_t i, T value, std::uint32_t bits) {
  to.visit([&](auto array) { store_one(array, i, value, bits); });
}

}  // namespace prodigy::cuda
