#include "cuda/plan.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>

namespace prodigy::cuda {
namespace {

// Tables follow each other without gaps.
static_assert(sizeof(Tensor) % alignof(Chunk) == 0 && sizeof(Chunk) % alignof(std::int64_t) == 0);
static_assert(sizeof(Group) % alignof(Gradient) == 0);

template <class T>
std::size_t bytes(const std::vector<T>& table) {
  return table.size() * sizeof(T);
}

// Returns where the next table goes.
template <class T>
std::byte* append(std::byte* to, const std::vector<T>& table) {
  if (!table.empty()) std::memcpy(to, table.data(), bytes(table));
  return to + bytes(table);
}

Storage storage_of(Type type, Type state_type) {
  if (type == Type::kOther) throw std::invalid_argument("unsupported dtype");
  if (type == Type::kFloat64) return Storage::kFloat64;
  return type == Type::kFloat32 && state_type == Type::kFloat32 ? Storage::kFloat32 : Storage::kMixed;
}

}  // namespace

Plan::Plan(std::vector<Tensor> tensors, Type type, Type state_type, std::size_t estimates)
    : tensors_(std::move(tensors)),
      list_(tensors_, kCudaChunkSize, estimates),
      storage_(storage_of(type, state_type)) {}

std::size_t Plan::table_bytes() const { return bytes(tensors_) + bytes(list_.chunks) + bytes(list_.ranges); }

void Plan::write_table(void* to) const {
  std::byte* next = append(static_cast<std::byte*>(to), tensors_);
  next = append(next, list_.chunks);
  append(next, list_.ranges);
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
  a.chunk_count = list_.count();
  a.ranges = reinterpret_cast<const std::int64_t*>(a.chunks + a.chunk_count);
  a.estimate_count = std::int64_t(list_.estimates());
  a.groups = static_cast<const Group*>(buffers.step);
  a.group_count = std::int64_t(record.groups.size());
  a.grads = reinterpret_cast<const Gradient*>(a.groups + a.group_count);
  a.partials = buffers.partials;
  a.arrived = buffers.arrived;
  a.sums = buffers.sums;
  a.row = buffers.row;
  a.new_row = buffers.new_row;
  a.step = record.step;
  a.last = last;
  // At least one block, which writes the sums or the estimates.
  const auto blocks = std::clamp<std::int64_t>(a.chunk_count, 1, resident);
  cuda::launch(kernel, storage_, int(blocks), a, stream);
}

}  // namespace prodigy::cuda
