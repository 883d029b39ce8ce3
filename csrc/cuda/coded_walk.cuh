// How one block of threads walks one chunk of a tensor whose state is codes of 8 bits: a warp takes a block of codes at
// a time, see Note [A warp for each block of codes].
#pragma once

#include "cuda/codes.cuh"
#include "cuda/walk.cuh"

namespace prodigy::cuda {

// The arrays of a chunk that Arrays lacks. moved: x - x0; it and s are of all elements, or not there.
struct CodeArrays {
  Array<std::uint8_t> m, roots, s, moved;
  Array<std::uint32_t> scale;

  __device__ __forceinline__ CodeArrays(const Tensor& t, const Chunk& chunk)
      : m(t.m, Type::kUInt8),
        roots(t.v, Type::kUInt8),
        s(t.s, Type::kUInt8),
        moved(t.moved, Type::kUInt8),
        scale(t.scale, Type::kOther) {
    m.advance(chunk.begin);
    roots.advance(chunk.begin);
    if (moved.data != nullptr) s.advance(chunk.begin);
    moved.advance(chunk.begin);
    scale.advance(chunk.begin / kCodeBlock);
  }

  // Whether packs can be moved at once.
  template <class Storage>
  __device__ __forceinline__ bool aligned(const Arrays<Storage>& a) const {
    const auto is = [&](const auto& array) { return array.template aligned<kLaneCodes>(0); };
    return is(a.x) && is(a.grad) && (!a.extended() || is(a.low)) && is(m) && is(roots) &&
           (moved.data == nullptr || (is(moved) && is(s)));
  }
  // The word of the block that element i is in.
  __device__ __forceinline__ std::uint32_t& scale_of(std::uint32_t i) const {
    return *global(scale.at(i / kCodeBlock));
  }
  __device__ __forceinline__ void store_scale(std::uint32_t i, std::uint32_t word) const {
    if (threadIdx.x % kWarpSize == 0) scale_of(i) = word;
  }
};

// A lane's codes. What is not read is 0, or not used.
struct LaneCodes {
  Codes m{}, roots, s{}, moved{};
};

// Calls visit(i, count, full) for this lane's part of each block that its warp takes; see each_pack(). count may be 0,
// or less.
template <class Policy, class Visit>
__device__ __forceinline__ void each_block(int begin, int end, bool aligned, Visit visit) {
  const int lane = int(threadIdx.x % kWarpSize * kLaneCodes), last = held(aligned ? end - kLaneCodes : -1);
  for (int i = begin + int(threadIdx.x * kLaneCodes); i - lane < end; i += Policy::kThreads * kLaneCodes) {
    visit(std::uint32_t(i), end - i, i <= last);
  }
}

// The random bits of lanes' elements.
struct LaneBits {
  RandomBits bits;
  std::uint32_t eights;  // before the chunk, which begins at a multiple of eight

  __device__ __forceinline__ LaneBits(std::uint32_t step, std::uint32_t tensor, Stream stream, const Chunk& chunk)
      : bits(step, tensor, stream, chunk.begin), eights(std::uint32_t(chunk.begin >> 3)) {}

