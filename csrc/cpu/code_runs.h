// CodeRuns: to be included by a file for each instruction set, and by no other (see cpu/lanes.h).
#pragma once

#include "cpu/block.h"
#include "cpu/reductions.h"

namespace prodigy::cpu {

struct Floats {
  alignas(64) float of[kCodeBlock];
};

template <class Byte>
PRODIGY_INLINE Byte* bytes_from(void* codes, std::int64_t begin) {
  return codes == nullptr ? nullptr : static_cast<Byte*>(codes) + begin;
}

// A block of codes.
struct CodeBlock {
  std::int8_t *m, *s, *delta;
  std::uint8_t *root, *scale;
  int n;

  PRODIGY_INLINE CodeBlock(const Tensor& t, std::int64_t begin, int n)
      : m(bytes_from<std::int8_t>(t.m, begin)),
        s(bytes_from<std::int8_t>(t.s, begin)),
        delta(bytes_from<std::int8_t>(t.moved, begin)),
        root(bytes_from<std::uint8_t>(t.v, begin)),
        scale(t.scale + begin / kCodeBlock * kCodes),
        n(n) {}

  template <Code kCode>
  PRODIGY_INLINE float unit() const {
    return CodeTraits<kCode>::unit(scale[int(kCode)]);
  }
};

// Calls visit(block, at) for the blocks of a run; at: the first element, in the run.
template <class Visit>
PRODIGY_INLINE void each_block(const Tensor& t, std::int64_t begin, int n, Visit visit) {
  for (int at = 0; at < n; at += kCodeBlock) {
    visit(CodeBlock(t, begin + at, n - at < kCodeBlock ? n - at : kCodeBlock), at);
  }
}

// The new unit of n numbers, which are limited to the sizes that codes can have. largest: their largest size.
template <Code kCode>
PRODIGY_INLINE float renewed(float* numbers, int n, std::uint32_t largest, std::uint8_t* scale) {
  using Traits = CodeTraits<kCode>;
  if (largest > Traits::kLargestSize) {
    for (int i = 0; i < n; ++i) numbers[i] = Traits::limited(numbers[i]);
    largest = Traits::kLargestSize;
  }
  const std::int32_t byte = Traits::byte(largest);
  scale[int(kCode)] = std::uint8_t(byte);
  return Traits::unit(byte);
}

// Changes to x that are not finite do not count. They show in the sum.
PRODIGY_INLINE std::uint32_t without_bad_changes(const float* distance, float* delta, int n) {
  Largest<float> largest;
  for (int i = 0; i < n; ++i) {
    if (!(std::fabs(delta[i]) < INFINITY)) delta[i] = -distance[i];
    largest.take(std::fabs(delta[i]));
  }
  return largest.size();
}

// Phase 1 for one block. What there is of the estimate: kAll: s and delta are of all elements; kMoves: and delta
// changes with x. kDecays: whether there is weight decay. Without, there is less to compute. Codes are those of every
// other backend but where a number, whose last bit depends on the order of the operations, is rounded to the other side
// of a limit.
template <class F, bool kMomentum, bool kAll, bool kMoves, bool kDecays>
struct UpdateCodes {
  using C = Coefficients<float>;
  static constexpr float kNoDecay = -0.0f;  // what is added changes nothing, not even the sign of a zero

  // New numbers, not yet rounded, and x0 - x before the step. In a fifth array, at 4096 bytes from the first,
  // processors that tell stores by their lowest 12 bits would wait for them.
  struct State {
    Floats m_then_delta, root, s, distance;
  };
  struct Sizes {
    Largest<F> m, root, s, delta;
  };

  // kFinite: if the gradients are; if they are not, what comes out is neither.
  template <bool kFinite>
  static PRODIGY_INLINE Sizes numbers(const CodeBlock& block, const float* grad, const float* x, const C& c,
                                      State& state, VectorSums<F>& total, LaneSums<float>& left_over) {
    const float m_unit = block.unit<Code::kM>(), root_unit = block.unit<Code::kRoot>();
    const float s_unit = block.unit<Code::kS>(), delta_unit = block.unit<Code::kDelta>();
    VectorSums<F> sums = total;  // in registers
    Sizes sizes;
    each_vector<F>(block.n, [&](int i, int lane, auto float_like) {
      using V = decltype(float_like);
      const V g = gradient(load_as<V>(grad + i), kDecays ? load_as<V>(x + i) : V(kNoDecay), c);
      if constexpr (kAll) {
        const V distance = decoded<Code::kDelta, V>(load_bytes<V>(block.delta + i), -delta_unit);
        V s = decoded<Code::kS, V>(load_bytes<V>(block.s + i), s_unit);
        const Sums<V> term = sample<kFinite>(g, distance, s, c);
        sums.add(lane, term, left_over);
        sizes.s.take(term.norm);
        store_as(s, state.s.of + i);
        if constexpr (kMoves) store_as(distance, state.distance.of + i);
      }
      const V root = decoded<Code::kRoot, V>(load_bytes<V>(block.root + i), root_unit);
      V m(0.0f), v = root * root;
      if constexpr (kMomentum) m = decoded<Code::kM, V>(load_bytes<V>(block.m + i), m_unit);
      moments<kFinite>(g, m, v, c);
      if constexpr (kMomentum) {
        sizes.m.take(fabs(m));
        store_as(m, state.m_then_delta.of + i);
      }
      v = ExactRoots::root(v);
      sizes.root.take(v);
      store_as(v, state.root.of + i);
    });
    total = sums;
    return sizes;
  }

