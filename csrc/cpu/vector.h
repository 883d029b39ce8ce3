// Hints to the compiler about loops that it should vectorise.
#pragma once

// One build serves every x86-64: the loader picks the widest version of each function marked so.
#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 12
#define PRODIGY_CLONES __attribute__((target_clones("default", "arch=x86-64-v3", "arch=x86-64-v4")))
#define PRODIGY_HAS_CLONES 1
#else
#define PRODIGY_CLONES
#endif

// Iterations touch different elements of arrays that do not overlap: no run-time checks for that.
#if defined(__GNUC__) && !defined(__clang__)
#define PRODIGY_VECTORIZE _Pragma("GCC ivdep")
#elif defined(__clang__)
#define PRODIGY_VECTORIZE _Pragma("clang loop vectorize(assume_safety)")
#else
#define PRODIGY_VECTORIZE
#endif
