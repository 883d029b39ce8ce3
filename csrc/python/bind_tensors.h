// The part of the binding that all classes with a TensorList have in common.
#pragma once

#include <pybind11/pybind11.h>

#include <string>
#include <string_view>
#include <vector>

#include "python/tensor_list.h"

namespace prodigy {

inline constexpr const char* kLoadDoc = R"(Keeps the addresses of the gradients until release_gradients().

The caller keeps the tensors themselves alive. Holds the GIL.

Args:
    grads: a list of one tensor, or None, per slot.
    first: where to begin, after a call that ended there.

Returns:
    -1, or the index of the first gradient that is not laid out as its parameter.)";

inline constexpr const char* kGradientWordsDoc = R"(Returns the loaded gradients as the kernels read them.

Args:
    former: what an earlier call has returned: if it is the same, it is returned again, and no memory is asked for.)";

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

// The bytes of a table; `former` itself if they are equal.
template <class T>
pybind11::bytes words_of(const std::vector<T>& table, const pybind11::bytes& former) {
  const std::string_view words(reinterpret_cast<const char*>(table.data()), table.size() * sizeof(T));
  return std::string_view(former) == words ? former : pybind11::bytes(words);
}

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
          "load_gradients",
          [](Holder& holder, const py::list& grads, std::size_t first) {
            return holder.list().load_gradients(grads, first);
          },
          py::arg("grads"), py::arg("first") = 0, kLoadDoc)
      .def(
          "release_gradients", [](Holder& holder) { holder.list().release_gradients(); },
          "Forgets the gradients' addresses.");
}

}  // namespace prodigy
