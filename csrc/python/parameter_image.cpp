#include "python/parameter_image.h"

namespace prodigy {
namespace py = pybind11;

namespace {

// Which of the keys this is; kStates: none.
int state_of(const py::handle& key, const ParameterImage::Keys& keys) {
  int which = 0;
  while (which < kStates && !(PyUnicode_Check(key.ptr()) && PyUnicode_Compare(key.ptr(), keys[which].ptr()) == 0)) {
    ++which;
  }
  return which;
}

}  // namespace

void ParameterImage::take(const Needs& needs, const Keys& keys, const TensorReader& reader,
                          const py::handle& tensor_class) {
  if (tries_ == kMostTries || !trusted) return;
  ++tries_;
  TensorView view;
  const bool taken = reader.read(param_, view) && param_image_.take(param_, view, tensor_class);
  valid_ = take_states(needs, keys, reader, tensor_class) && taken;
}

bool ParameterImage::take_states(const Needs& needs, const Keys& keys, const TensorReader& reader,
                                 const py::handle& tensor_class) {
  state_keys_ = reinterpret_cast<const PyDictObject*>(state_)->ma_keys;
  Items items;
  bool all_taken = true;
  PyObject *key, *value;
  for (Py_ssize_t position = 0; PyDict_Next(state_, &position, &key, &value);) {
    if (!PyUnicode_CheckExact(key)) return false;  // kept, another object could be part of a cycle
    int which = state_of(key, keys);
    if (which < kStates && !needs[which]) which = kStates;
    items.push_back({py::reinterpret_borrow<py::object>(key), which});
    if (which == kStates) continue;
    TensorView view;
    all_taken &= reader.read(value, view) && state_images_[which].take(value, view, tensor_class);
  }
  items_ = std::make_shared<const Items>(std::move(items));
  return all_taken;
}

bool ParameterImage::shows() const {
  if (!valid_ || !param_image_.shows(param_)) return false;
  Py_ssize_t position = 0;
  PyObject *key, *value;
  for (const Item& item : *items_) {
    if (!PyDict_Next(state_, &position, &key, &value) || key != item.key.ptr()) return false;
    if (item.which < kStates && !state_images_[item.which].shows(value)) return false;
  }
  return !PyDict_Next(state_, &position, &key, &value);
}

void ParameterImage::fetch() const {
  constexpr int kKeyLines = 4;  // of a dictionary with a handful of entries
  fetch_lines(state_, 1);
  fetch_lines(state_keys_, kKeyLines);
  param_image_.fetch();
  if (!items_) return;
  for (const Item& item : *items_) {
    if (item.which < kStates) state_images_[item.which].fetch();
  }
}

}  // namespace prodigy
