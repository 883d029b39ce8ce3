// A plan on the CPU: the tensor table, the chunk list, and the phases of a step over them (DESIGN.md, "Layers").
#pragma once

#include <vector>

#include "cpu/walk.h"

namespace prodigy::cpu {

// What a phase needs beside the tensors. One Hyper per parameter group.
struct StepInput {
  std::vector<Hyper> hypers;
  Shared shared;
  double grad_scale;
  int threads;
};

template <class T>
class Plan {
 public:
  explicit Plan(std::vector<Tensor> tensors);

  // Where `update` and `finish` find the gradients; null: the tensor is left alone.
  void set_grad(std::size_t i, const Gradient& grad) { tensors_[i].grad = grad; }

  // Phase 1. Returns the sums over the tensors of this plan, with the weights of their groups.
  Sums<double> update(const StepInput& input, const Estimate& estimate);

  // Phases 2 and 3: returns the new estimate and brings x to it.
  Estimate finish(const StepInput& input, const Estimate& old, const Sums<double>& sums);

 private:
  bool active(const Tensor& tensor, const StepInput& input) const {
    return tensor.grad.at != nullptr && input.hypers[tensor.group].lr > 0.0;
  }
  // Calls visit(chunk number) for the chunks of all active tensors, in parallel where that pays.
  template <class Visit>
  void walk(const StepInput& input, Visit visit) const;

  std::vector<Tensor> tensors_;
  std::vector<Chunk> chunks_;
  std::vector<long> spans_;             // chunks [spans_[i], spans_[i + 1]) are one thread's to walk in a row
  std::vector<Sums<double>> partials_;  // one per chunk
};

}  // namespace prodigy::cpu
