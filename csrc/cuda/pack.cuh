// Elements in registers, and how they are loaded and stored: a pack at a time where addresses allow.
//
// The kernels exist for tensors that are stored in the type T of the arithmetic, and (kMixed) for those that are not,
// whose types are known at run time only. They are the same for all threads of a block, so that asking costs little.
#pragma once

#include <type_traits>

#include "cuda/arguments.h"
#include "prodigy/rounding.h"

namespace prodigy::cuda {

template <class T>
constexpr int kILP = 16 / sizeof(T);

// kCount consecutive elements of an array: kILP, and where the array has another type than the arithmetic, as many as
// that has.
template <class T, int kCount = kILP<T>>
struct alignas(kCount * sizeof(T)) Pack {
  T value[kCount];
};

using HalfPack = Pack<std::uint16_t, kILP<float>>;

// The compiler cannot know where an address read from a table points to; generic loads are slower than global ones.
template <class T>
__device__ __forceinline__ T* global(T* address) {
  __builtin_assume(__isGlobal(address));
  return address;
}

// kFull: all elements are there, at an aligned address. Else only the first `count`, one by one; the rest are 0.
template <bool kFull, class P, class T>
__device__ __forceinline__ P load_pack(const T* from, int count) {
  if constexpr (kFull) {
    return *reinterpret_cast<const P*>(global(from));
  } else {
    P pack;
#pragma unroll
    for (int e = 0; e < int(sizeof(P) / sizeof(T)); ++e) pack.value[e] = e < count ? global(from)[e] : T(0);
    return pack;
  }
}

template <bool kFull, class P, class T>
__device__ __forceinline__ void store_pack(T* to, const P& pack, int count) {
  if constexpr (kFull) {
    *reinterpret_cast<P*>(global(to)) = pack;
  } else {
#pragma unroll
    for (int e = 0; e < int(sizeof(P) / sizeof(T)); ++e) {
      if (e < count) global(to)[e] = pack.value[e];
    }
  }
}

// -- arrays of the arithmetic's type ---------------------------------------------------------------------------------

template <class T, bool kMixed>
struct Array {
  T* __restrict__ data;

  __device__ __forceinline__ Array(const void* address, Type) : data(static_cast<T*>(const_cast<void*>(address))) {}
  __device__ __forceinline__ bool aligned() const {
    return reinterpret_cast<std::uintptr_t>(data) % sizeof(Pack<T>) == 0;
  }
};

template <bool kFull, class T>
__device__ __forceinline__ Pack<T> load(const Array<T, false>& from, std::int64_t i, int count) {
  return load_pack<kFull, Pack<T>>(from.data + i, count);
}

template <class T>
__device__ __forceinline__ Pack<T> widened(const Array<T, false>&, const Pack<T>& loaded) {
  return loaded;
}

template <class T>
__device__ __forceinline__ T load_one(const Array<T, false>& from, std::int64_t i) {
  return global(from.data)[i];
}

template <class T, class Rounding>
__device__ __forceinline__ void store_one(const Array<T, false>& to, std::int64_t i, T value, const Rounding&) {
  global(to.data)[i] = value;
}

// The rounding is for arrays of 16 bits.
template <bool kFull, class T, class Rounding>
__device__ __forceinline__ void store(const Array<T, false>& to, std::int64_t i, int count, const Pack<T>& pack,
                                      const Rounding&) {
  store_pack<kFull>(to.data + i, pack, count);
}

// -- arrays of any type, in float32 ----------------------------------------------------------------------------------

template <>
struct Array<float, true> {
  void* __restrict__ data;
  Type type;

