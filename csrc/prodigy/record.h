// The numbers of one step, as prodigy_fused/record.py packs them and every backend reads them: one StepScalars, then
// one Group per parameter group (docs/design.md, "The step record"). And the estimate, a row of the same kind.
//
// Every field is one word of 8 bytes. A struct and the names of its words come from the same list, and Python compares
// the names with its own when it imports this module: a field that is missing on either side cannot go unnoticed.
#pragma once

#include <cstdint>
#include <cstring>
#include <iterator>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

#include "prodigy/inline.h"

namespace prodigy {

// A number that the host knows, or that only the device knows.
struct Scalar {
  double value;           // counts if `address` is 0
  std::uint64_t address;  // on the plan's device
  std::int64_t bits;      // of the floating-point number at `address`: 32 or 64

  PRODIGY_INLINE double read() const {
    if (address == 0) return value;
    return bits == 32 ? double(*reinterpret_cast<const float*>(address)) : *reinterpret_cast<const double*>(address);
  }
};

// The lists: word(type, name), and scalar(name) for a Scalar, which is three words.
// clang-format off

// In the order of prodigy_fused.estimate.FIELDS.
#define PRODIGY_ESTIMATE(word) \
  word(double, d) word(double, d_max) word(double, d_hat) \
  word(double, d_numerator) word(double, d_denom) \
  word(double, k) word(double, nonfinite_steps) word(double, corrections)

// A gradient scaler's: the divisor of the gradients, and whether they have overflowed (then it is not 0).
#define PRODIGY_SCALER(scalar) \
  scalar(grad_scale) scalar(found_inf)

// In this and the next list, the integers are flags, 0 or 1.
#define PRODIGY_HYPER(word) \
  word(double, lr) word(double, beta1) word(double, beta2) word(double, eps) word(double, weight_decay) \
  word(std::int64_t, decouple) word(std::int64_t, use_bias_correction) \
  word(std::int64_t, safeguard_warmup) word(std::int64_t, maximize)

#define PRODIGY_ESTIMATE_OPTIONS(word) \
  word(double, d0) word(double, d_coef) word(double, growth_rate) word(double, beta3) word(double, d_limit) \
  word(std::int64_t, frozen)

// The index of the group's estimate; and two words that are, together with Hyper's lr, a Scalar.
#define PRODIGY_GROUP(word) \
  word(std::int64_t, estimate) word(std::uint64_t, lr_address) word(std::int64_t, lr_bits)

// clang-format on
#define PRODIGY_MEMBER(type, name) type name;
#define PRODIGY_SCALAR_MEMBER(name) Scalar name;
#define PRODIGY_NAME(type, name) #name,
#define PRODIGY_SCALAR_NAMES(name) #name, #name "_address", #name "_bits",

// An estimate: what a step reads and leaves.
struct Estimate {
  PRODIGY_ESTIMATE(PRODIGY_MEMBER)
};

// The numbers of a step that all groups share. Like that of a Group, its size is a multiple of 16 bytes, so that tables
// can follow each other without gaps.
struct alignas(16) StepScalars {
  PRODIGY_SCALER(PRODIGY_SCALAR_MEMBER)
};

// The options of one parameter group.
struct Hyper {
  PRODIGY_HYPER(PRODIGY_MEMBER)
};

// The options of an estimate.
struct EstimateOptions {
  PRODIGY_ESTIMATE_OPTIONS(PRODIGY_MEMBER)
};

// One parameter group. Either all groups share estimate 0, or each has its own, of the same index: so the options of
// estimate e are those in group e.
struct alignas(16) Group {
  Hyper hyper;
  EstimateOptions options;
  PRODIGY_GROUP(PRODIGY_MEMBER)

  // The options, with an lr on the device read from there.
  PRODIGY_INLINE Hyper read() const {
    Hyper now = hyper;
    now.lr = Scalar{hyper.lr, lr_address, lr_bits}.read();
    return now;
  }
};

constexpr const char* kEstimateFields[] = {PRODIGY_ESTIMATE(PRODIGY_NAME)};
constexpr const char* kStepFields[] = {PRODIGY_SCALER(PRODIGY_SCALAR_NAMES)};
constexpr const char* kGroupFields[] = {PRODIGY_HYPER(PRODIGY_NAME) PRODIGY_ESTIMATE_OPTIONS(PRODIGY_NAME)
                                            PRODIGY_GROUP(PRODIGY_NAME)};

// No padding but at the end of a row.
constexpr std::size_t kWord = 8, kRowAlignment = 16;
constexpr std::size_t row_bytes(std::size_t words) {
  return (kWord * words + kRowAlignment - 1) / kRowAlignment * kRowAlignment;
}
static_assert(sizeof(Estimate) == kWord * std::size(kEstimateFields));
static_assert(sizeof(StepScalars) == row_bytes(std::size(kStepFields)));
static_assert(sizeof(Group) == row_bytes(std::size(kGroupFields)));

// A record's bytes as structs.
struct Record {
  StepScalars step;
  std::vector<Group> groups;

  // least_groups: as many as the plan's tensors and estimates refer to. Throws std::invalid_argument if the size is
  // wrong, or a group has an estimate that the plan does not know.
  Record(std::string_view bytes, std::size_t least_groups, std::size_t estimates) {
    const std::size_t size = bytes.size();
    if (size < sizeof(step) || (size - sizeof(step)) % sizeof(Group) != 0) {
      throw std::invalid_argument("a step record of " + std::to_string(size) + " bytes: it must have " +
                                  std::to_string(sizeof(step)) + ", plus " + std::to_string(sizeof(Group)) +
                                  " for each parameter group");
    }
    groups.resize((size - sizeof(step)) / sizeof(Group));
    if (groups.size() < least_groups) {
      throw std::invalid_argument("a step record of " + std::to_string(groups.size()) +
                                  " parameter groups: the plan has tensors of " + std::to_string(least_groups));
    }
    std::memcpy(&step, bytes.data(), sizeof(step));
    if (!groups.empty()) std::memcpy(groups.data(), bytes.data() + sizeof(step), groups.size() * sizeof(Group));
    for (const Group& group : groups) {
      if (std::uint64_t(group.estimate) < estimates) continue;
      throw std::invalid_argument("a step record with estimate " + std::to_string(group.estimate) + ": the plan has " +
                                  std::to_string(estimates));
    }
  }

  // The options of a group's estimate.
  const EstimateOptions& options(const Group& group) const { return groups[std::size_t(group.estimate)].options; }
};

}  // namespace prodigy
