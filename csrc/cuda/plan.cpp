#include "cuda/plan.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>

namespace prodigy::cuda {

// Tables follow each other without gaps.
static_assert(sizeof(Tensor) % alignof(Chunk) == 0 && sizeof(Group) % alignof(Gradient) == 0);

Plan::Plan(std::vector<Tensor> tensors, Number number) : tensors_(std::move(tensors)), number_(number) {
  for (std::size_t i = 0; i < tensors_.size(); ++i) {
    for (std::int64_t begin = 0; begin < tensors_[i].numel; begin += kCudaChunkSize) {
      chunks_.push_back({std::int32_t(i), begin, std::min(begin + kCudaChunkSize, tensors_[i].numel)});
    }
  }
}

std::size_t Plan::table_bytes() const { return tensors_.size() * sizeof(Tensor) + chunks_.size() * sizeof(Chunk); }

void Plan::write_table(void* to) const {
  const std::size_t bytes = tensors_.size() * sizeof(Tensor);
  std::memcpy(to, tensors_.data(), bytes);
  if (!chunks_.empty()) {
    std::memcpy(static_cast<std::byte*>(to) + bytes, chunks_.data(), chunks_.size() * sizeof(Chunk));
  }
}

bool Plan::pack_step(const std::vector<Group>& groups, const std::vector<Gradient>& grads) {
  if (grads.size() != tensors_.size()) throw std::invalid_argument("one gradient, or null, per tensor");
  const std::size_t bytes = groups.size() * sizeof(Group);
  std::vector<std::byte> packed(bytes + grads.size() * sizeof(Gradient));
  // Field by field, so that padding, which has no fixed value, never looks like a change.
  for (std::size_t i = 0; i < groups.size(); ++i) {
    Group group;
    std::memset(static_cast<void*>(&group), 0, sizeof(Group));
    const Hyper& from = groups[i].hyper;
    Hyper& h = group.hyper;
    h.lr = from.lr, h.beta1 = from.beta1, h.beta2 = from.beta2, h.eps = from.eps, h.weight_decay = from.weight_decay;
    h.decouple = from.decouple, h.use_bias_correction = from.use_bias_correction;
    h.safeguard_warmup = from.safeguard_warmup, h.maximize = from.maximize;
    group.lr.value = groups[i].lr.value, group.lr.address = groups[i].lr.address, group.lr.bits = groups[i].lr.bits;
    std::memcpy(packed.data() + i * sizeof(Group), &group, sizeof(Group));
  }
  for (std::size_t i = 0; i < grads.size(); ++i) {
    Gradient gradient;
    std::memset(static_cast<void*>(&gradient), 0, sizeof(Gradient));
    gradient.at = grads[i].at, gradient.type = grads[i].type;
    std::memcpy(packed.data() + bytes + i * sizeof(Gradient), &gradient, sizeof(Gradient));
  }
  group_count_ = groups.size();
  if (packed == step_) return false;
  step_.swap(packed);
  return true;
}

void Plan::write_step(void* to) const { std::memcpy(to, step_.data(), step_.size()); }

void Plan::update(Arguments arguments, const void* table, const void* step, void* stream) {
  launch(Kernel::kUpdate, arguments, table, step, stream);
}

void Plan::finish(Arguments arguments, const void* table, const void* step, void* stream) {
  launch(Kernel::kFinish, arguments, table, step, stream);
}

void Plan::launch(Kernel kernel, Arguments& arguments, const void* table, const void* step, void* stream) {
  int& resident = resident_blocks_[int(kernel)];
  if (resident == 0) resident = resident_blocks(kernel, number_);
  arguments.tensors = static_cast<const Tensor*>(table);
  arguments.chunks = reinterpret_cast<const Chunk*>(arguments.tensors + tensors_.size());
  arguments.chunk_count = std::int64_t(chunks_.size());
  arguments.groups = static_cast<const Group*>(step);
  arguments.group_count = std::int64_t(group_count_);
  arguments.grads = reinterpret_cast<const Gradient*>(arguments.groups + group_count_);
  // One block at least: it has the sums, or the estimate, to write.
  const auto blocks = std::clamp<std::int64_t>(arguments.chunk_count, 1, resident);
  cuda::launch(kernel, number_, int(blocks), arguments, stream);
}

}  // namespace prodigy::cuda
