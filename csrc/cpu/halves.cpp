#include "cpu/halves.h"

#include "cpu/vector.h"

namespace prodigy::cpu {
namespace {

constexpr Type kBF = Type::kBFloat16, kF = Type::kFloat16;

template <class Visit>
PRODIGY_INLINE void each(int n, Visit visit) {
  PRODIGY_VECTORIZE
  for (int i = 0; i < n; ++i) visit(i);
}

// First the hashes, in whole vectors of them.
struct Random {
  static PRODIGY_INLINE void run(RandomBits random, std::uint32_t eight, int n, std::uint32_t* __restrict bits) {
    alignas(64) std::uint32_t shared[kBlock / kEight];
    const int eights = (n + kEight - 1) / kEight;
    each(eights, [&](int j) { shared[j] = random.shared(eight + std::uint32_t(j)); });
    for (int j = 0; j < eights; ++j) {
      for (std::uint32_t e = 0; e < kEight; ++e) bits[j * kEight + e] = shared[j] * power(e);
    }
  }
};

template <Type kType>
struct Widen {
  static PRODIGY_INLINE void run(const std::uint16_t* __restrict from, int n, float* __restrict to) {
    each(n, [=](int i) { to[i] = widen<kType>(from[i]); });
  }
};

template <Type kType>
struct Nearest {
  static PRODIGY_INLINE void run(const float* __restrict from, int n, std::uint16_t* __restrict to) {
    each(n, [=](int i) { to[i] = nearest<kType>(from[i]); });
  }
};

PRODIGY_INLINE std::uint32_t first(std::uint32_t bits) { return bits; }

template <Type kType, std::uint32_t (*kDraw)(std::uint32_t)>
struct Stochastic {
  static PRODIGY_INLINE void run(const float* __restrict from, int n, std::uint16_t* __restrict to,
                                 const std::uint32_t* __restrict bits) {
    each(n, [=](int i) { to[i] = stochastic<kType>(from[i], kDraw(bits[i])); });
  }
};

struct Added {
  static PRODIGY_INLINE void run(const float* __restrict x0, const float* __restrict delta, int n,
                                 float* __restrict sum) {
    each(n, [=](int i) { sum[i] = x0[i] + delta[i]; });
  }
};

struct Displaced {
  static PRODIGY_INLINE void run(const float* __restrict rounded, int n, const float* __restrict x0,
                                 float* __restrict delta, float* __restrict x) {
    each(n, [=](int i) {
      delta[i] = displacement(rounded[i], x[i], x0[i], delta[i]);
      x[i] = x0[i] + delta[i];
    });
  }
};

template <class From, class To>
struct Copied {
  static PRODIGY_INLINE void run(const From* __restrict from, int n, To* __restrict to) {
    each(n, [=](int i) { to[i] = To(from[i]); });
  }
};

struct KeptValues {
  static PRODIGY_INLINE void run(const std::uint16_t* __restrict x, const std::int32_t* __restrict low, int n,
                                 float* __restrict to) {
    each(n, [=](int i) { to[i] = kept_value(x[i], low[i]); });
  }
};

struct Stochastic24 {
  static PRODIGY_INLINE void run(const float* __restrict from, int n, std::uint16_t* __restrict x,
                                 std::int32_t* __restrict low, const std::uint32_t* __restrict bits) {
    each(n, [=](int i) {
      const Kept kept = stochastic_24(from[i], bits[i]);
      x[i] = kept.x;
      low[i] = kept.low;
    });
  }
};

// Kernel<type>::run(args...)
template <template <Type> class Kernel, class... Args>
void run_for(Type type, Args... args) {
  type == kBF ? run<Kernel<kBF>>(args...) : run<Kernel<kF>>(args...);
}

// Calls visit(Float16Runs<...>()) if the type is float16 and the instruction set has conversions; returns whether.
template <class Visit>
bool in_vectors(Type type, Visit visit) {
#ifdef PRODIGY_HAS_CLONES
  const InstructionSet set = type == kF ? instruction_set() : InstructionSet::kBaseline;
  if (set == InstructionSet::kV4) visit(Float16Runs<16>());
  if (set == InstructionSet::kV3) visit(Float16Runs<8>());
  return set != InstructionSet::kBaseline;
#else
  return false;
#endif
}

template <Type kType>
using StochasticX = Stochastic<kType, first>;
template <Type kType>
using StochasticV = Stochastic<kType, second>;
template <Type kType>
using StochasticS = Stochastic<kType, third>;

}  // namespace

void widen_run(Type type, const std::uint16_t* from, int n, float* to) {
  if (!in_vectors(type, [=](auto runs) { runs.widen(from, n, to); })) run_for<Widen>(type, from, n, to);
}

void nearest_run(Type type, const float* from, int n, std::uint16_t* to) {
  if (!in_vectors(type, [=](auto runs) { runs.nearest(from, n, to); })) run_for<Nearest>(type, from, n, to);
}

void random_run(RandomBits random, std::int64_t position, int n, std::uint32_t* bits) {
  run<Random>(random, std::uint32_t(position >> 3), n, bits);
}

void stochastic_x_run(Type type, const float* from, int n, std::uint16_t* to, const std::uint32_t* bits) {
  const auto visit = [=](auto runs) { runs.stochastic(from, n, to, bits); };
  if (!in_vectors(type, visit)) run_for<StochasticX>(type, from, n, to, bits);
}

void stochastic_v_run(Type type, const float* from, int n, std::uint16_t* to, const std::uint32_t* bits) {
  run_for<StochasticV>(type, from, n, to, bits);
}

void stochastic_s_run(Type type, const float* from, int n, std::uint16_t* to, const std::uint32_t* bits,
                      std::int64_t stride) {
  if (stride == 1) return run_for<StochasticS>(type, from, n, to, bits);
  for (int j = 0; j < n; ++j) {
    const std::uint32_t draw = third(bits[j * stride]);
    to[j] = type == kBF ? stochastic<kBF>(from[j], draw) : stochastic<kF>(from[j], draw);
  }
}

void displaced_run(Type type, const std::uint16_t* from, int n, const float* x0, float* delta, float* x) {
  if (in_vectors(type, [=](auto runs) { runs.displaced(from, n, x0, delta, x); })) return;
  float rounded[kBlock];
  std::uint16_t stored[kBlock];
  run<Added>(x0, delta, n, rounded);
  nearest_run(type, rounded, n, stored);
  widen_run(type, stored, n, rounded);
  widen_run(type, from, n, x);
  run<Displaced>(rounded, n, x0, delta, x);
}

void place_run(Type type, const float* x0, const float* delta, int n, std::uint16_t* to) {
  if (in_vectors(type, [=](auto runs) { runs.place(x0, delta, n, to); })) return;
  float x[kBlock];
  run<Added>(x0, delta, n, x);
  nearest_run(type, x, n, to);
}

void words_of_bytes_run(const std::int8_t* from, int n, std::int32_t* to) {
  run<Copied<std::int8_t, std::int32_t>>(from, n, to);
}

void bytes_of_words_run(const std::int32_t* from, int n, std::int8_t* to) {
  run<Copied<std::int32_t, std::int8_t>>(from, n, to);
}

void kept_run(const std::uint16_t* x, const std::int32_t* low, int n, float* to) { run<KeptValues>(x, low, n, to); }

void stochastic_24_run(const float* from, int n, std::uint16_t* x, std::int32_t* low, const std::uint32_t* bits) {
  run<Stochastic24>(from, n, x, low, bits);
}

}  // namespace prodigy::cpu
