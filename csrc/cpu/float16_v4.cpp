// Compiled for x86-64-v4.
#include "cpu/float16_runs.h"

#ifdef PRODIGY_HAS_CLONES
template struct prodigy::cpu::Float16Runs<16>;
#endif
