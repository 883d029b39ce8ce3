// How one block walks one chunk: the functors of the two kernels. Each thread loads packs, applies the rule and stores
// them.
#pragma once

#include "cuda/roots.cuh"
#include "cuda/samples.cuh"

namespace prodigy::cuda {

// One thread's part of the sums: a chunk gives it so few terms that T holds them.
template <class T, int kLanes>
struct LaneSums {
  Sums<T> lane[kLanes]{};

  __device__ __forceinline__ Sums<T>& of(int e) { return lane[e % kLanes]; }
  __device__ __forceinline__ Sums<double> total() const {
    Sums<double> sums{0.0, 0.0};
#pragma unroll
    for (int e = 0; e < kLanes; ++e) {
      sums.dot += double(lane[e].dot);
      sums.norm += double(lane[e].norm);
    }
    return sums;
  }
};

// Of all elements of a pack. Whether there is weight decay, and which, is asked once for all.
template <class T, int kCount>
__device__ __forceinline__ Pack<T, kCount> gradients(const Pack<T, kCount>& grad, const Pack<T, kCount>& x,
                                                     const Coefficients<T>& c) {
  Pack<T, kCount> g;
  as_constant(c.l2 != T(0), [&](auto l2) {
#pragma unroll
    for (int e = 0; e < kCount; ++e) g.value[e] = gradient<decltype(l2)::value>(grad.value[e], x.value[e], c);
  });
  return g;
}

template <class T, int kCount>
__device__ __forceinline__ void take_step(Positions<T, kCount>& p, const Pack<T, kCount>& quotient,
                                          const Coefficients<T>& c) {
  as_constant(c.decay != T(0), [&](auto decays) {
#pragma unroll
    for (int e = 0; e < kCount; ++e) {
      p.at.value[e] = step_by<decltype(decays)::value>(quotient.value[e], p.at.value[e], p.x.value[e], c);
    }
  });
}

// m, v, x, and s if every element is sampled, of one pack; and its part of the sums. All loads come before the first
// use of one.
template <class Storage, class T, class Lanes>
__device__ __forceinline__ void update_pack(const Arrays<Storage>& a, std::uint32_t i, int count, bool full, bool every,
                                            const Coefficients<T>& c, const ChunkBits<Storage>& random, Lanes& sums) {
  constexpr int kCount = Storage::kPerThread;
  Loaded<Storage> in;
  as_constant(full, [&](auto whole) {
    constexpr bool kFull = decltype(whole)::value;
    load<kFull>(a.grad, i, count, in.grad);
    load<kFull>(a.x, i, count, in.x);
    load<kFull>(a.v, i, count, in.v);
    if (c.momentum) load<kFull>(a.m, i, count, in.m);
    if (every) load<kFull>(a.s, i, count, in.s);
    if (a.displaced()) load<kFull>(a.delta, i, count, in.delta);
    if (a.extended()) load<kFull>(a.low, i, count, in.low);
    if ((every || a.displaced()) && a.x0.data != nullptr) load<kFull>(a.x0, i, count, in.x0);
  });

  const auto grad = widened<T>(a.grad, in.grad), x0 = widened<T>(a.x0, in.x0);
  auto m = widened<T>(a.m, in.m), v = widened<T>(a.v, in.v), s = widened<T>(a.s, in.s);
  auto p = positions(a, in);
  const auto g = gradients(grad, p.x, c);
#pragma unroll
  for (int e = 0; e < kCount; ++e) {
    const T distance = a.displaced() ? -p.at.value[e] : x0.value[e] - p.x.value[e];
    if (every) add_sample(g.value[e], distance, s.value[e], c, sums.of(e));
    moments(g.value[e], m.value[e], v.value[e], c);
  }
  take_step(p, quotients<typename Storage::Roots>(m, v, c.d_eps), c);

  const std::uint32_t run = Storage::kRounds ? random.run(i) : 0;
  const auto new_s = narrowed(a.s, s, Stochastic<Rounded::kS>{run});
  const auto new_v = narrowed(a.v, v, Stochastic<Rounded::kV>{run});
  const auto new_m = narrowed(a.m, m, Nearest());
  const Moved<Storage> moved(a, p, run);
  as_constant(full, [&](auto whole) {
    constexpr bool kFull = decltype(whole)::value;
    if (every) store<kFull>(a.s, i, count, new_s);
    store<kFull>(a.v, i, count, new_v);
    if (!c.momentum) return;  // there is no m, and x is left to finish
    store<kFull>(a.m, i, count, new_m);
    moved.template write<kFull>(a, i, count);
  });
}

// Phase 1. Returns this thread's part of the sums, unweighted. Any sampling is asked for here, so that there is no code
// for each.
template <class Policy>
__device__ __forceinline__ Sums<double> update_packs(const Tensor& t, const Gradient& grad, const Chunk& chunk,
                                                     const Coefficients<typename Policy::T>& c) {
  using Storage = typename Policy::Storage;
  using Sampling = typename Policy::Sampling;
  constexpr bool kAsk = std::is_same_v<Sampling, AnySampling>, kPth = std::is_same_v<Sampling, EveryPth>;
  constexpr bool kEvery = std::is_same_v<Sampling, EveryElement>, kMany = (kAsk || kEvery) && Storage::kPerThread < 8;
  const bool every = kAsk ? t.s != nullptr && t.slice_p == 1 : kEvery;
  const bool sampled = kAsk ? t.s != nullptr && t.slice_p > 1 : kPth;
  const Arrays<Storage> a(t, grad, chunk);
  const int size = int(chunk.end - chunk.begin);
  const bool aligned = a.aligned(0, sampled);
  const ChunkBits<Storage> random(c.k, a.index, kStepStream, chunk);
  LaneSums<typename Policy::T, kMany ? Storage::kPerThread : 2> sums;
  const auto walk = [&](int begin, int end) {
    each_pack<Policy>(begin, end, aligned, [&](std::uint32_t i, int count, bool full) {
      update_pack(a, i, count, full, every, c, random, sums);
    });
  };
  if constexpr (kAsk || kPth) {
    Samples<Policy::kThreads> samples(t, chunk);
    for (int begin = 0; begin < size; begin += Policy::kTile) {
      const int end = held(begin + Policy::kTile < size ? begin + Policy::kTile : size);
      if (sampled) {
        take_samples(a, samples, end, c, random, sums.of(0));
        __syncthreads();  // their x has been read
      }
      walk(begin, end);
    }
  } else {
    walk(0, size);
  }
  return sums.total();
}

// The position after `finish`; `m` holds the gradient where there is no momentum.
template <class Roots, class T>
__device__ __forceinline__ T finish_element(T at, T x, T origin, T m, T v, const GroupRow<T>& group) {
  const Coefficients<T>& c = group.c;
  if (group.how == Finish::kCorrect) return correct<Roots>(at, m, v, group.old_d_eps, c);
  if (group.how == Finish::kUndo) return undo<Roots>(at, origin, m, v, c);
  return step<Roots>(at, x, c.momentum ? m : group.d_new * finite_or_zero(gradient(m, x, c)), v, c);
}

// Phase 2.
template <class Policy>
__device__ __forceinline__ void finish_packs(const Tensor& t, const Gradient& grad, const Chunk& chunk,
                                             const GroupRow<typename Policy::T>& group) {
  using Storage = typename Policy::Storage;
  using T = typename Policy::T;
  const Arrays<Storage> a(t, grad, chunk);
  const bool momentum = group.c.momentum;
  const int size = int(chunk.end - chunk.begin);
  const bool aligned = a.aligned(0, !a.displaced());
  const ChunkBits<Storage> random(group.c.k, a.index, stream_of(group.how), chunk);
  each_pack<Policy>(0, size, aligned, [&](std::uint32_t i, int count, bool full) {
    Loaded<Storage> in;
    as_constant(full, [&](auto whole) {
      constexpr bool kFull = decltype(whole)::value;
      load<kFull>(a.x, i, count, in.x);
      if (a.extended()) load<kFull>(a.low, i, count, in.low);
      load<kFull>(a.v, i, count, in.v);
      if (momentum) {
        load<kFull>(a.m, i, count, in.m);
      } else {
        load<kFull>(a.grad, i, count, in.grad);
      }
      if (!a.displaced()) return;
      load<kFull>(a.delta, i, count, in.delta);
      if (a.x0.data != nullptr) load<kFull>(a.x0, i, count, in.x0);
    });
    const auto m = momentum ? widened<T>(a.m, in.m) : widened<T>(a.grad, in.grad), v = widened<T>(a.v, in.v);
    auto p = positions(a, in);
#pragma unroll
    for (int e = 0; e < Storage::kPerThread; ++e) {
      T& at = p.at.value[e];
      at = finish_element<typename Storage::Roots>(at, p.x.value[e], p.origin.value[e], m.value[e], v.value[e], group);
    }
    const Moved<Storage> moved(a, p, Storage::kRounds ? random.run(i) : 0);
    full ? moved.template write<true>(a, i, count) : moved.template write<false>(a, i, count);
  });
}

}  // namespace prodigy::cuda