  __device__ __forceinline__ Array(const void* address, Type t) : data(const_cast<void*>(address)), type(t) {}
  __device__ __forceinline__ float* floats() const { return static_cast<float*>(data); }
  __device__ __forceinline__ std::uint16_t* halves() const { return static_cast<std::uint16_t*>(data); }
  __device__ __forceinline__ bool aligned() const {
    return reinterpret_cast<std::uintptr_t>(data) % unsigned(kILP<float> * size_of(type)) == 0;
  }
};

__device__ __forceinline__ float widened(Type type, std::uint16_t half) {
  return type == Type::kBFloat16 ? widen<Type::kBFloat16>(half) : widen<Type::kFloat16>(half);
}

// As loaded: 16-bit numbers are packed into the first two places. They are widened only after all loads of the pack
// have been issued.
template <bool kFull>
__device__ __forceinline__ Pack<float> load(const Array<float, true>& from, std::int64_t i, int count) {
  if (from.type == Type::kFloat32) return load_pack<kFull, Pack<float>>(from.floats() + i, count);
  const HalfPack halves = load_pack<kFull, HalfPack>(from.halves() + i, count);
  Pack<float> loaded{};
#pragma unroll
  for (int e = 0; e < kILP<float> / 2; ++e) {
    loaded.value[e] = bits_as<float>(halves.value[2 * e] | std::uint32_t(halves.value[2 * e + 1]) << 16);
  }
  return loaded;
}

__device__ __forceinline__ Pack<float> widened(const Array<float, true>& from, const Pack<float>& loaded) {
  if (from.type == Type::kFloat32) return loaded;
  Pack<float> wide;
#pragma unroll
  for (int e = 0; e < kILP<float>; ++e) {
    const auto two = bits_as<std::uint32_t>(loaded.value[e / 2]);
    wide.value[e] = widened(from.type, std::uint16_t(e % 2 == 0 ? two : two >> 16));
  }
  return wide;
}

__device__ __forceinline__ float load_one(const Array<float, true>& from, std::int64_t i) {
  if (from.type == Type::kFloat32) return global(from.floats())[i];
  return widened(from.type, global(from.halves())[i]);
}

// Rounds to nearest.
struct Nearest {
  __device__ __forceinline__ std::uint16_t operator()(Type type, float value, int) const {
    return type == Type::kBFloat16 ? nearest<Type::kBFloat16>(value) : nearest<Type::kFloat16>(value);
  }
};

template <class Rounding>
__device__ __forceinline__ void store_one(const Array<float, true>& to, std::int64_t i, float value,
                                          const Rounding& rounding) {
  if (to.type == Type::kFloat32) {
    global(to.floats())[i] = value;
  } else {
    global(to.halves())[i] = rounding(to.type, value, 0);
  }
}

// Which values of an element are rounded stochastically.
enum class Rounded { kX, kV, kS };

// Rounds stochastically. `i`: the position of a pack's first element.
template <Rounded kWhich>
struct Stochastic {
  RandomBits random;
  std::int64_t i;

  __device__ __forceinline__ std::uint16_t operator()(Type type, float value, int e) const {
    std::uint32_t bits = random.of(i + e);
    if (kWhich == Rounded::kV) bits = second(bits);
    if (kWhich == Rounded::kS) bits = third(bits);
    return type == Type::kBFloat16 ? stochastic<Type::kBFloat16>(value, bits) : stochastic<Type::kFloat16>(value, bits);
  }
};

template <bool kFull, class Rounding>
__device__ __forceinline__ void store(const Array<float, true>& to, std::int64_t i, int count, const Pack<float>& pack,
                                      const Rounding& rounding) {
  if (to.type == Type::kFloat32) {
    store_pack<kFull>(to.floats() + i, pack, count);
    return;
  }
  HalfPack halves;
#pragma unroll
  for (int e = 0; e < kILP<float>; ++e) halves.value[e] = rounding(to.type, pack.value[e], e);
  store_pack<kFull>(to.halves() + i, halves, count);
}

// -- tensors ---------------------------------------------------------------------------------------------------------

// The arrays of one tensor.
template <class T, bool kMixed>
struct Arrays {
  Array<T, kMixed> x, grad, m, v, s, x0;
  Array<T, false> delta;
  std::uint32_t index;
  bool stochastic;
  bool aligned;  // all arrays that are walked with one index are; chunks begin at multiples of a pack

  __device__ __forceinline__ Arrays(const Tensor& t, const Gradient& gradient)
      : x(t.x, t.type),
        grad(gradient.data, gradient.type),
        m(t.m, t.state_type),
        v(t.v, t.state_type),
        s(t.s, t.state_type),
        x0(t.x0, t.type),
        delta(t.delta, Type::kFloat32),
        index(t.index),
        stochastic(t.stochastic) {
    aligned = x.aligned() && grad.aligned() && m.aligned() && v.aligned() && delta.aligned();
    if (t.slice_p == 1) aligned = aligned && s.aligned() && x0.aligned();
  }
  __device__ __forceinline__ bool displaced() const { return kMixed && delta.data != nullptr; }
};

// Calls visit(i, count, full) for this thread's packs of a chunk. Which thread gets which elements does not depend on
// addresses, so neither do the sums.
template <class T, class Visit>
__device__ __forceinline__ void each_pack(const Chunk& chunk, bool aligned, Visit visit) {
  const int size = int(chunk.end - chunk.begin);
  for (int offset = int(threadIdx.x) * kILP<T>; offset < size; offset += kBlockSize * kILP<T>) {
    const std::int64_t i = chunk.begin + offset;
    const int count = size - offset < kILP<T> ? size - offset : kILP<T>;
    if (aligned && count == kILP<T>) {
      visit(i, count, std::true_type());
    } else {
      visit(i, count, std::false_type());
    }
  }
}

}  // namespace prodigy::cuda
