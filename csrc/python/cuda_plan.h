#pragma once

#include <pybind11/pybind11.h>

namespace prodigy {

// Adds the class CudaPlan to a module.
void bind_cuda_plan(pybind11::module_& module);

}  // namespace prodigy
