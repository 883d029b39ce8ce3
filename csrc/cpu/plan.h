// A plan on the CPU: the tensor table, the chunk list, and the phases of a step over them (docs/design.md, "Layers").
#pragma once

#include <memory>
#include <vector>

#include "prodigy/rule.h"
#include "prodigy/table.h"

namespace prodigy::cpu {

// The numbers of one step, and one gradient per tensor of the plan.
struct StepInput {
  const Record& record;
  const std::vector<Gradient>& grads;
  int threads;  // at most
};

// `row`, `new_row` and `sums` are arrays of one per estimate. Where found_inf is set, a step changes nothing.
class Plan {
 public:
  virtual ~Plan() = default;

  // Phase 1. `sums` become those of this plan's tensors, with the weights of their groups.
  virtual void update(const StepInput& input, const Estimate* row, Sums<double>* sums) = 0;

  // Phase 2. `sums` are those of all plans. If this is the `last` plan, `new_row`, which may be the same memory
  // as `row`, becomes the new estimates.
  virtual void finish(const StepInput& input, const Estimate* row, Estimate* new_row, const Sums<double>* sums,
                      bool last) = 0;
};

// type: of all the parameters. estimates: their number.
std::unique_ptr<Plan> make_plan(std::vector<Tensor> tensors, Type type, std::size_t estimates);

}  // namespace prodigy::cpu
