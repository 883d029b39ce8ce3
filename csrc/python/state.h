// The state of a parameter, as tensors in a dictionary (prodigy_fused/state.py, FIELDS).
#pragma once

#include <array>

namespace prodigy {

enum State { kM, kV, kS, kX0, kDelta, kLow, kScale };

// Indexed by State.
constexpr std::array kStateKeys = {"exp_avg", "exp_avg_sq", "s", "p0", "delta", "low", "scale"};
constexpr int kStates = int(kStateKeys.size());
static_assert(kStates == kScale + 1);

}  // namespace prodigy
