// How one block walks one chunk: the functors of the two kernels. Each thread loads packs, applies the rule and stores
// them.
#pragma once

#include <type_traits>

#include "cuda/pack.cuh"

namespace prodigy::cuda {

// One thread's part of the sums: a chunk gives it so few terms that T holds them.
template <class T>
struct LaneSums {
  T dot[kILP<T>], norm[kILP<T>];

  __device__ __forceinline__ LaneSums() {
#pragma unroll
    for (int e = 0; e < kILP<T>; ++e) dot[e] = norm[e] = T(0);
  }
  __device__ __forceinline__ void add(int lane, const Sums<T>& term) {
    dot[lane] += term.dot;
    norm[lane] += term.norm;
  }
  __device__ __forceinline__ Sums<double> total() const {
    Sums<double> sums{0.0, 0.0};
#pragma unroll
    for (int e = 0; e < kILP<T>; ++e) {
      sums.dot += double(dot[e]);
      sums.norm += double(norm[e]);
    }
    return sums;
  }
};

// Note [Sampling]
// Of EveryElement, EveryPth and NoElement, one object serves a chunk, and one Loaded a pack: its constructor loads s
// and x0 of the pack's samples, `has(e)` says whether element e is one.

// slice_p == 1: s and x0 are arrays like the others.
template <class T, bool kMixed>
struct EveryElement {
  static constexpr bool kMayBeDisplaced = kMixed;

  template <bool kFull>
  struct Loaded {
    Pack<T> s, x0;

    __device__ __forceinline__ Loaded(const EveryElement&, const Arrays<T, kMixed>& a, std::int64_t i, int count)
        : s(load<kFull>(a.s, i, count)), x0() {
      if (a.x0.data != nullptr) x0 = load<kFull>(a.x0, i, count);
    }
    __device__ __forceinline__ void widen(const Arrays<T, kMixed>& a) {
      s = widened(a.s, s);
      x0 = widened(a.x0, x0);
    }
    __device__ __forceinline__ bool has(int) const { return true; }
    __device__ __forceinline__ void store_s(const EveryElement&, const Arrays<T, kMixed>& a, std::int64_t i, int count,
                                            const RandomBits& random) const {
      store<kFull>(a.s, i, count, s, Stochastic<Rounded::kS>{random, i});
    }
  };

  __device__ __forceinline__ EveryElement(const Tensor&, const Chunk&) {}
};

// slice_p > 1: s and x0 hold the elements at row-major positions 0, p, 2p, ...
template <class T, bool kMixed>
struct EveryPth {
  static constexpr bool kMayBeDisplaced = false;  // a displacement needs all of x0

  const Tensor& tensor;
  std::int64_t begin, first_sample;
  // In elements, within the chunk, so that 32 bits are enough: 64-bit divisions would cost more than the memory
  // accesses.
  int first, period;

  template <bool kFull>
  struct Loaded {
    Pack<T> s, x0;
    unsigned present = 0;  // bit e: element e is a sample; its index is recomputed when stored, to save registers

    __device__ __forceinline__ Loaded(const EveryPth& p, const Arrays<T, kMixed>& a, std::int64_t i, int count)
        : s(), x0() {
#pragma unroll
      for (int e = 0; e < kILP<T>; ++e) {
        const std::int64_t sample = kFull || e < count ? p.sample_of(i + e) : -1;
        if (sample < 0) continue;
        present |= 1u << e;
        s.value[e] = load_one(a.s, sample);
        if (a.x0.data != nullptr) x0.value[e] = load_one(a.x0, sample);
      }
    }
    __device__ __forceinline__ void widen(const Arrays<T, kMixed>&) {}  // done by load_one
    __device__ __forceinline__ bool has(int e) const { return present >> e & 1u; }
    __device__ __forceinline__ void store_s(const EveryPth& p, const Arrays<T, kMixed>& a, std::int64_t i, int,
                                            const RandomBits& random) const {
#pragma unroll
      for (int e = 0; e < kILP<T>; ++e) {
        if (has(e)) store_one(a.s, p.sample_of(i + e), s.value[e], Stochastic<Rounded::kS>{random, i + e});
      }
    }
  };

