// Launches, without a CUDA header: the packer and the Python module are plain C++.
#pragma once

#include <string>

#include "cuda/arguments.h"

namespace prodigy::cuda {

enum class Kernel { kUpdate, kFinish };

// What the tensors are stored in: all in float32, all in float64, or else the arithmetic is float32.
enum class Number { kFloat32, kFloat64, kMixed };

// Why the kernels cannot run on the current device (it is too old, or its driver is); empty if they can.
std::string problem();

// As many blocks as the current device holds at a time.
int resident_blocks(Kernel kernel, Number number);

// On the current device. Throws std::runtime_error, which names the kernel.
void launch(Kernel kernel, Number number, int blocks, const Arguments& arguments, void* stream);

}  // namespace prodigy::cuda
