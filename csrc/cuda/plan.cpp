#include "cuda/plan.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>

namespace prodigy::cuda {
namespace {

// Tables follow each other without gaps.
static_assert(sizeof(Tensor) % alignof(Chunk) == 0 && sizeof(Group) % alignof(Gradient) == 0);

Storage storage_of(Type type, Type state_type) {
  if (type == Type::kOther) throw std::invalid_argument("unsupported dtype");
  if (type == Type::kFloat64) return Storage::kFloat64;
  return type == Type::kFloat32 && state_type == Type::kFloat32 ? Storage::kFloat32 : Storage::kMixed;
}

}  // namespace

Plan::Plan(std::vector<Tensor> tensors, Type type, Type state_type)
    : tensors_(std::move(tensors)), storage_(storage_of(type, state_type)) {
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

void Plan::update(const Record& record, const Buffers& buffers, void* stream) {
  launch(Kernel::kUpdate, record, buffers, stream, false);
}

void Plan::finish(const Record& record, const Buffers& buffers, void* stream, bool last) {
  launch(Kernel::kFinish, record, buffers, stream, last);
}

void Plan::launch(Kernel kernel, const Record& record, const Buffers& buffers, void* stream, bool last) {
  int& resident = resident_blocks_[int(kernel)];
  if (resident == 0) resident = resident_blocks(kernel, storage_);
  Arguments a{};
  a.tensors = static_cast<const Tensor*>(buffers.table);
  a.chunks = reinterpret_cast<const Chunk*>(a.tensors + tensors_.size());
  a.chunk_count = std::int64_t(chunks_.size());
  a.groups = static_cast<const Group*>(buffers.step);
  a.group_count = std::int64_t(record.groups.size());
  a.grads = reinterpret_cast<const Gradient*>(a.groups + a.group_count);
  a.partials = buffers.partials;
  a.arrived = buffers.arrived;
  a.sums = buffers.sums;
  a.row = buffers.row;
  a.step = record.step;
  a.last = last;
  // At least one block, which writes the sums or the estimate.
  const auto blocks = std::clamp<std::int64_t>(a.chunk_count, 1, resident);
  cuda::launch(kernel, storage_, int(blocks), a, stream);
}

}  // namespace prodigy::cuda
