#include "cpu/vector.h"

#include <iterator>

namespace prodigy::cpu {
namespace {

// Indexed by InstructionSet.
constexpr const char* kNames[] = {"baseline", "x86-64-v3", "x86-64-v4"};

bool has(InstructionSet set) {
#ifdef PRODIGY_HAS_CLONES
  if (set == InstructionSet::kV3) return __builtin_cpu_supports("x86-64-v3");
  if (set == InstructionSet::kV4) return __builtin_cpu_supports("x86-64-v4");
#endif
  return set == InstructionSet::kBaseline;
}

InstructionSet best() {
  for (const auto set : {InstructionSet::kV4, InstructionSet::kV3}) {
    if (has(set)) return set;
  }
  return InstructionSet::kBaseline;
}

InstructionSet chosen = best();

}  // namespace

InstructionSet instruction_set() { return chosen; }

std::string instruction_set_name() { return kNames[int(chosen)]; }

bool use_instruction_set(const std::string& name) {
  for (int i = 0; i < int(std::size(kNames)); ++i) {
    if (name != kNames[i] || !has(InstructionSet(i))) continue;
    chosen = InstructionSet(i);
    return true;
  }
  return false;
}

}  // namespace prodigy::cpu
