// The cache lines that are touched when a parameter and its state are looked at, to be fetched ahead of the look.
//
// A step looks at thousands of small objects (a Python object, its TensorImpl, its StorageImpl, the dictionary of the
// state) which a backward pass has pushed out of the caches, each at the end of a chain of pointers. Fetched ahead,
// they come in parallel: after a backward pass, 5,000 tensors are compared in 0.7 instead of 1.8 ms, and a step over
// 1,000 tensors of 1,000 elements takes 2.4-2.8 instead of 3.6 ms (Zen 5). The addresses are those of the last plan:
// one that is no longer right costs time, never a fault.
#pragma once

#include <pybind11/pybind11.h>

#include <array>

#include "python/state.h"

namespace prodigy {

class Footprint {
 public:
  void add_tensor(const pybind11::handle& tensor);
  void add_dict(const pybind11::handle& dict);

  void fetch() const {
#if defined(__GNUC__)
    for (int n = 0; n < count_; ++n) {
      for (int line = 0; line < ranges_[n].lines; ++line) __builtin_prefetch(ranges_[n].begin + line * kLine);
    }
#endif
  }

 private:
  static constexpr int kLine = 64;  // bytes

  struct Range {
    const char* begin;
    int lines;
  };
  using TensorRanges = std::array<Range, 3>;
  using DictRanges = std::array<Range, 2>;

  template <class Ranges>
  void add(const Ranges& ranges);

  // A parameter, its state, and the dictionary that holds it.
  static constexpr int kRanges = std::tuple_size_v<TensorRanges> * (1 + kStates) + std::tuple_size_v<DictRanges>;

  std::array<Range, kRanges> ranges_;
  int count_ = 0;
};

}  // namespace prodigy