  // bits.run of the elements from i on.
  __device__ __forceinline__ std::uint32_t run(std::uint32_t i) const { return bits.shared((i >> 3) + eights); }
  // Of element i of the tensor.
  __device__ __forceinline__ std::uint32_t of(std::int64_t i) const { return bits.of(i); }
};

// Whether all numbers are finite. A lane asks once: for each it would be a comparison and a choice, of which a
// multiprocessor does half as many as of multiplications.
__device__ __forceinline__ bool all_finite(const Numbers& numbers) {
  float zero = 0.0f;
#pragma unroll
  for (int e = 0; e < kLaneCodes; ++e) zero += 0.0f * numbers.value[e];
  return zero == 0.0f;
}

// The change from x to what `moved` stores enters x - x0.
template <class Storage>
__device__ __forceinline__ void add_change(const Arrays<Storage>& a, const Numbers& x, const Moved<Storage>& moved,
                                           Numbers& delta) {
  Numbers change = kept_values(a, moved);
#pragma unroll
  for (int e = 0; e < kLaneCodes; ++e) change.value[e] -= x.value[e];
  as_constant(all_finite(change), [&](auto finite) {
#pragma unroll
    for (int e = 0; e < kLaneCodes; ++e) {
      delta.value[e] += finite_or_zero<decltype(finite)::value>(change.value[e]);
    }
  });
}

// x - x0 after the change that `finish` has made to x. old: its codes before.
template <class Storage>
__device__ __forceinline__ void finish_delta(const Arrays<Storage>& a, const CodeArrays& codes, std::uint32_t i,
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

// The new state, and the lane's part of the sums. Returns whether all gradients, and so x, are finite.
template <class Roots, class Lanes>
__device__ __forceinline__ bool update_numbers(const Numbers& grad, const Numbers& x, LaneNumbers& state, bool every,
                                               const Coefficients<float>& c, Lanes& sums) {
  Numbers g;
#pragma unroll
  for (int e = 0; e < kLaneCodes; ++e) g.value[e] = gradient<true, true>(grad.value[e], x.value[e], c);
  const bool all = all_finite(g);
  as_constant(all, [&](auto finite) {
    constexpr bool kFinite = decltype(finite)::value;
#pragma unroll
    for (int e = 0; e < kLaneCodes; ++e) {
      if (!kFinite) g.value[e] = gradient(grad.value[e], x.value[e], c);
      if (every) add_sample<kFinite>(g.value[e], -state.delta.value[e], state.s.value[e], c, sums.of(e));
      float& root = state.roots.value[e];
      root = root * root;
      moments<kFinite>(g.value[e], state.m.value[e], root, c);
    }
  });
#pragma unroll
  for (int e = 0; e < kLaneCodes; ++e) state.roots.value[e] = Roots::root(state.roots.value[e]);
  return all;
}

// The position after a step with the stored numbers of m and of the root of v. all_finite: whether all of x is.
__device__ __forceinline__ Positions<float, kLaneCodes> step_of(const Numbers& x, const Numbers& m,
                                                                const Numbers& roots, bool all_finite,
                                                                const Coefficients<float>& c) {
  Positions<float, kLaneCodes> p{x, x, Numbers{}};
  as_constant(all_finite, [&](auto finite) {
    constexpr bool kFinite = decltype(finite)::value;
#pragma unroll
    for (int e = 0; e < kLaneCodes; ++e) {
      p.at.value[e] = step<KnownRoots, kFinite>(x.value[e], x.value[e], m.value[e], roots.value[e], c);
    }
  });
  return p;
}

// A lane's part of what update_pack() does.
template <class Storage, class Lanes>
__device__ __forceinline__ void update_block(const Arrays<Storage>& a, const CodeArrays& arrays, std::uint32_t i,
                                             int count, bool full, bool every, const Coefficients<float>& c,
                                             const LaneBits& random, Lanes& sums) {
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
  const bool finite =
      update_numbers<typename Storage::Roots>(widened<float>(a.grad, in.grad), x, state, every, c, sums);

  const std::uint32_t run = random.run(i);
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
  const Moved<Storage> moved(a, step_of(x, numbers_of<Code::kM>(codes.m, scale), state.roots, finite, c), run);
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
  const Arrays<Storage> a(t, grad, chunk);
  const CodeArrays codes(t, chunk);
  const bool every = kAsk ? codes.moved.data != nullptr : std::is_same_v<Sampling, EveryElement>;
  const bool sampled = kAsk ? t.s != nullptr && !every : std::is_same_v<Sampling, EveryPth>;
  const int size = int(chunk.end - chunk.begin);
  const bool aligned = codes.aligned(a);
  const LaneBits random(c.k, a.index, kStepStream, chunk);
  LaneSums<float, 2> sums;
  const auto walk = [&](int begin, int end) {
    each_block<Policy>(begin, end, aligned, [&](std::uint32_t i, int count, bool full) {
      update_block(a, codes, i, count, full, every, c, random, sums);
    });
  };
  if constexpr (std::is_same_v<Sampling, EveryElement>) {
    walk(0, size);
  } else {
    Samples<Policy::kThreads> samples(t, chunk);
    for (int begin = 0; begin < size; begin += Policy::kTile) {
      const int end = begin + Policy::kTile < size ? begin + Policy::kTile : size;
      if (sampled) {
        take_samples(a, samples, end, c, random, sums.lane[0]);
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
  const Arrays<Storage> a(t, grad, chunk);
  const CodeArrays codes(t, chunk);
  const bool momentum = group.c.momentum, every = codes.moved.data != nullptr;
  const LaneBits random(group.c.k, a.index, stream_of(group.how), chunk);
  const int size = int(chunk.end - chunk.begin);
  const bool aligned = codes.aligned(a);
  each_block<Policy>(0, size, aligned, [&](std::uint32_t i, int count, bool full) {
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
    const std::uint32_t run = random.run(i);
    const Moved<Storage> moved(a, p, run);
    full ? moved.template write<true>(a, i, count) : moved.template write<false>(a, i, count);
    if (every) finish_delta(a, codes, i, count, full, run, x, moved, old.moved, scale);
  });
}

}  // namespace prodigy::cuda
