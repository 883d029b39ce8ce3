// Launches, without a CUDA header: the packer and the Python module are plain C++.
#pragma once

#include <string>

#include "cuda/arguments.h"

namespace prodigy::cuda {

enum class Kernel { kUpdate, kFinish };

// policy: an index into UpdatePolicies or FinishPolicies (policy.h).
struct Variant {
  Kernel kernel;
  int policy;
};

// Why the kernels cannot run on the current device (it is too old, or its driver is); empty if they can.
std::string problem();

// The number of blocks that the current device holds at a time.
int resident_blocks(Variant variant);

// On the current device. Throws std::runtime_error, which names the kernel.
void launch(Variant variant, std::int64_t blocks, const Arguments& arguments, void* stream);

}  // namespace prodigy::cuda
