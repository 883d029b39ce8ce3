// Loops over Python objects that a step makes, each of which would take a tenth of its time in Python.
//
// Note [No new lists]
// None of them makes a list of all parameters, nor does the rest of a step. A backward pass leaves thousands of small
// blocks of memory that were freed, and glibc merges them all (malloc_consolidate) when somebody next asks for a
// kilobyte: for 1,000 parameters that took 0.13 to 0.19 ms, more than any of these loops does.
#pragma once

#include <pybind11/pybind11.h>

namespace prodigy {

// Adds the functions to a module.
void bind_objects(pybind11::module_& module);

}  // namespace prodigy