  // The codes of m and of the root of v, and the step of x with the numbers that they are.
  static PRODIGY_INLINE void step_x(const CodeBlock& block, float* x, const std::uint32_t* bits, const C& c,
                                    State& state, Sizes& sizes) {
    const float m_unit = renewed<Code::kM>(state.m_then_delta.of, block.n, sizes.m.size(), block.scale);
    const float unit = renewed<Code::kRoot>(state.root.of, block.n, sizes.root.size(), block.scale);
    each_vector<F>(block.n, [&](int i, int, auto float_like) {
      using V = decltype(float_like);
      const auto m = coded_m(load_as<V>(state.m_then_delta.of + i), m_unit);
      const auto root = coded_root(load_as<V>(state.root.of + i), unit, load_as<WordOf<V>>(bits + i));
      store_bytes(m.code, block.m + i);
      store_bytes(root.code, block.root + i);
      const V before = load_as<V>(x + i), decaying = kDecays ? before : V(kNoDecay);
      const V after = step<KeptRoots>(before, decaying, m.number, root.number, c);
      store_as(after, x + i);
      if constexpr (kMoves) {
        const V delta = (after - before) - load_as<V>(state.distance.of + i);
        sizes.delta.take(fabs(delta));
        store_as(delta, state.m_then_delta.of + i);
      }
    });
  }

  static PRODIGY_INLINE void store_roots(const CodeBlock& block, const std::uint32_t* bits, State& state,
                                         const Sizes& sizes) {
    const float unit = renewed<Code::kRoot>(state.root.of, block.n, sizes.root.size(), block.scale);
    each_vector<F>(block.n, [&](int i, int, auto float_like) {
      using V = decltype(float_like);
      const auto root = coded_root(load_as<V>(state.root.of + i), unit, load_as<WordOf<V>>(bits + i));
      store_bytes(root.code, block.root + i);
    });
  }

  static PRODIGY_INLINE void store_samples(const CodeBlock& block, const std::uint32_t* bits, State& state,
                                           const Sizes& sizes) {
    const float s_unit = renewed<Code::kS>(state.s.of, block.n, sizes.s.size(), block.scale);
    float unit = 0.0f;
    if constexpr (kMoves) {
      std::uint32_t largest = sizes.delta.size();
      if (largest >= kInfinity) largest = without_bad_changes(state.distance.of, state.m_then_delta.of, block.n);
      unit = renewed<Code::kDelta>(state.m_then_delta.of, block.n, largest, block.scale);
    }
    each_vector<F>(block.n, [&](int i, int, auto float_like) {
      using V = decltype(float_like);
      const WordOf<V> draws = load_as<WordOf<V>>(bits + i) * WordOf<V>(third(1u));
      store_bytes(coded_s(load_as<V>(state.s.of + i), s_unit, draws), block.s + i);
      if constexpr (kMoves) {
        store_bytes(coded_delta(load_as<V>(state.m_then_delta.of + i), unit, draws), block.delta + i);
      }
    });
  }

  // at: the first element of the block, in the arrays.
  static PRODIGY_INLINE void block(const CodeBlock& block, const Arrays<float, float>& a, int at, C c,
                                   VectorSums<F>& sums, LaneSums<float>& left_over) {
    const float* grad = a.grad + at;
    const std::uint32_t* bits = a.random + at;
    float* x = a.x + at;
    c.momentum = kMomentum;  // now the compiler knows
    if (!kDecays) c.l2 = c.decay = 0.0f;
    State state;
    for (int i = 0; i < block.n; i += kSumLanes) {
      fetch(a.next_grad, at + i, false);  // codes are too few bytes for it to matter
      if (kMomentum) fetch(a.next_x, at + i, true);
    }
    const VectorSums<F> before = sums;
    const LaneSums<float> before_left_over = left_over;
    Sizes sizes = numbers<true>(block, grad, x, c, state, sums, left_over);
    if (larger(sizes.m.size(), sizes.root.size()) >= kInfinity) {
      sums = before;
      left_over = before_left_over;
      sizes = numbers<false>(block, grad, x, c, state, sums, left_over);
    }
    if constexpr (kMomentum) {
      step_x(block, x, bits, c, state, sizes);
    } else {
      store_roots(block, bits, state, sizes);
    }
    if constexpr (kAll) store_samples(block, bits, state, sizes);
  }

