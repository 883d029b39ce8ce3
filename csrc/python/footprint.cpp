#include "python/footprint.h"

#include <cstdint>

namespace prodigy {
namespace py = pybind11;

namespace {

// In cache lines: a look at a c10::TensorImpl or a c10::StorageImpl reads the first ones of each.
constexpr int kTensorImpl = 5, kStorageImpl = 2;
constexpr int kKeys = 4;  // of a dictionary with a handful of entries

const char* bytes_at(const void* address) { return static_cast<const char*>(address); }

const char* cdata(const py::handle& object) {
  return reinterpret_cast<const char*>(py::getattr(object, "_cdata", py::int_(0)).cast<std::uintptr_t>());
}

}  // namespace

void Footprint::add_tensor(const py::handle& tensor) {
  add(TensorRanges{{{bytes_at(tensor.ptr()), 1},
                    {cdata(tensor), kTensorImpl},
                    {cdata(tensor.attr("untyped_storage")()), kStorageImpl}}});
}

void Footprint::add_dict(const py::handle& dict) {
  const void* keys = reinterpret_cast<const PyDictObject*>(dict.ptr())->ma_keys;
  add(DictRanges{{{bytes_at(dict.ptr()), 1}, {bytes_at(keys), kKeys}}});
}

template <class Ranges>
void Footprint::add(const Ranges& ranges) {
  for (const Range& range : ranges) {
    if (count_ < kRanges) ranges_[count_++] = range;  // one that is missing costs time, too
  }
}

}  // namespace prodigy
