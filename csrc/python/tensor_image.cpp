#include "python/tensor_image.h"

#include <algorithm>
#include <array>

namespace prodigy {
namespace py = pybind11;

namespace {

const void* address(const py::handle& integer) { return reinterpret_cast<const void*>(integer.cast<std::uintptr_t>()); }

const void* cdata(const py::handle& object) { return address(py::getattr(object, "_cdata", py::int_(0))); }

}  // namespace

int TensorImage::find(const void* object, int begin, int end, const void* value) {
  for (int i = begin; i < end; ++i) {
    if (word(object, i) == reinterpret_cast<std::uintptr_t>(value)) return i;
  }
  return 0;
}

// The bytes between the members of a TensorImpl are nobody's, and differ by chance: with one tensor alone a bit of them
// was taken for the mark, 58 times in 20,000 (torch 2.14). Hence several, all alive at once.
void TensorImage::find_sign(const py::handle& tensor) {
  std::array<std::array<py::object, 3>, 8> probes;  // a tensor, the negated view of it, and the negated view of that
  for (auto& [plain, negated, again] : probes) {
    plain = tensor.attr("detach")();
    negated = plain.attr("_neg_view")();
    again = negated.attr("_neg_view")();
  }
  for (int i = kBegin; i < kSignEnd && sign_at_ == 0; ++i) {
    const auto mark_of = [&](const std::array<py::object, 3>& probe) {
      const Word before = word(cdata(probe[0]), i), after = word(cdata(probe[1]), i), mark = after & ~before;
      const bool is_one_bit = mark != 0 && (mark & (mark - 1)) == 0 && after == (before | mark);
      return is_one_bit && word(cdata(probe[2]), i) == before ? mark : 0;
    };
    const Word mark = mark_of(probes[0]);
    const auto agrees = [&](const auto& probe) { return mark_of(probe) == mark; };
    if (mark != 0 && std::all_of(probes.begin(), probes.end(), agrees)) sign_at_ = i, sign_ = mark;
  }
}

bool TensorImage::take(const py::handle& tensor, const TensorView& view, const py::handle& tensor_class) {
  const py::object storage = tensor.attr("untyped_storage")();
  object_ = tensor.ptr();
  impl_ = cdata(tensor);
  storage_ = cdata(storage);
  // A class that dispatches to Python may answer as it likes.
  const char* dispatch = "__torch_dispatch__";
  const bool plain = py::type::of(tensor).attr(dispatch).is(tensor_class.attr(dispatch));
  if (!plain || impl_ == nullptr || storage_ == nullptr || view.data == nullptr) return false;

  const auto words = [](std::size_t bytes) { return int(bytes / sizeof(void*)); };
  const auto size = words(reinterpret_cast<const PyTypeObject*>(tensor_class.ptr())->tp_basicsize);
  // Each is looked into only where what refers to it was found, and the places are kept only if all were.
  const int impl_at = find(object_, words(sizeof(PyObject)), size, impl_);
  const int storage_at = impl_at == 0 ? 0 : find(impl_, kBegin, kImplEnd, storage_);
  const int data_at = storage_at == 0 ? 0 : find(storage_, kBegin, kStorageEnd, address(storage.attr("data_ptr")()));
  if (data_at == 0) return false;
  impl_at_ = impl_at, storage_at_ = storage_at, data_at_ = data_at;
  if (sign_at_ == 0) find_sign(tensor);
  data_ = word(storage_, data_at_);
  owner_ = word(storage_, data_at_ + 1);
  digest_ = digest();
  const auto is_inside = [&](const std::int64_t* array) {
    const auto* begin = static_cast<const std::int64_t*>(impl_) + kBegin;
    const auto* end = static_cast<const std::int64_t*>(impl_) + kImplEnd;
    if (begin <= array && array + view.dims <= end) return true;
    return view.dims <= kInlineDims && std::search(begin, end, array, array + view.dims) != end;
  };
  return sizeof(void*) == sizeof(std::int64_t) && is_inside(view.shape) && is_inside(view.strides);
}

}  // namespace prodigy
