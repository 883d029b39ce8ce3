// How one block of threads walks one chunk of a tensor whose state is codes of 8 bits: a warp takes a block of codes at
// a time, see Note [A warp for each block of codes].
#pragma once

#include "cuda/codes.cuh"
#include "cuda/walk.cuh"

namespace prodigy::cuda {

// The arrays that Arrays lacks. moved: x - x0; it and s are of all elements, or not there.
struct CodeArrays {
  Array<std::uint8_t> m, roots, s, moved;
  std::uint32_t* scale;

  __device__ __forceinline__ CodeArrays(const Tensor& t)
      : m(t.m, Type::kUInt8),
        roots(t.v, Type::kUInt8),
        s(t.s, Type::kUInt8),
        moved(t.moved, Type::kUInt8),
        scale(reinterpret_cast<std::uint32_t*>(t.scale)) {}

  // Whether packs can be moved at once from element `begin` on.
  template <class Storage>
  __device__ __forceinline__ bool aligned(const Arrays<Storage>& a, std::int64_t begin) const {
    const auto is = [&](const auto& array) { return array.template aligned<kLaneCodes>(begin); };
    return is(a.x) && is(a.grad) && (!a.extended() || is(a.low)) && is(m) && is(roots) &&
           (moved.data == nullptr || (is(moved) && is(s)));
  }
  // The word of the block that element i is in.
  __device__ __forceinline__ std::uint32_t& scale_of(std::int64_t i) const {
    return global(scale)[std::uint64_t(i) / kCodeBlock];
  }
  __device__ __forceinline__ void store_scale(std::int64_t i, std::uint32_t word) const {
    if (threadIdx.x % kWarpSize == 0) scale_of(i) = word;
  }
};

// A lane's codes. What is not read is 0, or not used.
struct LaneCodes {
  Codes m{}, roots, s{}, moved{};
};

// Calls visit(i, count, full) for this lane's part of each block that its warp takes; see each_pack(). count may be 0.
template <class Policy, class Visit>
__device__ __forceinline__ void each_block(std::int64_t begin, std::int64_t end, bool aligned, Visit visit) {
  const int size = int(end - begin), lane = int(threadIdx.x % kWarpSize * kLaneCodes);
  for (int offset = int(threadIdx.x * kLaneCodes); offset - lane < size; offset += Policy::kThreads * kLaneCodes) {
    const int left = size - offset, count = left < 0 ? 0 : left < kLaneCodes ? left : kLaneCodes;
    visit(begin + offset, count, aligned && left >= kLaneCodes);
  }
}

// The random bits of a lane's elements.
__device__ __forceinline__ std::uint32_t lane_run(const RandomBits& random, std::int64_t i) {
  return random.shared(std::uint32_t(i >> 3));
}

// The change from x to what `moved` stores enters x - x0.
template <class Storage>
__device__ __forceinline__ void add_change(const Arrays<Storage>& a, const Numbers& x, const Moved<Storage>& moved,
                                           Numbers& delta) {
  const Numbers after = kept_values(a, moved);
#pragma unroll
  for (int e = 0; e < kLaneCodes; ++e) delta.value[e] += finite_or_zero(after.value[e] - x.value[e]);
}

// x - x0 after the change that `finish` has made to x. old: its codes before.
template <class Storage>
__device__ __forceinline__ void finish_delta(const Arrays<Storage>& a, const CodeArrays& codes, std::int64_t i,
                                             int count, bool full, std::uint32_t run, const Numbers& x,
                                             const Moved<Storage>& moved, const Codes& old, std::uint32_t scale) {
  Numbers delta = numbers_of<Code::kDelta>(old, scale);
  add_change(a, x, moved, delta);
  const float unit = renewed<Code::kDelta>(delta, scale);
  const Codes now = encoded_delta(delta, unit, run);
  full ? store<true>(codes.moved, i, count, now) : store<false>(codes.moved, i, count, now);
  codes.store_scale(i, scale);
}

// A lane's numbers.
struct LaneNumbers {
  Numbers m, roots, s, delta;

