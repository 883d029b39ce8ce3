// Launches, without a CUDA header: the packer and the Python module are plain C++.
#pragma once

#include <string>

#include "cuda/arguments.h"

namespace prodigy::cuda {

enum class Kernel { kUpdate, kFinish };

// A combination of the types that tensors are stored in: all float32; all float64; or any others, with arithmetic in
// float32.
enum class Storage { kFloat32, kFloat64, kMixed };

// Why the kernels cannot run on the current device (it is too old, or its driver is); empty if they can.
std::string problem();

// The number of blocks that the current device holds at a time.
int resident_blocks(Kernel kernel, Storage storage);

// On the current device. Throws std::runtime_error, which names the kernel.
void launch(Kernel kernel, Storage storage, int blocks, const Arguments& arguments, void* stream);

}  // namespace prodigy::cuda
