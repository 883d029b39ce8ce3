// A plan on the CPU: the tensor table, the chunk list, and the phases of a step over them (docs/design.md, "Layers").
#pragma once

#include <memory>
#include <vector>

#include "prodigy/chunks.h"
#include "prodigy/rule.h"
#include "prodigy/table.h"

namespace prodigy::cpu {

// The numbers of one step, and one gradient per tensor of the plan.
struct StepInput {
  const Record& record;
  const std::vector<Gradient>& grads;
  int threads;  // at most
};

// `row`, `new_row` and `sums` are arrays of one per estimate, `partials` of one per chunk. Where found_inf is set, a
// step changes nothing.
class Plan {
 public:
  virtual ~Plan() = default;

  virtual const ChunkList& chunks() const = 0;

  // Phase 1. `partials` become those of this plan's tensors, with the weights of their groups; 0 without a gradient.
  virtual void update(const StepInput& input, const Estimate* row, Sums<double>* partials) = 0;
  // The same for tensor i alone; the other partials stay.
  virtual void update_one(const Record& record, int threads, std::size_t i, const Gradient& grad, const Estimate* row,
                          Sums<double>* partials) = 0;
  // The sums of this plan's tensors.
  virtual void add_up(const Sums<double>* partials, Sums<double>* sums) const = 0;

  // Phase 2. `sums` are those of all plans. If this is the `last` plan, `new_row`, which may be the same memory
  // as `row`, becomes the new estimates.
  virtual void finish(const StepInput& input, const Estimate* row, Estimate* new_row, const Sums<double>* sums,
                      bool last) = 0;
};

// type: of all the parameters. estimates: their number.
std::unique_ptr<Plan> make_plan(std::vector<Tensor> tensors, Type type, std::size_t estimates);

}  // namespace prodigy::cpu