  __device__ __forceinline__ LaneNumbers(const LaneCodes& codes, std::uint32_t scale)
      : m(numbers_of<Code::kM>(codes.m, scale)),
        roots(numbers_of<Code::kRoot>(codes.roots, scale)),
        s(numbers_of<Code::kS>(codes.s, scale)),
        delta(numbers_of<Code::kDelta>(codes.moved, scale)) {}
};

// The new state, and the lane's part of the sums.
template <class Roots, class Lanes>
__device__ __forceinline__ void update_numbers(const Numbers& grad, const Numbers& x, LaneNumbers& state, bool every,
                                               const Coefficients<float>& c, Lanes& sums) {
  Numbers g;
#pragma unroll
  for (int e = 0; e < kLaneCodes; ++e) g.value[e] = gradient(grad.value[e], x.value[e], c);
  if (every) {
#pragma unroll
    for (int e = 0; e < kLaneCodes; ++e) {
      add_sample(g.value[e], -state.delta.value[e], state.s.value[e], c, sums.of(e));
    }
  }
#pragma unroll
  for (int e = 0; e < kLaneCodes; ++e) {
    float& root = state.roots.value[e];
    float v = root * root;
    moments(g.value[e], state.m.value[e], v, c);
    root = Roots::root(v);
  }
}

// The position after a step with the stored numbers of m and of the root of v.
__device__ __forceinline__ Positions<float, kLaneCodes> step_of(const Numbers& x, const Numbers& m,
                                                                const Numbers& roots, const Coefficients<float>& c) {
  Positions<float, kLaneCodes> p{x, x, Numbers{}};
#pragma unroll
  for (int e = 0; e < kLaneCodes; ++e) {
    p.at.value[e] = step<KnownRoots>(x.value[e], x.value[e], m.value[e], roots.value[e], c);
  }
  return p;
}

// A lane's part of what update_pack() does.
template <class Storage, class Lanes>
__device__ __forceinline__ void update_block(const Arrays<Storage>& a, const CodeArrays& arrays, std::int64_t i,
                                             int count, bool full, bool every, const Coefficients<float>& c,
                                             const RandomBits& random, Lanes& sums) {
  Loaded<Storage> in;
  LaneCodes codes;
  const std::uint32_t before = arrays.scale_of(i);
  as_constant(full, [&](auto whole) {
    constexpr bool kFull = decltype(whole)::value;
    load<kFull>(a.grad, i, count, in.grad);
    load<kFull>(a.x, i, count, in.x);
    if (a.extended()) load<kFull>(a.low, i, count, in.low);
    load<kFull>(arrays.roots, i, count, codes.roots);
    if (c.momentum) load<kFull>(arrays.m, i, count, codes.m);
    if (every) load<kFull>(arrays.s, i, count, codes.s);
    if (every) load<kFull>(arrays.moved, i, count, codes.moved);
  });

  const Numbers x = kept_values(a, in);
  LaneNumbers state(codes, before);
  update_numbers<typename Storage::Roots>(widened<float>(a.grad, in.grad), x, state, every, c, sums);

  const std::uint32_t run = lane_run(random, i);
  std::uint32_t scale = before;
  const float root_unit = renewed<Code::kRoot>(state.roots, scale);
  codes.roots = encode_roots(state.roots, root_unit, run);
  if (every) {
    const float unit = renewed<Code::kS>(state.s, scale);
    codes.s = encoded_s(state.s, unit, run);
  }
  const std::uint32_t without_m = scale;
  const float m_unit = renewed<Code::kM>(state.m, scale);
  codes.m = encoded_m(state.m, m_unit);
  const Moved<Storage> moved(a, step_of(x, numbers_of<Code::kM>(codes.m, scale), state.roots, c), run);
  if (every) {
    add_change(a, x, moved, state.delta);
    const float unit = renewed<Code::kDelta>(state.delta, scale);
    codes.moved = encoded_delta(state.delta, unit, run);
  }
  as_constant(full, [&](auto whole) {
    constexpr bool kFull = decltype(whole)::value;
    store<kFull>(arrays.roots, i, count, codes.roots);
    if (every) store<kFull>(arrays.s, i, count, codes.s);
    if (!c.momentum) return;  // there is no m, and x is left to finish
    store<kFull>(arrays.m, i, count, codes.m);
    if (every) store<kFull>(arrays.moved, i, count, codes.moved);
    moved.template write<kFull>(a, i, count);
  });
  arrays.store_scale(i, c.momentum ? scale : without_m);
}

// Phase 1. Returns this thread's part of the sums, unweighted. Any sampling is asked for here, so that there is no code
// for each.
template <class Policy>
__device__ __forceinline__ Sums<double> update_codes(const Tensor& t, const Gradient& grad, const Chunk& chunk,
                                                     const Coefficients<float>& c) {
  using Storage = typename Policy::Storage;
  using Sampling = typename Policy::Sampling;
  constexpr bool kAsk = std::is_same_v<Sampling, AnySampling>;
  const Arrays<Storage> a(t, grad);
  const CodeArrays codes(t);
  const bool every = kAsk ? codes.moved.data != nullptr : std::is_same_v<Sampling, EveryElement>;
  const bool sampled = kAsk ? t.s != nullptr && !every : std::is_same_v<Sampling, EveryPth>;
  const bool aligned = codes.aligned(a, chunk.begin);
  const RandomBits random(c.k, a.index, kStepStream, chunk.begin);
  LaneSums<float, 2> sums;
  const auto walk = [&](std::int64_t begin, std::int64_t end) {
    each_block<Policy>(begin, end, aligned, [&](std::int64_t i, int count, bool full) {
      update_block(a, codes, i, count, full, every, c, random, sums);
    });
  };
  if constexpr (std::is_same_v<Sampling, EveryElement>) {
    walk(chunk.begin, chunk.end);
  } else {
    Samples<Policy::kThreads> samples(t, chunk);
    for (std::int64_t begin = chunk.begin; begin < chunk.end; begin += Policy::kTile) {
      const std::int64_t end = begin + Policy::kTile < chunk.end ? begin + Policy::kTile : chunk.end;
      if (sampled) {
        take_samples(a, samples, int(end - chunk.begin), c, random, sums.lane[0]);
        __syncthreads();  // their x has been read
      }
      walk(begin, end);
    }
  }
  return sums.total();
}

// Phase 2.
template <class Policy>
__device__ __forceinline__ void finish_codes(const Tensor& t, const Gradient& grad, const Chunk& chunk,
                                             const GroupRow<float>& group) {
  using Storage = typename Policy::Storage;
  const Arrays<Storage> a(t, grad);
  const CodeArrays codes(t);
  const bool momentum = group.c.momentum, every = codes.moved.data != nullptr;
  const bool aligned = codes.aligned(a, chunk.begin);
  const RandomBits random(group.c.k, a.index, stream_of(group.how), chunk.begin);
  each_block<Policy>(chunk.begin, chunk.end, aligned, [&](std::int64_t i, int count, bool full) {
    Loaded<Storage> in;
    LaneCodes old;
    const std::uint32_t scale = codes.scale_of(i);
    as_constant(full, [&](auto whole) {
      constexpr bool kFull = decltype(whole)::value;
      load<kFull>(a.x, i, count, in.x);
      if (a.extended()) load<kFull>(a.low, i, count, in.low);
      load<kFull>(codes.roots, i, count, old.roots);
      if (momentum) {
        load<kFull>(codes.m, i, count, old.m);
      } else {
        load<kFull>(a.grad, i, count, in.grad);
      }
      if (every) load<kFull>(codes.moved, i, count, old.moved);
    });
    const Numbers m = momentum ? numbers_of<Code::kM>(old.m, scale) : widened<float>(a.grad, in.grad);
    const Numbers roots = numbers_of<Code::kRoot>(old.roots, scale), x = kept_values(a, in);
    Positions<float, kLaneCodes> p{x, x, Numbers{}};
#pragma unroll
    for (int e = 0; e < kLaneCodes; ++e) {
      float& at = p.at.value[e];
      at = finish_element<KnownRoots>(at, at, 0.0f, m.value[e], roots.value[e], group);
    }
    const std::uint32_t run = lane_run(random, i);
    const Moved<Storage> moved(a, p, run);
    full ? moved.template write<true>(a, i, count) : moved.template write<false>(a, i, count);
    if (every) finish_delta(a, codes, i, count, full, run, x, moved, old.moved, scale);
  });
}

}  // namespace prodigy::cuda
