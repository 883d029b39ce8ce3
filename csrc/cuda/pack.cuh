// The arrays of one tensor, and a pack of each: the elements that a thread takes at a time.
#pragma once

#include "cuda/array.cuh"

namespace prodigy::cuda {

template <class Storage>
struct Arrays {
  static constexpr int kCount = Storage::kPerThread;
  Array<typename Storage::X> x, grad, x0;
  Array<typename Storage::State> m, v, s;
  Array<float> delta;
  Array<std::int8_t> low;
  std::uint32_t index;
  bool stochastic;
  std::int64_t begin = 0;  // the element from which on they are indexed, but for samples

  __device__ __forceinline__ Arrays(const Tensor& t, const Gradient& gradient)
      : x(t.x, t.type),
        grad(gradient.data, gradient.type),
        x0(t.x0, t.type),
        m(t.m, t.state_type),
        v(t.v, t.state_type),
        s(t.s, t.state_type),
        delta(t.delta, Type::kFloat32),
        low(t.low, Type::kInt8),
        index(t.index),
        stochastic(t.stochastic) {}

  // Those of a chunk, of which all but samples are indexed from its beginning on.
  __device__ __forceinline__ Arrays(const Tensor& t, const Gradient& gradient, const Chunk& chunk)
      : Arrays(t, gradient) {
    begin = chunk.begin;
    x.advance(begin);
    grad.advance(begin);
    m.advance(begin);
    v.advance(begin);
    delta.advance(begin);
    low.advance(begin);
    if (t.slice_p == 1) s.advance(begin);
    if (t.slice_p == 1 || displaced()) x0.advance(begin);
  }
  __device__ __forceinline__ bool displaced() const {
    if (Storage::kCoded) return false;
    return Storage::kBeside == Beside::kDelta || (Storage::kBeside == Beside::kAsked && delta.data != nullptr);
  }
  __device__ __forceinline__ bool extended() const {
    return Storage::kBeside == Beside::kLow || (Storage::kBeside == Beside::kAsked && low.data != nullptr);
  }
  // x of one element, with all the bits that are kept.
  __device__ __forceinline__ typename Storage::T load_x(std::int64_t i) const {
    if (!extended()) return load_one<typename Storage::T>(x, i);
    const auto* bits = reinterpret_cast<const std::uint16_t*>(x.data);
    return kept_value(global(bits)[i], global(low.data)[i]);
  }
  // Whether all arrays are, at the beginning of a chunk, that are walked with one index; sampled: not s and x0.
  __device__ __forceinline__ bool aligned(std::int64_t begin, bool sampled) const {
    const auto is = [&](const auto& array) { return array.template aligned<kCount>(begin); };
    return is(x) && is(grad) && is(m) && is(v) && (!displaced() || is(delta)) && (!extended() || is(low)) &&
           (sampled || (is(s) && is(x0)));
  }
};

// The random bits of a chunk's elements.
template <class Storage>
struct ChunkBits {
  RandomBits bits;
  std::int64_t shift, begin;  // begin: of the chunk, in the whole tensor
  std::uint32_t eights;
  std::uint32_t skipped;  // the factor for what the chunk lacks of its first eight

  __device__ __forceinline__ ChunkBits(std::uint32_t step, std::uint32_t tensor, Stream stream, const Chunk& chunk)
      : bits(step, tensor, stream, chunk.begin + chunk.shift),
        shift(chunk.shift),
        begin(chunk.begin + chunk.shift),
        eights(std::uint32_t(begin >> 3)),
        skipped(skip(std::uint32_t(chunk.begin + chunk.shift) % kEight)) {}

