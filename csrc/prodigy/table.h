// The tensor table and the chunk list of a plan: where a walk over all parameters finds them in memory.
#pragma once

#include <cstdint>
#include <type_traits>

#include "prodigy/type.h"

namespace prodigy {

// Elements per chunk on the CPU. A chunk belongs to one tensor and gives one pair of partial sums, at its own fixed
// place.
constexpr std::int64_t kChunkSize = 1 << 15;
constexpr int kMaxDims = 8;

// The dimensions of a tensor whose memory is not in row-major order, from the outermost in memory inwards.
struct MemoryOrder {
  int dims = 0;                             // 0: row-major
  std::int64_t stride[kMaxDims];            // in elements
  std::int64_t row_major_stride[kMaxDims];  // the same dimension's, if memory were in row-major order
};

// Where the elements of a shard are in the whole tensor, both in row-major order: Note [Global index] of
// prodigy_fused/dtensor.py. An ordinary tensor is the whole.
struct IndexMap {
  std::int64_t base = 0;            // the first element
  std::int64_t length = INT64_MAX;  // of a row, whose elements are consecutive ones of the whole
  std::int64_t pitch = 0;           // from the first element of a row to that of the next
};

// A tensor's gradient in one step.
struct Gradient {
  const void* data = nullptr;  // null: the tensor is left alone
  Type type = Type::kOther;
  std::int32_t unused = 0;  // instead of padding, which has no value: tables are compared as bytes
};
static_assert(sizeof(Gradient) == 16 && std::has_unique_object_representations_v<Gradient>);

// One tensor. The arithmetic is float64 if x is, else float32. All arrays are walked in memory order with the same
// index; with slice_p > 1, s and x0 are packed samples.
struct Tensor {
  void* x;
  void *m, *v;
  void* s;              // null: the estimate is frozen, and needs no samples
  const void* x0;       // null: x0 is zero everywhere, or only the samples would need it
  float* delta;         // null, or x - x0: x is then x0 + delta, rounded
  std::int8_t* low;     // null, or 8 more bits of x: see Note [24 bits] of prodigy_fused/rounding.py
  std::int8_t* moved;   // null, or the codes of x - x0, in the place of x0; with the next:
  std::uint8_t* scale;  // null, or four bytes for each block of codes: see Note [8 bits] of prodigy_fused/eight_bits.py
  Type type, state_type;  // of x and x0; of m, v and s, kUInt8 for codes: then an s of samples is float32
  bool stochastic;        // how x is rounded, if it has 16 bits, or 24, and no delta
  std::uint32_t index;    // for random bits
  std::int64_t numel;
  std::int64_t slice_p;
  int group, estimate;
  MemoryOrder order;
  IndexMap where;  // of a shard that has samples or random bits, which go by the index in the whole; it is row-major
};

// Whether anything of a tensor is rounded stochastically.
PRODIGY_INLINE bool needs_random_bits(const Tensor& t) {
  return t.stochastic || is_half(t.state_type) || is_coded(t.state_type);
}

// Elements [begin, end) of a tensor, which are in a row of it.
struct Chunk {
  std::int32_t tensor;
  std::int64_t begin, end;
  std::int64_t shift;         // from an element's index to that in the whole tensor
  std::int64_t sample_shift;  // from a sample's place in s to its number among the samples of the whole
};

// What is added to an element's index for the one that its random bits go by: that in the whole tensor. Blocks of codes
// are those of this tensor, whatever it is a part of, and so are then the bits.
PRODIGY_INLINE std::int64_t random_shift(const Tensor& t, const Chunk& chunk) {
  return is_coded(t.state_type) ? 0 : chunk.shift;
}

// Where the element at position i in memory is in row-major order.
PRODIGY_INLINE std::int64_t row_major(const MemoryOrder& order, std::int64_t i) {
  std::int64_t position = 0;
  for (int k = 0; k < order.dims; ++k) {
    position += i / order.stride[k] * order.row_major_stride[k];
    i %= order.stride[k];
  }
  return position;
}

// The index in the whole tensor of element i.
PRODIGY_INLINE std::int64_t global_index(const IndexMap& where, std::int64_t i) {
  return where.base + i / where.length * where.pitch + i % where.length;
}

// How many samples the whole tensor has before an element; hence the number of the first one that is not before it.
PRODIGY_INLINE std::int64_t samples_before(std::int64_t global_index, std::int64_t slice_p) {
  return global_index / slice_p + (global_index % slice_p != 0);
}

}  // namespace prodigy
