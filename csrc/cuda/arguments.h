// The argument of the kernels: one plain struct, passed by value. All addresses in it are on the device.
#pragma once

#include "prodigy/record.h"
#include "prodigy/rule.h"
#include "prodigy/table.h"

namespace prodigy::cuda {

struct Arguments {
  const Tensor* tensors;
  const Chunk* chunks;
  std::int64_t chunk_count;
  std::int64_t first_chunk;    // the first that update walks, with one block for each; the others keep their partials
  const std::int64_t* ranges;  // of the chunks, see ChunkList
  std::int64_t estimate_count;
  const Group* groups;
  std::int64_t group_count;
  const Gradient* grads;  // one per tensor
  Gradient only;          // instead of them, if it is not null

  Sums<double>* partials;  // one per chunk
  unsigned* arrived;       // number of blocks that have finished; the last one resets it to 0
  Sums<double>* sums;      // one per estimate, as the next two are; written by update, read by finish
  const Estimate* row;     // read by both
  Estimate* new_row;       // written by finish if `last`; may be the same memory as `row`

  StepScalars step;
  bool adds_up;  // whether update also writes `sums`
  bool last;
};

using KernelFunction = void (*)(Arguments);

}  // namespace prodigy::cuda
