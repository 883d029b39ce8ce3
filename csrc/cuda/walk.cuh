// How one block walks one chunk: the functors of the two kernels. Each thread loads packs, applies the rule and stores
// them.
#pragma once

#include "cuda/samples.cuh"

namespace prodigy::cuda {

// One thread's part of the sums: a chunk gives it so few terms that T holds them.
template <class T, int kLanes>
struct LaneSums {
  Sums<T> lane[kLanes]{};

  __device__ __forceinline__ void add(int e, const Sums<T>& term) {
    lane[e % kLanes].dot += term.dot;
    lane[e % kLanes].norm += term.norm;
  }
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

// m, v, x, and s if every element is sampled, of one pack; and its part of the sums. All loads come before the first
// use of one.
template <bool kEvery, class Storage, class T, class Lanes>
__device__ __forceinline__ void update_pack(const Arrays<Storage>& a, std::int64_t i, int count, bool full,
                                            const Coefficients<T>& c, const ChunkBits<Storage>& random, Lanes& sums) {
  using Roots = typename Storage::Roots;
  constexpr int kCount = Storage::kPerThread;
  Loaded<Storage> in;
  const auto read = [&](auto whole) {
    constexpr bool kFull = decltype(whole)::value;
    load<kFull>(a.grad, i, count, in.grad);
    load<kFull>(a.x, i, count, in.x);
    load<kFull>(a.v, i, count, in.v);
    if (c.momentum) load<kFull>(a.m, i, count, in.m);
    if (kEvery) load<kFull>(a.s, i, count, in.s);
    if (a.displaced()) load<kFull>(a.delta, i, count, in.delta);
    if (a.extended()) load<kFull>(a.low, i, count, in.low);
    if ((kEvery || a.displaced()) && a.x0.data != nullptr) load<kFull>(a.x0, i, count, in.x0);
  };
  full ? read(std::true_type()) : read(std::false_type());

  const auto grad = widened<T>(a.grad, in.grad), x0 = widened<T>(a.x0, in.x0);
  auto m = widened<T>(a.m, in.m), v = widened<T>(a.v, in.v), s = widened<T>(a.s, in.s);
  auto p = positions(a, in);
#pragma unroll
  for (int e = 0; e < kCount; ++e) {
    const T g = gradient(grad.value[e], p.x.value[e], c);
    const T distance = a.displaced() ? -p.at.value[e] : x0.value[e] - p.x.value[e];
    if (kEvery) sums.add(e, sample(g, distance, s.value[e], c));
    moments(g, m.value[e], v.value[e], c);
    p.at.value[e] = step<Roots>(p.at.value[e], p.x.value[e], m.value[e], v.value[e], c);
  }

  const std::uint32_t run = Storage::kRounds ? random.run(i) : 0;
  const auto new_s = narrowed(a.s, s, Stochastic<Rounded::kS>{run});
  const auto new_v = narrowed(a.v, v, Stochastic<Rounded::kV>{run});
  const auto new_m = narrowed(a.m, m, Nearest());
  const Moved<Storage> moved(a, p, run);
  const auto write = [&](auto whole) {
    constexpr bool kFull = decltype(whole)::value;
    if (kEvery) store<kFull>(a.s, i, count, new_s);
    store<kFull>(a.v, i, count, new_v);
    if (!c.momentum) return;  // there is no m, and x is left to finish
    store<kFull>(a.m, i, count, new_m);
    moved.template write<kFull>(a, i, count);
  };
  full ? write(std::true_type()) : write(std::false_type());
}

// Phase 1. Returns this thread's part of the sums, unweighted.
template <class Policy>
__device__ __forceinline__ Sums<double> update_packs(const Tensor& t, const Gradient& grad, const Chunk& chunk,
                                                     const Coefficients<typename Policy::T>& c) {
  using Storage = typename Policy::Storage;
  using T = typename Policy::T;
  constexpr bool kEvery = std::is_same_v<typename Policy::Sampling, EveryElement>;
  constexpr bool kPth = std::is_same_v<typename Policy::Sampling, EveryPth>;
  const Arrays<Storage> a(t, grad);
  const bool aligned = a.aligned(chunk.begin, kPth);
  const ChunkBits<Storage> random(c.k, a.index, kStepStream, chunk);
  LaneSums < T, kEvery&& Storage::kPerThread<8 ? Storage::kPerThread : 2> sums;
  if constexpr (kPth) {
    Samples<Policy::kThreads> samples(t, chunk);
    for (std::int64_t begin = chunk.begin; begin < chunk.end; begin += Policy::kTile) {
      const std::int64_t end = begin + Policy::kTile < chunk.end ? begin + Policy::kTile : chunk.end;
      take_samples(a, samples, int(end - chunk.begin), c, random, sums.lane[0]);
      __syncthreads();  // their x has been read
      each_pack<Policy>(begin, end, aligned, [&](std::int64_t i, int count, bool full) {
        update_pack<false>(a, i, count, full, c, random, sums);
      });
    }
  } else {
    each_pack<Policy>(chunk.begin, chunk.end, aligned, [&](std::int64_t i, int count, bool full) {
      update_pack<kEvery>(a, i, count, full, c, random, sums);
    });
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
  const Arrays<Storage> a(t, grad);
  const bool momentum = group.c.momentum;
  const bool aligned = a.aligned(chunk.begin, !a.displaced());
  const ChunkBits<Storage> random(group.c.k, a.index, stream_of(group.how), chunk);
  each_pack<Policy>(chunk.begin, chunk.end, aligned, [&](std::int64_t i, int count, bool full) {
    Loaded<Storage> in;
    const auto read = [&](auto whole) {
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
    };
    full ? read(std::true_type()) : read(std::false_type());
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