  // bits.run of the pack from element i of the chunk on.
  __device__ __forceinline__ std::uint32_t run(std::uint32_t i) const {
    if constexpr (Storage::kPerThread < kEight) return bits.run(begin + i);
    return bits.shared((i >> 3) + eights) * skipped;
  }
  // Of element i of the tensor.
  __device__ __forceinline__ std::uint32_t of(std::int64_t i) const { return bits.of(i + shift); }
};

// A pack as it lies in memory. What is not read is 0, or not used.
template <class Storage>
struct Loaded {
  static constexpr int kCount = Storage::kPerThread;
  Raw<typename Storage::X, kCount> grad, x, x0{};
  Raw<typename Storage::State, kCount> m{}, v, s{};
  Raw<float, kCount> delta;
  Raw<std::int8_t, kCount> low;
};

// A pack's positions, see Note [Position] of rule.h.
template <class T, int kCount>
struct Positions {
  Pack<T, kCount> x, at, origin;
};

// x with all the bits that are kept. in: Loaded or Moved.
template <class Storage, class Words>
__device__ __forceinline__ auto kept_values(const Arrays<Storage>& a, const Words& in) {
  auto x = widened<typename Storage::T>(a.x, in.x);
  if constexpr (Storage::kBeside == Beside::kLow || Storage::kBeside == Beside::kAsked) {
    if (!a.extended()) return x;
#pragma unroll
    for (int e = 0; e < Storage::kPerThread; ++e) x.value[e] = kept(x.value[e], in.low.word[e / 4], e % 4);
  }
  return x;
}

template <class Storage>
__device__ __forceinline__ auto positions(const Arrays<Storage>& a, const Loaded<Storage>& in) {
  constexpr int kCount = Storage::kPerThread;
  using T = typename Storage::T;
  const auto x = kept_values(a, in);
  Positions<T, kCount> p{x, x, Pack<T, kCount>{}};
  if constexpr (Storage::kBeside == Beside::kDelta || Storage::kBeside == Beside::kAsked) {
    if (!a.displaced()) return p;
    const auto delta = widened<T>(a.delta, in.delta);
    p.origin = widened<T>(a.x0, in.x0);
    Pack<T, kCount> sum;
#pragma unroll
    for (int e = 0; e < kCount; ++e) sum.value[e] = p.origin.value[e] + delta.value[e];
    const auto stored = widened<T>(a.x, narrowed(a.x, sum, Nearest()));
#pragma unroll
    for (int e = 0; e < kCount; ++e) {
      p.at.value[e] = displacement(stored.value[e], x.value[e], p.origin.value[e], delta.value[e]);
      p.x.value[e] = p.origin.value[e] + p.at.value[e];
    }
  }
  return p;
}

// The positions as they will lie in memory.
template <class Storage>
struct Moved {
  static constexpr int kCount = Storage::kPerThread;
  Raw<typename Storage::X, kCount> x;
  Raw<float, kCount> delta;
  Raw<std::int8_t, kCount> low;

  // run: of the pack, see RandomBits.
  template <class T>
  __device__ __forceinline__ Moved(const Arrays<Storage>& a, Positions<T, kCount> p, std::uint32_t run) {
    if constexpr (Storage::kBeside == Beside::kLow || Storage::kBeside == Beside::kAsked) {
      if (a.extended()) {
        round(p.at, Stochastic<Rounded::kX>{run});
        return;
      }
    }
    if (a.displaced()) {
      delta = narrowed(a.delta, p.at, Nearest());
#pragma unroll
      for (int e = 0; e < kCount; ++e) p.at.value[e] = p.origin.value[e] + p.at.value[e];
    }
    if (Storage::kRounds && a.stochastic && !a.displaced()) {
      x = narrowed(a.x, p.at, Stochastic<Rounded::kX>{run});
    } else {
      x = narrowed(a.x, p.at, Nearest());
    }
  }
  // To 24 bits.
  __device__ __forceinline__ void round(const Pack<float, kCount>& at, const Stochastic<Rounded::kX>& random) {
#pragma unroll
    for (int e = 0; e < kCount; e += 4) {
      const KeptWords k[] = {{at.value[e], random.bits(e)},
                             {at.value[e + 1], random.bits(e + 1)},
                             {at.value[e + 2], random.bits(e + 2)},
                             {at.value[e + 3], random.bits(e + 3)}};
      x.word[e / 2] = __byte_perm(k[0].x, k[1].x, 0x7632);
      x.word[e / 2 + 1] = __byte_perm(k[2].x, k[3].x, 0x7632);
      low.word[e / 4] =
          __byte_perm(__byte_perm(k[0].low, k[1].low, 0x51), __byte_perm(k[2].low, k[3].low, 0x51), 0x5410);
    }
  }
  template <bool kFull, class Index>
  __device__ __forceinline__ void write(const Arrays<Storage>& a, Index i, int count) const {
    store<kFull>(a.x, i, count, x);
    if (a.displaced()) store<kFull>(a.delta, i, count, delta);
    if (a.extended()) store<kFull>(a.low, i, count, low);
  }
};

// Calls visit(i, count, full) for this thread's packs of the elements [begin, end) of a chunk; full: all elements are
// there, at aligned addresses; else the first `count` are, or all if it is larger. Which thread gets which elements
// does not depend on addresses, so neither do the sums.
template <class Policy, class Visit>
__device__ __forceinline__ void each_pack(int begin, int end, bool aligned, Visit visit) {
  constexpr int kCount = Policy::Storage::kPerThread;
  const int last = held(aligned ? end - kCount : -1);
  for (int i = begin + int(threadIdx.x) * kCount; i < end; i += Policy::kThreads * kCount) {
    visit(std::uint32_t(i), end - i, i <= last);
  }
}

}  // namespace prodigy::cuda
