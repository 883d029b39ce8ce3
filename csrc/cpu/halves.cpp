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

template <Type kType>
PRODIGY_INLINE void displaced(std::uint16_t x, float x0, float& delta, float& wide) {
  delta = displacement<kType>(widen<kType>(x), x0, delta);
  wide = x0 + delta;
}

}  // namespace

PRODIGY_CLONES void widen_run(Type type, const std::uint16_t* from, int n, float* to) {
  if (type == kBF) each(n, [&](int i) { to[i] = widen<kBF>(from[i]); });
  if (type == kF) each(n, [&](int i) { to[i] = widen<kF>(from[i]); });
}

PRODIGY_CLONES void nearest_run(Type type, const float* from, int n, std::uint16_t* to) {
  if (type == kBF) each(n, [&](int i) { to[i] = nearest<kBF>(from[i]); });
  if (type == kF) each(n, [&](int i) { to[i] = nearest<kF>(from[i]); });
}

PRODIGY_CLONES void stochastic_x_run(Type type, const float* from, int n, std::uint16_t* to, RandomBits random,
                                     std::int64_t position) {
  if (type == kBF) each(n, [&](int i) { to[i] = stochastic<kBF>(from[i], random.of(position + i)); });
  if (type == kF) each(n, [&](int i) { to[i] = stochastic<kF>(from[i], random.of(position + i)); });
}

PRODIGY_CLONES void stochastic_v_run(Type type, const float* from, int n, std::uint16_t* to, RandomBits random,
                                     std::int64_t position) {
  const auto bits = [&](int i) { return second(random.of(position + i)); };
  if (type == kBF) each(n, [&](int i) { to[i] = stochastic<kBF>(from[i], bits(i)); });
  if (type == kF) each(n, [&](int i) { to[i] = stochastic<kF>(from[i], bits(i)); });
}

PRODIGY_CLONES void stochastic_s_run(Type type, const float* from, int n, std::uint16_t* to, RandomBits random,
                                     std::int64_t position, std::int64_t stride) {
  const auto bits = [&](int i) { return third(random.of(position + i * stride)); };
  if (type == kBF) each(n, [&](int i) { to[i] = stochastic<kBF>(from[i], bits(i)); });
  if (type == kF) each(n, [&](int i) { to[i] = stochastic<kF>(from[i], bits(i)); });
}

PRODIGY_CLONES void displaced_run(Type type, const std::uint16_t* from, int n, const float* x0, float* delta,
                                  float* x) {
  if (type == kBF) each(n, [&](int i) { displaced<kBF>(from[i], x0[i], delta[i], x[i]); });
  if (type == kF) each(n, [&](int i) { displaced<kF>(from[i], x0[i], delta[i], x[i]); });
}

PRODIGY_CLONES void place_run(Type type, const float* x0, const float* delta, int n, std::uint16_t* to) {
  if (type == kBF) each(n, [&](int i) { to[i] = nearest<kBF>(x0[i] + delta[i]); });
  if (type == kF) each(n, [&](int i) { to[i] = nearest<kF>(x0[i] + delta[i]); });
}

}  // namespace prodigy::cpu
