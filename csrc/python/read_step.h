// prodigy_fused.step.Step and what it holds, as plain structs.
#pragma once

#include <pybind11/pybind11.h>

#include "prodigy/rule.h"

namespace prodigy {

Hyper read_hyper(const pybind11::handle& hyper);
Shared read_shared(const pybind11::handle& shared);

template <class T>
T* at(std::uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

}  // namespace prodigy
