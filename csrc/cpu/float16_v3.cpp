// Compiled for x86-64-v3.
#include "cpu/float16_runs.h"

#ifdef PRODIGY_HAS_CLONES
template struct prodigy::cpu::Float16Runs<8>;
#endif
