// The cache lines that are touched when a tensor is looked at, to be fetched ahead of the look.
//
// A step looks at thousands of small objects (a Python object, its TensorImpl, its StorageImpl, the dictionary of the
// state) which a backward pass has pushed out of the caches, each at the end of a chain of pointers. Fetched ahead,
// they come in parallel. The addresses are those of the last plan: one that is no longer right costs time, never a
// fault.
#pragma once

#include <pybind11/pybind11.h>

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
  static constexpr int kLine = 64;

  void add(const void* begin, int lines);

  struct Range {
    const char* begin;
    int lines;
  };
  Range ranges_[2 + 3 * 6];  // a dictionary, a parameter, and its state
  int count_ = 0;
};

}  // namespace prodigy
