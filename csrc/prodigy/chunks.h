// The chunk list of a plan.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "prodigy/rounding.h"
#include "prodigy/table.h"

namespace prodigy {

// The number of samples of a tensor with these elements.
inline std::int64_t sample_count(const IndexMap& where, std::int64_t numel, std::int64_t slice_p) {
  std::int64_t count = 0;
  for (std::int64_t begin = 0, size; begin < numel; begin += size) {
    size = std::min(where.length, numel - begin);
    const std::int64_t g = global_index(where, begin);
    count += samples_before(g + size, slice_p) - samples_before(g, slice_p);
  }
  return count;
}

// In the order of the tensors, which is that of their estimates: the sums of each are those of one range of chunks, in
// an order that does not depend on the others.
struct ChunkList {
  std::vector<Chunk> chunks;
  std::vector<std::int64_t> ranges;  // estimate e has the chunks [ranges[e], ranges[e + 1])
  std::vector<std::int64_t> firsts;  // tensor i has the chunks [firsts[i], firsts[i + 1])

  ChunkList(const std::vector<Tensor>& tensors, std::int64_t chunk_size, std::size_t estimates) {
    const auto begin_ranges = [&](std::size_t end) { ranges.resize(std::max(ranges.size(), end), count()); };
    for (std::size_t i = 0; i < tensors.size(); ++i) {
      begin_ranges(std::size_t(tensors[i].estimate) + 1);
      firsts.push_back(count());
      cut(std::int32_t(i), tensors[i], chunk_size);
    }
    begin_ranges(estimates + 1);
    firsts.push_back(count());
  }

  std::int64_t count() const { return std::int64_t(chunks.size()); }
  std::size_t estimates() const { return ranges.size() - 1; }

 private:
  void cut(std::int32_t number, const Tensor& t, std::int64_t chunk_size) {
    std::int64_t taken = 0;  // samples
    for (std::int64_t begin = 0, size; begin < t.numel; begin += size) {
      const std::int64_t g = global_index(t.where, begin), sample = samples_before(g, t.slice_p);
      size = std::min({chunk_size, t.numel - begin, t.where.length - begin % t.where.length, run(t, g)});
      chunks.push_back({number, begin, begin + size, g - begin, sample - taken});
      taken += samples_before(g + size, t.slice_p) - sample;
    }
  }

  // The most elements of a chunk that begins at g in the whole. Where there are random bits, its elements share a
  // RandomBits; and it begins with an eight, or is the rest of one, so that no pack of a thread has parts of two.
  // Chunks of codes begin with a block of them, and chunk sizes are powers of two, so that they need no care.
  static std::int64_t run(const Tensor& t, std::int64_t g) {
    if (!needs_random_bits(t) || is_coded(t.state_type)) return INT64_MAX;
    return g % kEight != 0 ? kEight - g % kEight : kSameBits - g % kSameBits;
  }
};

}  // namespace prodigy
