// Runs of 16-bit numbers, to and from float32; `type` is theirs.
#pragma once

#include "prodigy/rounding.h"

namespace prodigy::cpu {

// Elements per block, the longest run; also the number of terms that float32 sums have to hold.
constexpr int kBlock = 1024;

void widen_run(Type type, const std::uint16_t* from, int n, float* to);
void nearest_run(Type type, const float* from, int n, std::uint16_t* to);

// The random bits of n elements, and of those that complete the last eight; position: of the first, a multiple of 8.
void random_run(RandomBits random, std::int64_t position, int n, std::uint32_t* bits);

// bits: of the elements. Of a parameter, or of state, whose samples have `stride` elements from one to the next.
void stochastic_x_run(Type type, const float* from, int n, std::uint16_t* to, const std::uint32_t* bits);
void stochastic_v_run(Type type, const float* from, int n, std::uint16_t* to, const std::uint32_t* bits);
void stochastic_s_run(Type type, const float* from, int n, std::uint16_t* to, const std::uint32_t* bits,
                      std::int64_t stride);

// x = x0 + delta, where delta is first made to fit the stored x (`displacement`).
void displaced_run(Type type, const std::uint16_t* from, int n, const float* x0, float* delta, float* x);
// Stores x0 + delta.
void place_run(Type type, const float* x0, const float* delta, int n, std::uint16_t* to);

// Note [Bytes in words]
// A loop over bytes and floats is compiled for vectors of 16 bytes. So bytes are copied to words, and back, by loops of
// their own.
void words_of_bytes_run(const std::int8_t* from, int n, std::int32_t* to);
void bytes_of_words_run(const std::int32_t* from, int n, std::int8_t* to);

// The values of 24 bits that x and low are, and back; bits: of the elements.
void kept_run(const std::uint16_t* x, const std::int32_t* low, int n, float* to);
void stochastic_24_run(const float* from, int n, std::uint16_t* x, std::int32_t* low, const std::uint32_t* bits);

// float16 in vectors of kLanes floats: each for one instruction set, which all of a file is compiled for.
template <int kLanes>
struct Float16Runs {
  static void widen(const std::uint16_t* from, int n, float* to);
  static void nearest(const float* from, int n, std::uint16_t* to);
  static void stochastic(const float* from, int n, std::uint16_t* to, const std::uint32_t* bits);
  static void displaced(const std::uint16_t* from, int n, const float* x0, float* delta, float* x);
  static void place(const float* x0, const float* delta, int n, std::uint16_t* to);
};

}  // namespace prodigy::cpu
