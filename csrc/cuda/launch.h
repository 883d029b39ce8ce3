// Launches, without a CUDA header: the packer and the Python module are plain C++.
#pragma once

#include <string>

#include "cuda/arguments.h"

namespace prodigy::cuda {

enum class Kernel { kUpdate, kFinish };

// Why the kernels cannot run on the current device (it is too old, or its driver is); empty if they can.
std::string problem();

// As many blocks as the current device holds at a time. bits: of an element, 32 or 64.
int resident_blocks(Kernel kernel, int bits);

// On the current device. Throws std::runtime_error, which names the kernel.
void launch(Kernel kernel, int bits, int blocks, const Arguments& arguments, void* stream);

}  // namespace prodigy::cuda
