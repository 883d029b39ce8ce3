// The chunk list of a plan.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "prodigy/table.h"

namespace prodigy {

// In the order of the tensors, which is that of their estimates: the sums of each are those of one range of chunks, in
// an order that does not depend on the others.
struct ChunkList {
  std::vector<Chunk> chunks;
  std::vector<std::int64_t> ranges;  // estimate e has the chunks [ranges[e], ranges[e + 1])

  ChunkList(const std::vector<Tensor>& tensors, std::int64_t chunk_size, std::size_t estimates) {
    const auto begin_ranges = [&](std::size_t end) { ranges.resize(std::max(ranges.size(), end), count()); };
    for (std::size_t i = 0; i < tensors.size(); ++i) {
      begin_ranges(std::size_t(tensors[i].estimate) + 1);
      for (std::int64_t begin = 0; begin < tensors[i].numel; begin += chunk_size) {
        chunks.push_back({std::int32_t(i), begin, std::min(begin + chunk_size, tensors[i].numel)});
      }
    }
    begin_ranges(estimates + 1);
  }

  std::int64_t count() const { return std::int64_t(chunks.size()); }
  std::size_t estimates() const { return ranges.size() - 1; }
};

}  // namespace prodigy
