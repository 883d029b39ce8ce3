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

void ParameterImage::take(const py::handle& param, const py::handle& state, const Needs& needs, const Keys& keys,
                          const TensorReader& reader, const py::handle& tensor_class) {
  if (tries_ == kMostTries) return;
  ++tries_;
  TensorView view;
  const bool taken = reader.read(param.ptr(), view) && param_.take(param, view, tensor_class);
  valid_ = take_items(state, needs, keys, reader, tensor_class) && taken && trusted;
}

bool ParameterImage::take_items(const py::handle& state, const Needs& needs, const Keys& keys,
                                const TensorReader& reader, const py::handle& tensor_class) {
  dict_ = state.ptr();
  dict_keys_ = reinterpret_cast<const PyDictObject*>(state.ptr())->ma_keys;
  items_.clear();
  bool all_taken = true;
  PyObject *key, *value;
  for (Py_ssize_t position = 0; PyDict_Next(state.ptr(), &position, &key, &value);) {
    int which = state_of(key, keys);
    if (which < kStates && !needs[which]) which = kStates;
    items_.push_back({py::reinterpret_borrow<py::object>(key), which});
    if (which == kStates) continue;
    TensorView view;
    all_taken &= reader.read(value, view) && states_[which].take(value, view, tensor_class);
  }
  return all_taken;
}

bool ParameterImage::shows(const py::handle& param, const py::handle& state) const {
  if (!valid_ || !param_.shows(param.ptr())) return false;
  Py_ssize_t position = 0;
  PyObject *key, *value;
  for (const Item& item : items_) {
    if (!PyDict_Next(state.ptr(), &position, &key, &value) || key != item.key.ptr()) return false;
    if (item.which < kStates && !states_[item.which].shows(value)) return false;
  }
  return !PyDict_Next(state.ptr(), &position, &key, &value);
}

void ParameterImage::fetch() const {
  constexpr int kKeyLines = 4;  // of a dictionary with a handful of entries
  fetch_lines(dict_, 1);
  fetch_lines(dict_keys_, kKeyLines);
  param_.fetch();
  for (const Item& item : items_) {
    if (item.which < kStates) states_[item.which].fetch();
  }
}

}  // namespace prodigy
