// The packer: the tables of a plan as bytes to be copied to the device, and the launches over them.
//
// It owns no memory on the device and copies nothing: the caller allocates, and uploads the tables.
#pragma once

#include <cstddef>
#include <vector>

#include "cuda/launch.h"
#include "cuda/policy.h"
#include "prodigy/chunks.h"

namespace prodigy::cuda {

// Where the caller has put everything, on the plan's device.
struct Buffers {
  const void* table;       // the bytes of write_table()
  const void* step;        // the groups of the step's record, then one Gradient per tensor
  Sums<double>* partials;  // chunk_count() of them
  unsigned* arrived;       // 0
  Sums<double>* sums;      // one per estimate, as the next two are; written by update, read by finish
  const Estimate* row;
  Estimate* new_row;  // of `finish`; may be the same memory as `row`
};

class Plan {
 public:
  // estimates: their number. Throws std::invalid_argument if there is no kernel for the tensors' types.
  Plan(std::vector<Tensor> tensors, std::size_t estimates);

  // The tensors, the chunks and their ranges: constant as long as the plan is.
  std::size_t table_bytes() const;
  void write_table(void* to) const;

  std::size_t chunk_count() const { return list_.chunks.size(); }
  const std::vector<std::int64_t>& first_chunks() const { return list_.firsts; }

  // Launched on `stream`, a CUDA stream; not waited for. grads: those that are in `buffers`.
  void update(const Record& record, const std::vector<Gradient>& grads, const Buffers& buffers, void* stream);
  void finish(const Record& record, const std::vector<Gradient>& grads, const Buffers& buffers, void* stream,
              bool last);

  // `update` in parts: of tensor i alone, whose partials alone are written; and, after that of all tensors, the sums.
  void update_one(const Record& record, std::size_t i, const Gradient& grad, const Buffers& buffers, void* stream);
  void add_up(const Record& record, const Buffers& buffers, void* stream);

 private:
  Arguments arguments(const Record& record, const Buffers& buffers) const;
  // Whether every gradient has the type of the parameters, as all kernels but the last that fits demand.
  bool uniform(const std::vector<Gradient>& grads) const;
  // The policy of `update` for such gradients.
  int update_policy(const std::vector<Gradient>& grads) const;

  std::vector<Tensor> tensors_;
  Fitting update_, finish_;
  ChunkList list_;
  // Blocks of each finish kernel that the device holds at a time; 0: not asked yet.
  std::vector<int> resident_ = std::vector<int>(FinishPolicies::kSize);
};

}  // namespace prodigy::cuda
