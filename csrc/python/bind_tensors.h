// The part of the binding that all classes with a TensorList have in common.
#pragma once

#include <pybind11/pybind11.h>

#include <string>

#include "python/tensor_list.h"

namespace prodigy {

inline constexpr const char* kLoadDoc = R"(Keeps the addresses of the gradients until release_gradients().

The caller keeps the tensors themselves alive. Holds the GIL.

Args:
    grads: a list of one tensor, or None, per slot.

Returns:
    -1, or the index of the first gradient that is not laid out as its parameter; then no address is kept.)";

inline constexpr const char* kMendDoc = R"(Takes note of the addresses that the tensors have now. Holds the GIL.

Returns:
    Whether nothing else of a tensor has changed; if not, this object is of no more use.)";

inline constexpr const char* kExtendDoc = R"(Takes up more tensors. Holds the GIL.

Args:
    slots: those that are there, and new ones among them, in the order of all.

Raises:
    ValueError: a tensor does not fit; then nothing has changed.)";

inline constexpr const char* kFirstChunksDoc =
    R"(For each tensor the number of its first chunk, and the number of all.)";

// Holder: a class constructed from the same arguments as a TensorList, which it returns by list(). After a change of
// the list's table it is told so by table_changed().
template <class Holder>
pybind11::class_<Holder> bind_tensors(pybind11::module_& m, const char* name, const char* doc) {
  namespace py = pybind11;
  return py::class_<Holder>(m, name, doc)
      .def(py::init<py::list, py::type, std::string, std::size_t>(), py::arg("slots"), py::arg("tensor_class"),
           py::arg("state_format"), py::arg("estimates"))
      .def(
          "unchanged", [](Holder& holder) { return holder.list().unchanged(); },
          "Returns whether every parameter and state tensor still has its address and layout. Holds the GIL.")
      .def(
          "unchanged_at", [](Holder& holder, std::size_t i) { return holder.list().unchanged_at(i); }, py::arg("i"),
          "Returns whether those of slot i still have theirs. Holds the GIL.")
      .def(
          "mend",
          [](Holder& holder) {
            const bool mended = holder.list().mend();
            if (mended) holder.table_changed();
            return mended;
          },
          kMendDoc)
      .def(
          "extend",
          [](Holder& holder, const py::list& slots) {
            holder.list().extend(slots);
            holder.table_changed();
          },
          py::arg("slots"), kExtendDoc)
      .def(
          "load_gradients", [](Holder& holder, const py::list& grads) { return holder.list().load_gradients(grads); },
          py::arg("grads"), kLoadDoc)
      .def(
          "release_gradients", [](Holder& holder) { holder.list().release_gradients(); },
          "Forgets the gradients' addresses.");
}

}  // namespace prodigy
