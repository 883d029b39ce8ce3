// Compiled for x86-64-v4.
#include "cpu/code_runs.h"

#ifdef PRODIGY_HAS_CLONES
template struct prodigy::cpu::CodeRuns<16>;
#endif