  __device__ __forceinline__ EveryPth(const Tensor& t, const Chunk& chunk) : tensor(t), begin(chunk.begin) {
    first_sample = (begin + t.slice_p - 1) / t.slice_p;
    // Clamped to the chunk size: a larger distance means no sample here, a larger period no second one.
    const std::int64_t distance = first_sample * t.slice_p - begin;
    first = int(distance < kCudaChunkSize ? distance : kCudaChunkSize);
    period = int(t.slice_p < kCudaChunkSize ? t.slice_p : kCudaChunkSize);
  }
  // The index of element i among the samples; -1 if it is none.
  __device__ __forceinline__ std::int64_t sample_of(std::int64_t i) const {
    if (tensor.order.dims > 0) {
      const std::int64_t position = row_major(tensor.order, i);
      return position % tensor.slice_p == 0 ? position / tensor.slice_p : -1;
    }
    const int after_first = int(i - begin) - first;
    if (after_first < 0 || after_first % period != 0) return -1;
    return first_sample + after_first / period;
  }
};

// A frozen estimate: s is not there, and x0 only for a displacement.
template <class T, bool kMixed>
struct NoElement {
  static constexpr bool kMayBeDisplaced = kMixed;

  template <bool kFull>
  struct Loaded {
    Pack<T> s, x0;

    __device__ __forceinline__ Loaded(const NoElement&, const Arrays<T, kMixed>& a, std::int64_t i, int count)
        : s(), x0() {
      if (kMixed && a.x0.data != nullptr) x0 = load<kFull>(a.x0, i, count);
    }
    __device__ __forceinline__ void widen(const Arrays<T, kMixed>& a) { x0 = widened(a.x0, x0); }
    __device__ __forceinline__ bool has(int) const { return false; }
    __device__ __forceinline__ void store_s(const NoElement&, const Arrays<T, kMixed>&, std::int64_t, int,
                                            const RandomBits&) const {}
  };

