// The part of the binding that all classes with a TensorList have in common.
#pragma once

#include <pybind11/pybind11.h>

#include <string>

#include "python/tensor_list.h"

namespace prodigy {

// Holder: made of the same arguments as a TensorList, which it returns by list().
template <class Holder>
pybind11::class_<Holder> bind_tensors(pybind11::module_& m, const char* name, const char* doc) {
  namespace py = pybind11;
  return py::class_<Holder>(m, name, doc)
      .def(py::init<py::list, py::type, std::string>(), py::arg("slots"), py::arg("tensor_class"),
           py::arg("state_format"))
      .def(
          "unchanged", [](Holder& holder) { return holder.list().unchanged(); },
          "Whether every parameter and state tensor is at the address, and of the layout, that it had. Holds the GIL.")
      .def(
          "load_gradients", [](Holder& holder, const py::list& grads) { return holder.list().load_gradients(grads); },
          py::arg("grads"),
          "Keeps the addresses of the gradients (a list of one tensor or None per slot) until release_gradients(). "
          "Returns -1, or the index of the first gradient that is not laid out as its parameter; then none is kept. "
          "The "
          "caller keeps the tensors alive until the step that reads them is done. Holds the GIL.")
      .def(
          "release_gradients", [](Holder& holder) { holder.list().release_gradients(); },
          "Forgets the gradients' addresses.");
}

}  // namespace prodigy
