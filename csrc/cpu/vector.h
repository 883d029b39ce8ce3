// Loops for vector registers: one build serves every x86-64.
#pragma once

#include <cstdint>
#include <string>

#include "prodigy/inline.h"

namespace prodigy::cpu {

// kBaseline: what every processor of the architecture has; else a level of x86-64.
enum class InstructionSet { kBaseline, kV3, kV4 };

// The one that kernels run on: the best that this machine has.
InstructionSet instruction_set();

// The names: "baseline", "x86-64-v3", "x86-64-v4".
std::string instruction_set_name();
// Chooses another one, for tests; not while a plan is at work. False if this machine does not have it.
bool use_instruction_set(const std::string& name);

#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 12
#define PRODIGY_HAS_CLONES 1
template <class Kernel, class... Args>
__attribute__((target("arch=x86-64-v3"))) auto run_v3(Args... args) {
  return Kernel::run(args...);
}
template <class Kernel, class... Args>
__attribute__((target("arch=x86-64-v4"))) auto run_v4(Args... args) {
  return Kernel::run(args...);
}
#endif

template <class Kernel, class... Args>
#if defined(__GNUC__)
__attribute__((noinline))
#endif
auto run_baseline(Args... args) {
  return Kernel::run(args...);
}

// Kernel::run(args...), compiled for each instruction set: it and all that it calls must be PRODIGY_INLINE. The
// arguments are copied, so that __restrict holds.
template <class Kernel, class... Args>
auto run(Args... args) {
#ifdef PRODIGY_HAS_CLONES
  if (instruction_set() == InstructionSet::kV4) return run_v4<Kernel>(args...);
  if (instruction_set() == InstructionSet::kV3) return run_v3<Kernel>(args...);
#endif
  return run_baseline<Kernel>(args...);
}

// Iterations touch different elements of arrays that do not overlap: no run-time checks for that.
#if defined(__GNUC__) && !defined(__clang__)
#define PRODIGY_VECTORIZE _Pragma("GCC ivdep")
#elif defined(__clang__)
#define PRODIGY_VECTORIZE _Pragma("clang loop vectorize(assume_safety)")
#else
#define PRODIGY_VECTORIZE
#endif

template <class Stored>
PRODIGY_INLINE void fetch(const Stored* array, int i, bool write) {
#if defined(__GNUC__)
  void* at = reinterpret_cast<void*>(std::uintptr_t(array) + i * sizeof(Stored));
  write ? __builtin_prefetch(at, 1) : __builtin_prefetch(at);
#endif
}

}  // namespace prodigy::cpu
