// Runs of 16-bit numbers, to and from float32; `type` is theirs.
#pragma once

#include "prodigy/rounding.h"

namespace prodigy::cpu {

void widen_run(Type type, const std::uint16_t* from, int n, float* to);
void nearest_run(Type type, const float* from, int n, std::uint16_t* to);

// Of a parameter; position: of the first element.
void stochastic_x_run(Type type, const float* from, int n, std::uint16_t* to, RandomBits random, std::int64_t position);
// Of state.
void stochastic_v_run(Type type, const float* from, int n, std::uint16_t* to, RandomBits random, std::int64_t position);
// Samples have `stride` elements from one to the next.
void stochastic_s_run(Type type, const float* from, int n, std::uint16_t* to, RandomBits random, std::int64_t position,
                      std::int64_t stride);

// x = x0 + delta, where delta is first made to fit the stored x (`displacement`).
void displaced_run(Type type, const std::uint16_t* from, int n, const float* x0, float* delta, float* x);
// Stores x0 + delta.
void place_run(Type type, const float* x0, const float* delta, int n, std::uint16_t* to);

}  // namespace prodigy::cpu
