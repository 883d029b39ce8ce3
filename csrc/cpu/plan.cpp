#include "cpu/plan.h"

#include <algorithm>

#include "cpu/parallel.h"

namespace prodigy::cpu {
namespace {

// Below this many elements another thread costs more than it brings.
constexpr std::int64_t kElementsPerThread = 1 << 16;

template <class T>
std::vector<Coefficients<T>> all_coefficients(const StepInput& input, const Estimate& old, double d_new) {
  std::vector<Coefficients<T>> all;
  for (const Hyper& h : input.hypers) {
    all.push_back(coefficients<T>(h, input.shared, old, d_new, input.grad_scale));
  }
  return all;
}

}  // namespace

template <class T>
Plan<T>::Plan(std::vector<Tensor> tensors) : tensors_(std::move(tensors)) {
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
void Plan<T>::walk(const StepInput& input, Visit visit) const {
  std::int64_t elements = 0;
  for (const Tensor& tensor : tensors_) elements += active(tensor, input) ? tensor.numel : 0;
  const int threads = int(std::min<std::int64_t>(input.threads, 1 + elements / kElementsPerThread));
  parallel_for(long(spans_.size()) - 1, threads, [&](long span) {
    for (long i = spans_[span]; i < spans_[span + 1]; ++i) {
      if (active(tensors_[chunks_[i].tensor], input)) visit(i);
    }
  });
}

template <class T>
Sums<double> Plan<T>::update(const StepInput& input, const Estimate& estimate) {
  auto groups = all_coefficients<T>(input, estimate, estimate.d);
  for (auto& c : groups) c = without_step(c);
  std::fill(partials_.begin(), partials_.end(), Sums<double>{0.0, 0.0});
  walk(input, [&](long i) {
    const Tensor& tensor = tensors_[chunks_[i].tensor];
    const Coefficients<T>& c = groups[tensor.group];
    partials_[i] = update_chunk<T>(tensor, chunks_[i], c);
    partials_[i].dot *= c.dot_weight;
  });
  Accumulator dot, norm;
  for (const Sums<double>& part : partials_) {
    dot.add(part.dot);
    norm.add(part.norm);
  }
  return {dot.total(), norm.total()};
}

template <class T>
Estimate Plan<T>::finish(const StepInput& input, const Estimate& old, const Sums<double>& sums) {
  Estimate estimate = old;
  const bool stepped = advance(estimate, sums, input.shared);
  const auto groups = all_coefficients<T>(input, old, estimate.d);
  const auto how = [&](const Coefficients<T>& c) { return finish_of(c.deferred, stepped, estimate.d != old.d); };
  if (std::all_of(groups.begin(), groups.end(), [&](auto& c) { return how(c) == Finish::kNothing; })) return estimate;
  walk(input, [&](long i) {
    const Tensor& tensor = tensors_[chunks_[i].tensor];
    const Coefficients<T>& c = groups[tensor.group];
    if (how(c) == Finish::kNothing) return;
    const T old_d_eps = T(old.d * input.hypers[tensor.group].eps);
    finish_chunk<T>(tensor, chunks_[i], c, old_d_eps, T(estimate.d), how(c));
  });
  return estimate;
}

template class Plan<float>;
template class Plan<double>;

}  // namespace prodigy::cpu
