#include "python/objects.h"

#include <algorithm>

namespace prodigy {
namespace py = pybind11;

namespace {

py::str interned(const char* text) { return py::reinterpret_steal<py::str>(PyUnicode_InternFromString(text)); }

bool same_objects(const py::list& a, const py::list& b) {
  const auto *first = PySequence_Fast_ITEMS(a.ptr()), *second = PySequence_Fast_ITEMS(b.ptr());
  return a.size() == b.size() && std::equal(first, first + a.size(), second);
}

py::tuple read_gradients(const py::list& params) {
  const py::str name = interned("grad");
  py::list grads(params.size());
  std::size_t missing = 0;
  for (std::size_t i = 0; i < grads.size(); ++i) {
    // Held, and looked for anew: an attribute may be anything, and change the list.
    const py::object param = params[i];
    PyObject* grad = PyObject_GetAttr(param.ptr(), name.ptr());
    if (grad == nullptr) throw py::error_already_set();
    missing += grad == Py_None;
    PyList_SET_ITEM(grads.ptr(), i, grad);
  }
  return py::make_tuple(grads, missing);
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
        "Returns whether two lists hold the very same objects.");
  m.def("read_gradients", &read_gradients, py::arg("params"),
        "Returns the list of the parameters' gradients, and how many of them are None.");
  m.def("count_steps", &count_steps, py::arg("states"),
        "Adds 1 to the entry \"step\" of each dictionary, 0 if there is none.");
}

}  // namespace prodigy