  __device__ __forceinline__ NoElement(const Tensor&, const Chunk&) {}
};

// A pack's positions, see Note [Position] of rule.h.
template <class T>
struct Positions {
  Pack<T> x, at, origin;
};

template <class T, bool kMixed>
__device__ __forceinline__ Positions<T> positions(const Arrays<T, kMixed>& a, const Pack<T>& x, const Pack<T>& x0,
                                                  const Pack<T>& delta, bool displaced) {
  Positions<T> p{x, x, Pack<T>{}};
  if constexpr (kMixed) {
    if (!displaced) return p;
    p.origin = x0;
#pragma unroll
    for (int e = 0; e < kILP<T>; ++e) {
      p.at.value[e] = a.x.type == Type::kBFloat16
                          ? displacement<Type::kBFloat16>(x.value[e], x0.value[e], delta.value[e])
                          : displacement<Type::kFloat16>(x.value[e], x0.value[e], delta.value[e]);
      p.x.value[e] = x0.value[e] + p.at.value[e];
    }
  }
  return p;
}

template <bool kFull, class T, bool kMixed>
__device__ __forceinline__ void store_positions(const Arrays<T, kMixed>& a, std::int64_t i, int count, Positions<T> p,
                                                bool displaced, const RandomBits& random) {
  if constexpr (kMixed) {
    if (displaced) {
      store<kFull>(a.delta, i, count, p.at, Nearest());
#pragma unroll
      for (int e = 0; e < kILP<T>; ++e) p.at.value[e] = p.origin.value[e] + p.at.value[e];
    } else if (a.stochastic) {
      store<kFull>(a.x, i, count, p.at, Stochastic<Rounded::kX>{random, i});
      return;
    }
  }
  store<kFull>(a.x, i, count, p.at, Nearest());
}

// m, v, s and x of one pack, and its part of the sums. All loads come before the first use of one.
template <bool kFull, class T, bool kMixed, class Sampling>
__device__ __forceinline__ void update_pack(const Arrays<T, kMixed>& a, std::int64_t i, int count,
                                            const Coefficients<T>& c, const Sampling& sampling,
                                            const RandomBits& random, LaneSums<T>& sums) {
  Pack<T> grad = load<kFull>(a.grad, i, count);
  Pack<T> x = load<kFull>(a.x, i, count);
  Pack<T> v = load<kFull>(a.v, i, count);
  Pack<T> m{}, delta{};
  if (c.momentum) m = load<kFull>(a.m, i, count);
  const bool displaced = Sampling::kMayBeDisplaced && a.displaced();
  if (displaced) delta = load<kFull>(a.delta, i, count);
  typename Sampling::template Loaded<kFull> sampled(sampling, a, i, count);
  grad = widened(a.grad, grad);
  v = widened(a.v, v);
  m = widened(a.m, m);
  sampled.widen(a);
  Positions<T> p = positions(a, widened(a.x, x), sampled.x0, delta, displaced);
#pragma unroll
  for (int e = 0; e < kILP<T>; ++e) {
    const T g = gradient(grad.value[e], p.x.value[e], c);
    const T distance = displaced ? -p.at.value[e] : sampled.x0.value[e] - p.x.value[e];
    if (sampled.has(e)) sums.add(e, sample(g, distance, sampled.s.value[e], c));
    moments(g, m.value[e], v.value[e], c);
    p.at.value[e] = step(p.at.value[e], p.x.value[e], m.value[e], v.value[e], c);
  }
  sampled.store_s(sampling, a, i, count, random);
  store<kFull>(a.v, i, count, v, Stochastic<Rounded::kV>{random, i});
  if (!c.momentum) return;  // there is no m, and x is left to finish
  store<kFull>(a.m, i, count, m, Nearest());
  store_positions<kFull>(a, i, count, p, displaced, random);
}

template <class T, bool kMixed, class Sampling>
__device__ __forceinline__ Sums<double> update_sampling(const Tensor& t, const Gradient& grad, const Chunk& chunk,
                                                        const Coefficients<T>& c) {
  const Arrays<T, kMixed> a(t, grad);
  const Sampling sampling(t, chunk);
  const RandomBits random(c.k, a.index, kStepStream, chunk.begin);
  LaneSums<T> sums;
  each_pack<T>(chunk, a.aligned, [&](std::int64_t i, int count, auto full) {
    update_pack<decltype(full)::value>(a, i, count, c, sampling, random, sums);
  });
  return sums.total();
}

// Phase 1. Returns this thread's part of the sums, unweighted.
template <class T, bool kMixed>
__device__ __forceinline__ Sums<double> update_chunk(const Tensor& t, const Gradient& grad, const Chunk& chunk,
                                                     const Coefficients<T>& c) {
  if (t.s == nullptr) return update_sampling<T, kMixed, NoElement<T, kMixed>>(t, grad, chunk, c);
  if (t.slice_p == 1) return update_sampling<T, kMixed, EveryElement<T, kMixed>>(t, grad, chunk, c);
  return update_sampling<T, kMixed, EveryPth<T, kMixed>>(t, grad, chunk, c);
}

// The position after `finish`; `m` holds the gradient where there is no momentum.
template <class T>
__device__ __forceinline__ T finish_element(T at, T x, T origin, T m, T v, const GroupRow<T>& group) {
  const Coefficients<T>& c = group.c;
  if (group.how == Finish::kCorrect) return correct(at, m, v, group.old_d_eps, c);
  if (group.how == Finish::kUndo) return undo(at, origin, m, v, c);
  return step(at, x, c.momentum ? m : group.d_new * finite_or_zero(gradient(m, x, c)), v, c);
}

// Phase 2.
template <class T, bool kMixed>
__device__ __forceinline__ void finish_chunk(const Tensor& t, const Gradient& grad, const Chunk& chunk,
                                             const GroupRow<T>& group) {
  const Arrays<T, kMixed> a(t, grad);
  const Array<T, kMixed> direction = group.c.momentum ? a.m : a.grad;
  const RandomBits random(group.c.k, a.index, stream_of(group.how), chunk.begin);
  each_pack<T>(chunk, a.aligned, [&](std::int64_t i, int count, auto full) {
    constexpr bool kFull = decltype(full)::value;
    const Pack<T> x = load<kFull>(a.x, i, count);
    Pack<T> m = load<kFull>(direction, i, count);
    Pack<T> v = load<kFull>(a.v, i, count);
    Pack<T> x0{}, delta{};
    if (a.displaced()) {
      delta = load<kFull>(a.delta, i, count);
      if (a.x0.data != nullptr) x0 = load<kFull>(a.x0, i, count);
    }
    m = widened(direction, m);
    v = widened(a.v, v);
    Positions<T> p = positions(a, widened(a.x, x), widened(a.x0, x0), delta, a.displaced());
#pragma unroll
    for (int e = 0; e < kILP<T>; ++e) {
      p.at.value[e] = finish_element(p.at.value[e], p.x.value[e], p.origin.value[e], m.value[e], v.value[e], group);
    }
    store_positions<kFull>(a, i, count, p, a.displaced(), random);
  });
}

}  // namespace prodigy::cuda
