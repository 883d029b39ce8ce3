#include "python/tensor_image.h"

#include <algorithm>

namespace prodigy {
namespace py = pybind11;

namespace {

std::uintptr_t cdata(const py::handle& object) {
  return py::getattr(object, "_cdata", py::int_(0)).cast<std::uintptr_t>();
}

template <class Words>
bool contains(const Words& words, std::uintptr_t value) {
  return std::find(words.begin(), words.end(), value) != words.end();
}

}  // namespace

int TensorImage::find(const void* object, std::size_t begin, std::size_t end, Word value) {
  for (auto i = begin; i < end; ++i) {
    if (word(object, int(i)) == value) return int(i);
  }
  return 0;
}

bool TensorImage::take(const py::handle& tensor, const TensorView& view, const py::handle& tensor_class) {
  const py::object storage = tensor.attr("untyped_storage")();
  object_ = tensor.ptr();
  type_ = Py_TYPE(tensor.ptr());
  impl_ = reinterpret_cast<const void*>(cdata(tensor));
  storage_ = reinterpret_cast<const void*>(cdata(storage));
  // A class that dispatches to Python may answer as it likes.
  const char* dispatch = "__torch_dispatch__";
  const bool plain = py::type::of(tensor).attr(dispatch).is(tensor_class.attr(dispatch));
  if (!plain || impl_ == nullptr || storage_ == nullptr || view.data == nullptr) return false;

  impl_at_ = find(object_, sizeof(PyObject) / sizeof(Word),
                  reinterpret_cast<const PyTypeObject*>(tensor_class.ptr())->tp_basicsize / sizeof(Word), Word(impl_));
  storage_at_ = find(impl_, kSkipped, kSkipped + impl_words_.size(), Word(storage_));
  if (impl_at_ == 0 || storage_at_ == 0) return false;
  copy(impl_, impl_words_);
  copy(storage_, storage_words_);
  const auto inside = [&](const std::int64_t* array) {
    const auto offset = Word(array) - Word(begin(impl_, impl_words_));
    return offset + view.dims * sizeof(*array) <= sizeof(impl_words_) && offset <= sizeof(impl_words_);
  };
  return inside(view.shape) && inside(view.strides) &&
         contains(storage_words_, storage.attr("data_ptr")().cast<Word>());
}

}  // namespace prodigy
