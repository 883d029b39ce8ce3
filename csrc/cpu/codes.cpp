#include "cpu/code_runs.h"

template struct prodigy::cpu::CodeRuns<prodigy::cpu::kBaselineLanes>;
