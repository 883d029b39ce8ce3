#include "cpu/plan.h"

#include <algorithm>
#include <stdexcept>

#include "cpu/parallel.h"
#include "cpu/walk.h"

namespace prodigy::cpu {
namespace {

// With fewer elements than this for each, another thread costs more than it brings.
constexpr std::int64_t kElementsPerThread = 1 << 16;

// The factors for the elements of one group.
template <class T>
struct GroupRow {
  Coefficients<T> c;
  T old_d_eps;
  bool active;  // lr > 0
};

template <class T>
std::vector<GroupRow<T>> group_rows(const Record& record, const Estimate& old, double d_new) {
  std::vector<GroupRow<T>> rows;
  rows.reserve(record.groups.size());
  const double grad_scale = record.step.grad_scale.read();
  for (const Group& group : record.groups) {
    const Hyper hyper = group.read();
    const auto c = coefficients<T>(hyper, record.step.options, old, d_new, grad_scale);
    rows.push_back({c, T(old.d * hyper.eps), hyper.lr > 0.0});
  }
  return rows;
}

// T: the type of the arithmetic.
template <class T>
class TypedPlan final : public Plan {
 public:
  explicit TypedPlan(std::vector<Tensor> tensors);

  void update(const StepInput& input, const Estimate& row, Sums<double>& sums) override;
  void finish(const StepInput& input, Estimate& row, const Sums<double>& sums, bool last) override;

 private:
  using Rows = std::vector<GroupRow<T>>;

  // Calls visit(chunk number, tensor, gradient, its group's row) for the chunks of all tensors that have a gradient and
  // are in an active group, in parallel where that pays.
  template <class Visit>
  void walk(const StepInput& input, const Rows& rows, Visit visit) const;

  std::vector<Tensor> tensors_;
  std::vector<Chunk> chunks_;
  std::vector<long> spans_;             // chunks [spans_[i], spans_[i + 1]) are walked in a row by one thread
  std::vector<Sums<double>> partials_;  // one per chunk
};

template <class T>
TypedPlan<T>::TypedPlan(std::vector<Tensor> tensors) : tensors_(std::move(tensors)) {
  std::int64_t in_span = kChunkSize;
  for (std::size_t i = 0; i < tensors_.size(); ++i) {
    for (std::int64_t begin = 0; begin < tensors_[i].numel; begin += kChunkSize) {
      if (in_span >= kChunkSize) {
        spans_.push_back(long(chunks_.size()));
        in_span = 0;
      }
      chunks_.push_back({std::int32_t(i), begin, std::min(begin + kChunkSize, tensors_[i].numel)});
      in_span += chunks_.back().end - begin;
    }
  }
  spans_.push_back(long(chunks_.size()));
  partials_.resize(chunks_.size());
}

template <class T>
template <class Visit>
void TypedPlan<T>::walk(const StepInput& input, const Rows& rows, Visit visit) const {
  const auto is_active = [&](std::size_t i) {
    return input.grads[i].data != nullptr && rows[tensors_[i].group].active;
  };
  std::int64_t elements = 0;
  for (std::size_t i = 0; i < tensors_.size(); ++i) elements += is_active(i) ? tensors_[i].numel : 0;
  const int threads = int(std::min<std::int64_t>(input.threads, 1 + elements / kElementsPerThread));
  parallel_for(long(spans_.size()) - 1, threads, [&](long span) {
    for (long n = spans_[span]; n < spans_[span + 1]; ++n) {
      const auto i = std::size_t(chunks_[n].tensor);
      if (is_active(i)) visit(n, tensors_[i], input.grads[i], rows[tensors_[i].group]);
    }
  });
}

template <class T>
void TypedPlan<T>::update(const StepInput& input, const Estimate& row, Sums<double>& sums) {
  if (input.record.step.found_inf.read() != 0.0) return;
  Rows rows = group_rows<T>(input.record, row, row.d);
  for (GroupRow<T>& group : rows) group.c = without_step(group.c);
  std::fill(partials_.begin(), partials_.end(), Sums<double>{0.0, 0.0});
  walk(input, rows, [&](long n, const Tensor& tensor, const Gradient& grad, const GroupRow<T>& group) {
    partials_[n] = update_chunk<T>(tensor, grad, chunks_[n], group.c);
    partials_[n].dot *= group.c.dot_weight;
  });
  Accumulator dot, norm;
  for (const Sums<double>& part : partials_) {
    dot.add(part.dot);
    norm.add(part.norm);
  }
  sums = {dot.total(), norm.total()};
}

template <class T>
void TypedPlan<T>::finish(const StepInput& input, Estimate& row, const Sums<double>& sums, bool last) {
  if (input.record.step.found_inf.read() != 0.0) return;
  Estimate now = row;
  const bool stepped = advance(now, sums, input.record.step.options);
  const Rows rows = group_rows<T>(input.record, row, now.d);
  const auto how = [&](const GroupRow<T>& group) { return finish_of(group.c.deferred, stepped, now.d != row.d); };
  if (std::any_of(rows.begin(), rows.end(), [&](const auto& group) { return how(group) != Finish::kNothing; })) {
    walk(input, rows, [&](long n, const Tensor& tensor, const Gradient& grad, const GroupRow<T>& group) {
      if (how(group) == Finish::kNothing) return;
      finish_chunk<T>(tensor, grad, chunks_[n], group.c, group.old_d_eps, T(now.d), how(group));
    });
  }
  if (last) row = now;
}

}  // namespace

std::unique_ptr<Plan> make_plan(std::vector<Tensor> tensors, Type type) {
  if (type == Type::kOther) throw std::invalid_argument("unsupported dtype");
  if (type == Type::kFloat64) return std::make_unique<TypedPlan<double>>(std::move(tensors));
  return std::make_unique<TypedPlan<float>>(std::move(tensors));
}

}  // namespace prodigy::cpu