  static Sums<double> run(const Tensor& t, std::int64_t begin, int n, const Arrays<float, float>& a, const C& c) {
    VectorSums<F> sums;
    LaneSums<float> left_over;
    each_block(t, begin, n, [&](const CodeBlock& part, int at) { block(part, a, at, c, sums, left_over); });
    return sums.total(left_over);
  }
};

template <class F, Code kCode, class Byte>
PRODIGY_INLINE void decode(const Byte* codes, float unit, int n, float* to) {
  each_vector<F>(n, [&](int i, int, auto float_like) {
    using V = decltype(float_like);
    store_as(decoded<kCode, V>(load_bytes<V>(codes + i), unit), to + i);
  });
}

template <int kLanes>
using FloatsOf = std::conditional_t<kLanes == 1, float, Lanes<float, kLanes>>;

template <int kLanes>
void CodeRuns<kLanes>::m(const Tensor& t, std::int64_t begin, int n, float* to) {
  each_block(t, begin, n, [&](const CodeBlock& block, int at) {
    decode<FloatsOf<kLanes>, Code::kM>(block.m, block.unit<Code::kM>(), block.n, to + at);
  });
}

template <int kLanes>
void CodeRuns<kLanes>::root(const Tensor& t, std::int64_t begin, int n, float* to) {
  each_block(t, begin, n, [&](const CodeBlock& block, int at) {
    decode<FloatsOf<kLanes>, Code::kRoot>(block.root, block.unit<Code::kRoot>(), block.n, to + at);
  });
}

template <int kLanes>
void CodeRuns<kLanes>::move(const Tensor& t, std::int64_t begin, int n, const float* before, const float* x,
                            const std::uint32_t* bits) {
  using F = FloatsOf<kLanes>;
  each_block(t, begin, n, [&](const CodeBlock& block, int at) {
    Floats delta;
    Largest<F> largest;
    const float old = block.unit<Code::kDelta>();
    each_vector<F>(block.n, [&](int i, int, auto float_like) {
      using V = decltype(float_like);
      const V change = finite_or_zero(load_as<V>(x + at + i) - load_as<V>(before + at + i));
      const V number = decoded<Code::kDelta, V>(load_bytes<V>(block.delta + i), old) + change;
      largest.take(fabs(number));
      store_as(number, delta.of + i);
    });
    const float unit = renewed<Code::kDelta>(delta.of, block.n, largest.size(), block.scale);
    each_vector<F>(block.n, [&](int i, int, auto float_like) {
      using V = decltype(float_like);
      const WordOf<V> draws = load_as<WordOf<V>>(bits + at + i) * WordOf<V>(third(1u));
      store_bytes(coded_delta(load_as<V>(delta.of + i), unit, draws), block.delta + i);
    });
  });
}

template <class F, bool kMomentum, bool kDecays>
Sums<double> update_codes(const Tensor& t, std::int64_t begin, int n, const Arrays<float, float>& a,
                          const Coefficients<float>& c) {
  if (t.moved == nullptr) return UpdateCodes<F, kMomentum, false, false, kDecays>::run(t, begin, n, a, c);
  return is_half(t.type) || !kMomentum ? UpdateCodes<F, kMomentum, true, false, kDecays>::run(t, begin, n, a, c)
                                       : UpdateCodes<F, kMomentum, true, kMomentum, kDecays>::run(t, begin, n, a, c);
}

template <int kLanes>
Sums<double> CodeRuns<kLanes>::update(const Tensor& t, std::int64_t begin, int n, const Arrays<float, float>& a,
                                      const Coefficients<float>& c) {
  using F = FloatsOf<kLanes>;
  const bool decays = c.l2 != 0.0f || c.decay != 0.0f;
  if (c.momentum) {
    return decays ? update_codes<F, true, true>(t, begin, n, a, c) : update_codes<F, true, false>(t, begin, n, a, c);
  }
  return decays ? update_codes<F, false, true>(t, begin, n, a, c) : update_codes<F, false, false>(t, begin, n, a, c);
}

}  // namespace prodigy::cpu
