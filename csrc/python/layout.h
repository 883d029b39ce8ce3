// The names of the words and keys that a module reads, for Python to compare with its own
// (prodigy_fused/backends/native.py).
#pragma once

#include <pybind11/pybind11.h>

#include <iterator>

#include "prodigy/record.h"
#include "prodigy/table.h"
#include "python/state.h"

namespace prodigy {

template <class Names>
pybind11::tuple tuple_of(const Names& names) {
  pybind11::tuple tuple(std::size(names));
  for (std::size_t i = 0; i < std::size(names); ++i) tuple[i] = names[i];
  return tuple;
}

inline void add_layout(pybind11::module_& m) {
  m.attr("ESTIMATE_FIELDS") = tuple_of(kEstimateFields);
  m.attr("STEP_FIELDS") = tuple_of(kStepFields);
  m.attr("GROUP_FIELDS") = tuple_of(kGroupFields);
  m.attr("STATE_KEYS") = tuple_of(kStateKeys);
  m.attr("MAX_DIMS") = kMaxDims;
}

}  // namespace prodigy
