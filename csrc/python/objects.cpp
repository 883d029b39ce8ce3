#include "python/objects.h"

#include <algorithm>

namespace prodigy {
namespace py = pybind11;

namespace {

py::str interned(const char* text) { return py::reinterpret_steal<py::str>(PyUnicode_InternFromString(text)); }

bool same_objects(const py::object& a, const py::list& b) {
  const auto items = py::reinterpret_steal<py::object>(PySequence_Fast(a.ptr(), "not a sequence"));
  if (!items) throw py::error_already_set();
  const auto size = std::size_t(PySequence_Fast_GET_SIZE(items.ptr()));
  const auto *first = PySequence_Fast_ITEMS(items.ptr()), *second = PySequence_Fast_ITEMS(b.ptr());
  return size == b.size() && std::equal(first, first + size, second);
}

bool same_entries(const py::dict& dict, const py::list& keys, const py::list& values) {
  const std::size_t size = dict.size();
  if (size != keys.size() || size != values.size()) return false;
  Py_ssize_t position = 0;
  PyObject *key, *value;
  for (std::size_t i = 0; PyDict_Next(dict.ptr(), &position, &key, &value); ++i) {
    if (PyList_GET_ITEM(keys.ptr(), i) != key || PyList_GET_ITEM(values.ptr(), i) != value) return false;
  }
  return true;
}

std::size_t read_gradients(const py::list& params, const py::list& grads) {
  const py::str name = interned("grad");
  std::size_t missing = 0;
  for (std::size_t i = 0; i < params.size(); ++i) {
    // Held, and looked for anew: an attribute may be anything, and change the list.
    const py::object param = params[i];
    PyObject* grad = PyObject_GetAttr(param.ptr(), name.ptr());
    if (grad == nullptr) throw py::error_already_set();
    missing += grad == Py_None;
    if (PyList_SetItem(grads.ptr(), Py_ssize_t(i), grad) != 0) throw py::error_already_set();
  }
  return missing;
}

py::list with_gradients(const py::list& params, const py::list& indices) {
  const py::str name = interned("grad");
  py::list found;
  for (std::size_t i = 0; i < indices.size(); ++i) {
    const py::object index = indices[i];
    const auto param = py::reinterpret_steal<py::object>(PyObject_GetItem(params.ptr(), index.ptr()));
    if (!param) throw py::error_already_set();
    if (!param.attr(name).is_none()) found.append(index);
  }
  return found;
}

void clear(const py::list& list) {
  for (Py_ssize_t i = 0; i < PyList_GET_SIZE(list.ptr()); ++i) {
    Py_INCREF(Py_None);
    PyList_SetItem(list.ptr(), i, Py_None);
  }
}

void count_steps(const py::list& states) {
  const py::str name = interned("step");
  const py::int_ zero(0), one(1);
  py::object last, next;  // most parameters have taken as many steps as the one before
  for (const py::handle state : states) {
    PyObject* steps = PyDict_GetItemWithError(state.ptr(), name.ptr());
    if (steps == nullptr && PyErr_Occurred()) throw py::error_already_set();
    if (steps == nullptr) steps = zero.ptr();  // it was taken away
    if (last.ptr() != steps || !PyLong_CheckExact(steps)) {
      last = py::reinterpret_borrow<py::object>(steps);
      next = py::reinterpret_steal<py::object>(PyNumber_InPlaceAdd(steps, one.ptr()));
      if (!next) throw py::error_already_set();
    }
    if (PyDict_SetItem(state.ptr(), name.ptr(), next.ptr()) != 0) throw py::error_already_set();
  }
}

}  // namespace

void bind_objects(py::module_& m) {
  m.def("same_objects", &same_objects, py::arg("a"), py::arg("b"),
        "Returns whether a sequence and a list hold the very same objects.");
  m.def("same_entries", &same_entries, py::arg("dict"), py::arg("keys"), py::arg("values"),
        "Returns whether a dictionary's keys and values are, in its order, the very objects of two lists.");
  m.def("read_gradients", &read_gradients, py::arg("params"), py::arg("grads"),
        "Puts the parameters' gradients into a list of the same length; returns how many of them are None.");
  m.def("with_gradients", &with_gradients, py::arg("params"), py::arg("indices"),
        "Returns those of the indices whose parameters have a gradient.");
  m.def("clear", &clear, py::arg("list"), "Replaces all objects of a list by None.");
  m.def("count_steps", &count_steps, py::arg("states"),
        "Adds 1 to the entry \"step\" of each dictionary, 0 if there is none.");
}

}  // namespace prodigy
