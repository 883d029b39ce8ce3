// Reads a torch.Tensor's address, shape, strides, dtype and device without knowing torch: by the DLPack C exchange API
// of its class where torch has one (2.10 and later), else by calling its Python methods.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <string_view>
#include <vector>

#include "prodigy/type.h"

namespace prodigy {

// The type of a dtype's name without "torch."; kOther if it is none of them.
Type type_named(std::string_view name);

constexpr int kCpu = -1, kOtherDevice = -2;

// A copy of the shape and strides of a tensor.
struct Layout {
  std::vector<std::int64_t> shape, strides;
};

struct TensorView {
  void* data;
  Type type;
  int device;  // a CUDA device's number, kCpu or kOtherDevice
  int dims;
  const std::int64_t *shape, *strides;  // the tensor's own, or the reader's, valid until it reads again

  // Whether the element at memory position i is the same element in both; strides of size-1 dimensions mean nothing.
  bool has(const Layout& layout) const;
  Layout layout() const { return {{shape, shape + dims}, {strides, strides + dims}}; }
  std::int64_t numel() const;
};

class TensorReader {
 public:
  explicit TensorReader(pybind11::type tensor_class);

  bool is_tensor(PyObject* object) const {
    return PyObject_TypeCheck(object, reinterpret_cast<PyTypeObject*>(tensor_class_.ptr()));
  }

  // Returns false, with no Python error set, if `object` is not a tensor with plain strided memory.
  bool read(PyObject* object, TensorView& view) const;

 private:
  struct ExchangeApi;

  bool read_exchanged(PyObject* object, TensorView& view) const;
  bool read_methods(PyObject* object, TensorView& view) const;

  pybind11::type tensor_class_;
  const ExchangeApi* api_ = nullptr;
  mutable Layout scratch_;  // of the tensor that read_methods has read
};

}  // namespace prodigy
