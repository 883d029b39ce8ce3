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

template <class Policies>
Fitting policies_for(const std::vector<Tensor>& tensors) {
  const Fitting found = fitting_policies(Policies(), tensors);
  if (found.first < 0) throw std::invalid_argument("unsupported dtype");
  return found;
}

int chunk_size(int update_policy) {
  int size = 0;
  visit_policy(UpdatePolicies(), update_policy, [&](auto policy) { size = policy.kChunk; });
  return size;
}

}  // namespace

Plan::Plan(std::vector<Tensor> tensors, std::size_t estimates)
    : tensors_(std::move(tensors)),
      update_(policies_for<UpdatePolicies>(tensors_)),
      finish_(policies_for<FinishPolicies>(tensors_)),
      list_(tensors_, chunk_size(update_.first), estimates) {}

std::size_t Plan::table_bytes() const { return bytes(tensors_) + bytes(list_.chunks) + bytes(list_.ranges); }

void Plan::write_table(void* to) const {
  std::byte* next = append(static_cast<std::byte*>(to), tensors_);
  next = append(next, list_.chunks);
  append(next, list_.ranges);
}

bool Plan::uniform(const std::vector<Gradient>& grads) const {
  const Type type = tensors_.empty() ? Type::kOther : tensors_.front().type;
  return std::all_of(grads.begin(), grads.end(),
                     [&](const Gradient& g) { return g.data == nullptr || g.type == type; });
}

int Plan::update_policy(const std::vector<Gradient>& grads) const {
  return uniform(grads) ? update_.first : update_.last;
}

void Plan::update(const Record& record, const std::vector<Gradient>& grads, const Buffers& buffers, void* stream) {
  Arguments a = arguments(record, buffers);
  a.adds_up = true;
  // At least one block, which writes the sums.
  launch({Kernel::kUpdate, update_policy(grads)}, std::max<std::int64_t>(list_.count(), 1), a, stream);
}

void Plan::update_one(const Record& record, std::size_t i, const Gradient& grad, const Buffers& buffers, void* stream) {
  Arguments a = arguments(record, buffers);
  a.first_chunk = list_.firsts[i];
  a.only = grad;
  const std::int64_t blocks = list_.firsts[i + 1] - a.first_chunk;
  if (blocks > 0) launch({Kernel::kUpdate, update_policy({grad})}, blocks, a, stream);
}

void Plan::add_up(const Record& record, const Buffers& buffers, void* stream) {
  Arguments a = arguments(record, buffers);
  a.first_chunk = a.chunk_count;
  a.adds_up = true;
  launch({Kernel::kUpdate, update_.first}, 1, a, stream);
}

void Plan::finish(const Record& record, const std::vector<Gradient>& grads, const Buffers& buffers, void* stream,
                  bool last) {
  const int policy = uniform(grads) ? finish_.first : finish_.last;
  int& resident = resident_[std::size_t(policy)];
  if (resident == 0) resident = resident_blocks({Kernel::kFinish, policy});
  // At least one block, which writes the estimates.
  const std::int64_t blocks = std::clamp<std::int64_t>(list_.count(), 1, resident);
  Arguments a = arguments(record, buffers);
  a.last = last;
  launch({Kernel::kFinish, policy}, blocks, a, stream);
}

Arguments Plan::arguments(const Record& record, const Buffers& buffers) const {
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
  return a;
}

}  // namespace prodigy::cuda
