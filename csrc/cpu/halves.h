// Runs of 16-bit numbers, to and from float32; `type` is theirs.
#pragma once

#include "prodigy/rounding.h"

namespace prodigy::cpu {

void widen_run(Type type, const std::uint16_t* from, int n, float* to);
void nearest_run(Type type, const float* from, int n, std::uint16_t* to);

// low: the low 32 bits of the first element's position. exchanged_*: for a second rounded value of the same elements (v
// besides x).
void stochastic_run(Type type, const float* from, int n, std::uint16_t* to, RandomBits random, std::uint32_t low);
void exchanged_stochastic_run(Type type, const float* from, int n, std::uint16_t* to, RandomBits random,
                              std::uint32_t low);

// x = x0 + delta, where delta is first made to fit the stored x (`displacement`).
void displaced_run(Type type, const std::uint16_t* from, int n, const float* x0, float* delta, float* x);
// Stores x0 + delta.
void place_run(Type type, const float* x0, const float* delta, int n, std::uint16_t* to);

}  // namespace prodigy::cpu
