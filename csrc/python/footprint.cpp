#include "python/footprint.h"

#include <cstdint>

namespace prodigy {
namespace py = pybind11;

namespace {

// What is read of a c10::TensorImpl and a c10::StorageImpl lies within their first lines.
constexpr int kTensorImpl = 5, kStorageImpl = 2;
constexpr int kKeys = 4;  // of a dictionary with a handful of entries

const void* cdata(const py::handle& object) {
  return reinterpret_cast<const void*>(py::getattr(object, "_cdata", py::int_(0)).cast<std::uintptr_t>());
}

}  // namespace

void Footprint::add_tensor(const py::handle& tensor) {
  add(tensor.ptr(), 1);
  add(cdata(tensor), kTensorImpl);
  add(cdata(tensor.attr("untyped_storage")()), kStorageImpl);
}

void Footprint::add_dict(const py::handle& dict) {
  add(dict.ptr(), 1);
  add(reinterpret_cast<const PyDictObject*>(dict.ptr())->ma_keys, kKeys);
}

void Footprint::add(const void* begin, int lines) { ranges_[count_++] = {static_cast<const char*>(begin), lines}; }

}  // namespace prodigy
