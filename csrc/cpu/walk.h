// How the CPU walks a chunk.
#pragma once

#include "prodigy/rule.h"
#include "prodigy/table.h"

namespace prodigy::cpu {

// Phase 1 for one chunk; returns its part of the sums, unweighted.
template <class T>
Sums<double> update_chunk(const Tensor& tensor, const Gradient& grad, const Chunk& chunk, const Coefficients<T>& c);

// Phase 2 for one chunk of an active group.
template <class T>
void finish_chunk(const Tensor& tensor, const Gradient& grad, const Chunk& chunk, const GroupRow<T>& group);

}  // namespace prodigy::cpu
