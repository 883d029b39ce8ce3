// Loops over lists of Python objects that a step makes, each of which would take a tenth of its time in Python.
#pragma once

#include <pybind11/pybind11.h>

namespace prodigy {

// Adds the functions to a module.
void bind_objects(pybind11::module_& module);

}  // namespace prodigy
