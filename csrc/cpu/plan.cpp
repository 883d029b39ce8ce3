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

  void update(const StepInput& input, const Estimate* row, Sums<double>* sums) override;
  void finish(const StepInput& input, const Estimate* row, Estimate* new_row, const Sums<double>* sums,
              bool last) override;

 private:
  using Rows = std::vector<GroupRow<T>>;

  // Calls visit(chunk number, tensor, gradient, its group's row) for the chunks of all tensors that have a gradient and
  // are in an active group, in parallel where that pays.
  template <class Visit>
  void walk(const StepInput& input, const Rows& rows, Visit visit) const;

  std::vector<Tensor> tensors_;
  ChunkList list_;
  std::vector<std::int64_t> spans_;     // chunks [spans_[i], spans_[i + 1]) are walked in a row by one thread
  std::vector<Sums<double>> partials_;  // one per chunk
};

template <class T>
TypedPlan<T>::TypedPlan(std::vector<Tensor> tensors, std::size_t estimates)
    : tensors_(std::move(tensors)), list_(tensors_, kChunkSize, estimates), partials_(list_.chunks.size()) {
  std::int64_t in_span = kChunkSize;
  for (std::int64_t n = 0; n < list_.count(); ++n) {
    if (in_span >= kChunkSize) {
      spans_.push_back(n);
      in_span = 0;
    }
    in_span += list_.chunks[n].end - list_.chunks[n].begin;
  }
  spans_.push_back(list_.count());
}

template <class T>
template <class Visit>
void TypedPlan<T>::walk(const StepInput& input, const Rows& rows, Visit visit) const {
  const auto is_active = [&](std::size_t i) {
    return input.grads[i].data != nullptr && rows[tensors_[i].group].active;
  };
  std::int64_t elements = 0;
  for (std::size_t i = 0; i < tensors_.size(); ++i) elements += is_active(i) ? tensors_[i].numel : 0;
  if (elements == 0) return;
  const int threads = int(std::min<std::int64_t>(input.threads, 1 + elements / kElementsPerThread));
  parallel_for(long(spans_.size()) - 1, threads, [&](long span) {
    for (std::int64_t n = spans_[span]; n < spans_[span + 1]; ++n) {
      const auto i = std::size_t(list_.chunks[n].tensor);
      if (is_active(i)) visit(n, tensors_[i], input.grads[i], rows[tensors_[i].group]);
    }
  });
}

template <class T>
void TypedPlan<T>::update(const StepInput& input, const Estimate* row, Sums<double>* sums) {
  const double grad_scale = input.record.step.grad_scale.read();
  if (input.record.step.found_inf.read() != 0.0) return;
  Rows rows;
  for (const Group& group : input.record.groups) {
    rows.push_back(update_row<T>(group.read(), input.record.options(group), row[group.estimate], grad_scale));
  }
  std::fill(partials_.begin(), partials_.end(), Sums<double>{0.0, 0.0});
  walk(input, rows, [&](std::int64_t n, const Tensor& tensor, const Gradient& grad, const GroupRow<T>& group) {
    partials_[n] = update_chunk<T>(tensor, grad, list_.chunks[n], group.c);
    partials_[n].dot *= group.c.dot_weight;
  });
  for (std::size_t e = 0; e < list_.estimates(); ++e) {
    Accumulator dot, norm;
    for (std::int64_t n = list_.ranges[e]; n < list_.ranges[e + 1]; ++n) {
      dot.add(partials_[n].dot);
      norm.add(partials_[n].norm);
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
