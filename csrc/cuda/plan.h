// The packer: the tables of a plan as bytes to be copied to the device, and the launches over them.
//
// It owns no memory on the device and copies nothing: the caller allocates, and uploads what is packed here.
#pragma once

#include <cstddef>
#include <vector>

#include "cuda/launch.h"

namespace prodigy::cuda {

class Plan {
 public:
  Plan(std::vector<Tensor> tensors, Number number);

  // The tensors and the chunks: constant as long as the plan is.
  std::size_t table_bytes() const;
  void write_table(void* to) const;

  // The groups and the gradients. Returns whether they differ from what was packed last.
  bool pack_step(const std::vector<Group>& groups, const std::vector<Gradient>& grads);
  std::size_t step_bytes() const { return step_.size(); }
  void write_step(void* to) const;

  std::size_t chunk_count() const { return chunks_.size(); }

  // Where the caller has put everything; the rest of `arguments` is filled in here.
  void update(Arguments arguments, const void* table, const void* step, void* stream);
  void finish(Arguments arguments, const void* table, const void* step, void* stream);

 private:
  void launch(Kernel kernel, Arguments& arguments, const void* table, const void* step, void* stream);

  std::vector<Tensor> tensors_;
  std::vector<Chunk> chunks_;
  std::vector<std::byte> step_;
  std::size_t group_count_ = 0;
  Number number_;
  int resident_blocks_[2] = {0, 0};  // of each kernel; 0: not asked yet
};

}  // namespace prodigy::cuda
