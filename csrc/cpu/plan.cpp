#include "cpu/plan.h"

#include <algorithm>
#include <stdexcept>

#include "cpu/parallel.h"
#include "cpu/walk.h"
#include "prodigy/chunks.h"

namespace prodigy::cpu {
namespace {

// With fewer elements than this for each, another thread costs more than it brings.
constexpr std::int64_t kElementsPerThread = 1 << 16;

// T: the type of the arithmetic.
template <class T>
class TypedPlan final : public Plan {
 public:
  TypedPlan(std::vector<Tensor> tensors, std::size_t estimates);

  const ChunkList& chunks() const override { return list_; }
  void update(const StepInput& input, const Estimate* row, Sums<double>* partials) override;
  void update_one(const Record& record, int threads, std::size_t i, const Gradient& grad, const Estimate* row,
                  Sums<double>* partials) override;
  void add_up(const Sums<double>* partials, Sums<double>* sums) const override;
  void finish(const StepInput& input, const Estimate* row, Estimate* new_row, const Sums<double>* sums,
              bool last) override;

 private:
  using Rows = std::vector<GroupRow<T>>;

  // Chunks [spans[i], spans[i + 1]) are walked in a row by one thread.
  using Spans = std::vector<std::int64_t>;
  // Those of the chunks [begin, end).
  Spans spans_of(std::int64_t begin, std::int64_t end) const;

  // Calls visit(chunk number, tensor, gradient, its group's row) for the chunks of all tensors that have a gradient and
  // are in an active group, in parallel where that pays.
  template <class Visit>
  void walk(const StepInput& input, const Rows& rows, Visit visit) const;
  // Calls visit(chunk number) for the chunks in `spans`, which have so many elements.
  template <class Visit>
  static void each_chunk(const Spans& spans, std::int64_t elements, int threads, Visit visit);

  std::vector<Tensor> tensors_;
  ChunkList list_;
  Spans spans_;  // of all chunks
};

template <class T>
TypedPlan<T>::TypedPlan(std::vector<Tensor> tensors, std::size_t estimates)
    : tensors_(std::move(tensors)), list_(tensors_, kChunkSize, estimates), spans_(spans_of(0, list_.count())) {}

template <class T>
typename TypedPlan<T>::Spans TypedPlan<T>::spans_of(std::int64_t begin, std::int64_t end) const {
  Spans spans;
  std::int64_t in_span = kChunkSize;
  for (std::int64_t n = begin; n < end; ++n) {
    if (in_span >= kChunkSize) {
      spans.push_back(n);
      in_span = 0;
    }
    in_span += list_.chunks[n].end - list_.chunks[n].begin;
  }
  spans.push_back(end);
  return spans;
}

template <class T>
template <class Visit>
void TypedPlan<T>::each_chunk(const Spans& spans, std::int64_t elements, int threads, Visit visit) {
  if (elements == 0) return;
  threads = int(std::min<std::int64_t>(threads, 1 + elements / kElementsPerThread));
  parallel_for(long(spans.size()) - 1, threads, [&](long span) {
    for (std::int64_t n = spans[span]; n < spans[span + 1]; ++n) visit(n);
  });
}

template <class T>
template <class Visit>
void TypedPlan<T>::walk(const StepInput& input, const Rows& rows, Visit visit) const {
  const auto is_active = [&](std::size_t i) {
    return input.grads[i].data != nullptr && rows[tensors_[i].group].active;
  };
  std::int64_t elements = 0;
  for (std::size_t i = 0; i < tensors_.size(); ++i) elements += is_active(i) ? tensors_[i].numel : 0;
  each_chunk(spans_, elements, input.threads, [&](std::int64_t n) {
    const auto i = std::size_t(list_.chunks[n].tensor);
    if (is_active(i)) visit(n, tensors_[i], input.grads[i], rows[tensors_[i].group]);
  });
}

template <class T>
void TypedPlan<T>::update(const StepInput& input, const Estimate* row, Sums<double>* partials) {
  const double grad_scale = input.record.step.grad_scale.read();
  if (input.record.step.found_inf.read() != 0.0) return;
  Rows rows;
  for (const Group& group : input.record.groups) {
    rows.push_back(update_row<T>(group.read(), input.record.options(group), row[group.estimate], grad_scale));
  }
  std::fill(partials, partials + list_.count(), Sums<double>{0.0, 0.0});
  walk(input, rows, [&](std::int64_t n, const Tensor& tensor, const Gradient& grad, const GroupRow<T>& group) {
    partials[n] = update_chunk<T>(tensor, grad, list_.chunks[n], group.c);
    partials[n].dot *= group.c.dot_weight;
  });
}

template <class T>
void TypedPlan<T>::update_one(const Record& record, int threads, std::size_t i, const Gradient& grad,
                              const Estimate* row, Sums<double>* partials) {
  const Tensor& tensor = tensors_[i];
  const Group& group = record.groups[std::size_t(tensor.group)];
  const GroupRow<T> own =
      update_row<T>(group.read(), record.options(group), row[group.estimate], record.step.grad_scale.read());
  if (!own.active) return;
  each_chunk(spans_of(list_.firsts[i], list_.firsts[i + 1]), tensor.numel, threads, [&](std::int64_t n) {
    partials[n] = update_chunk<T>(tensor, grad, list_.chunks[n], own.c);
    partials[n].dot *= own.c.dot_weight;
  });
}

template <class T>
void TypedPlan<T>::add_up(const Sums<double>* partials, Sums<double>* sums) const {
  for (std::size_t e = 0; e < list_.estimates(); ++e) {
    Accumulator dot, norm;
    for (std::int64_t n = list_.ranges[e]; n < list_.ranges[e + 1]; ++n) {
      dot.add(partials[n].dot);
      norm.add(partials[n].norm);
    }
    sums[e] = {dot.total(), norm.total()};
  }
}

template <class T>
void TypedPlan<T>::finish(const StepInput& input, const Estimate* row, Estimate* new_row, const Sums<double>* sums,
                          bool last) {
  const double grad_scale = input.record.step.grad_scale.read();
  if (input.record.step.found_inf.read() != 0.0) {
    if (last) std::copy_n(row, list_.estimates(), new_row);
    return;
  }
  std::vector<Progress> progress;
  for (std::size_t e = 0; e < list_.estimates(); ++e) {
    progress.emplace_back(row[e], sums[e], input.record.groups[e].options);
  }
  Rows rows;
  for (const Group& group : input.record.groups) {
    rows.push_back(finish_row<T>(group.read(), input.record.options(group), progress[group.estimate], grad_scale));
  }
  walk(input, rows, [&](std::int64_t n, const Tensor& tensor, const Gradient& grad, const GroupRow<T>& group) {
    finish_chunk<T>(tensor, grad, list_.chunks[n], group);
  });
  for (std::size_t e = 0; last && e < list_.estimates(); ++e) new_row[e] = progress[e].now;
}

}  // namespace

std::unique_ptr<Plan> make_plan(std::vector<Tensor> tensors, Type type, std::size_t estimates) {
  if (type == Type::kOther) throw std::invalid_argument("unsupported dtype");
  if (type == Type::kFloat64) return std::make_unique<TypedPlan<double>>(std::move(tensors), estimates);
  return std::make_unique<TypedPlan<float>>(std::move(tensors), estimates);
}

}  // namespace prodigy::cpu
