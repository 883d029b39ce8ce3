#include "python/cuda_plan.h"

#include <pybind11/stl.h>

#include "cuda/plan.h"
#include "python/bind_tensors.h"
#include "python/pointer.h"

namespace py = pybind11;

namespace prodigy {
namespace {

class CudaPlan {
 public:
  CudaPlan(const py::list& slots, const py::type& tensor_class, const std::string& state_format, std::size_t estimates)
      : list_(slots, tensor_class, state_format, estimates), plan_(list_.table(), estimates) {}

  TensorList& list() { return list_; }
  void table_changed() { plan_ = cuda::Plan(list_.table(), list_.estimates()); }

  py::bytes gradient_words(const py::bytes& former) const { return words_of(list_.gradients(), former); }

  std::size_t table_bytes() const { return plan_.table_bytes(); }
  std::size_t chunk_count() const { return plan_.chunk_count(); }
  const std::vector<std::int64_t>& first_chunks() const { return plan_.first_chunks(); }
  void write_table(std::uintptr_t to) const { plan_.write_table(pointer<void>(to)); }

  void update(const py::bytes& record, std::uintptr_t table, std::uintptr_t step, std::uintptr_t partials,
              std::uintptr_t arrived, std::uintptr_t sums, std::uintptr_t row, std::uintptr_t stream) {
    plan_.update(list_.read_record(record), list_.gradients(), buffers(table, step, partials, arrived, sums, row, 0),
                 pointer<void>(stream));
  }

  bool update_one(std::size_t i, const py::object& grad, const py::bytes& record, std::uintptr_t table,
                  std::uintptr_t step, std::uintptr_t partials, std::uintptr_t arrived, std::uintptr_t sums,
                  std::uintptr_t row, std::uintptr_t stream) {
    Gradient gradient;
    if (!list_.read_one_gradient(i, grad, gradient)) return false;
    plan_.update_one(list_.read_record(record), i, gradient, buffers(table, step, partials, arrived, sums, row, 0),
                     pointer<void>(stream));
    return true;
  }

  void add_up(const py::bytes& record, std::uintptr_t table, std::uintptr_t step, std::uintptr_t partials,
              std::uintptr_t arrived, std::uintptr_t sums, std::uintptr_t row, std::uintptr_t stream) {
    plan_.add_up(list_.read_record(record), buffers(table, step, partials, arrived, sums, row, 0),
                 pointer<void>(stream));
  }

  void finish(const py::bytes& record, std::uintptr_t table, std::uintptr_t step, std::uintptr_t partials,
              std::uintptr_t arrived, std::uintptr_t sums, std::uintptr_t row, std::uintptr_t new_row,
              std::uintptr_t stream, bool last) {
    plan_.finish(list_.read_record(record), list_.gradients(),
                 buffers(table, step, partials, arrived, sums, row, new_row), pointer<void>(stream), last);
  }

 private:
  static cuda::Buffers buffers(std::uintptr_t table, std::uintptr_t step, std::uintptr_t partials,
                               std::uintptr_t arrived, std::uintptr_t sums, std::uintptr_t row,
                               std::uintptr_t new_row) {
    return {pointer<void>(table),       pointer<void>(step),         pointer<Sums<double>>(partials),
            pointer<unsigned>(arrived), pointer<Sums<double>>(sums), pointer<Estimate>(row),
            pointer<Estimate>(new_row)};
  }

  TensorList list_;
  cuda::Plan plan_;
};

constexpr const char* kClassDoc = R"(The tensors of one bucket on a GPU, and the phases of a step over them.

Addresses on the device are given as integers. No method waits for the device; all hold the GIL.)";

constexpr const char* kUpdateDoc = R"(Phase 1, launched on a stream: moves m, v, s and x, and gathers the sums.

The caller keeps everything, the tensors and gradients included, alive until the kernel has run.

Args:
    record: the step's, of prodigy_fused.record.
    table: the bytes of write_table().
    step: the groups of the record, then gradient_words().
    partials: room for float64[chunk_count, 2].
    arrived: an int32, 0.
    sums: float64[estimates, 2], become the sums over this plan's tensors.
    row: the estimates, float64[estimates, 8].
    stream: a CUDA stream.

Raises:
    ValueError: the record does not fit the plan.
    RuntimeError: the launch failed; names the kernel.)";

constexpr const char* kUpdateOneDoc = R"(Phase 1 of tensor i, launched on a stream, without `sums`.

Reads no gradients in `step`. Args, beyond those of update:
    i: the tensor.
    grad: its gradient.

Returns:
    False, and nothing is launched, if the gradient is not laid out as its tensor.)";

constexpr const char* kFinishDoc = R"(Phase 2, launched on a stream: derives the new estimates, and gives x the
value that follows from them.

Args, beyond those of update:
    sums: float64[estimates, 2], the sums over the tensors of all plans.
    new_row: float64[estimates, 8], becomes the new estimates; it may be `row`.
    last: whether this is the last plan of the step, which writes `new_row`.)";

}  // namespace

void bind_cuda_plan(py::module_& m) {
  bind_tensors<CudaPlan>(m, "CudaPlan", kClassDoc)
      .def("gradient_words", &CudaPlan::gradient_words, py::arg("former") = py::bytes(), kGradientWordsDoc)
      .def_property_readonly("table_bytes", &CudaPlan::table_bytes,
                             "The size of the table of the tensors, the chunks and their ranges.")
      .def_property_readonly("chunk_count", &CudaPlan::chunk_count,
                             "The number of chunks, hence of pairs in `partials`.")
      .def_property_readonly("first_chunks", &CudaPlan::first_chunks, kFirstChunksDoc)
      .def("write_table", &CudaPlan::write_table, py::arg("to"),
           "Writes the table to host memory at the address `to`, to be uploaded.")
      .def("update", &CudaPlan::update, py::arg("record"), py::kw_only(), py::arg("table"), py::arg("step"),
           py::arg("partials"), py::arg("arrived"), py::arg("sums"), py::arg("row"), py::arg("stream"), kUpdateDoc)
      .def("update_one", &CudaPlan::update_one, py::arg("i"), py::arg("grad"), py::arg("record"), py::kw_only(),
           py::arg("table"), py::arg("step"), py::arg("partials"), py::arg("arrived"), py::arg("sums"), py::arg("row"),
           py::arg("stream"), kUpdateOneDoc)
      .def("add_up", &CudaPlan::add_up, py::arg("record"), py::kw_only(), py::arg("table"), py::arg("step"),
           py::arg("partials"), py::arg("arrived"), py::arg("sums"), py::arg("row"), py::arg("stream"),
           "Launches the sums of what update_one has updated; the arguments are those of update.")
      .def("finish", &CudaPlan::finish, py::arg("record"), py::kw_only(), py::arg("table"), py::arg("step"),
           py::arg("partials"), py::arg("arrived"), py::arg("sums"), py::arg("row"), py::arg("new_row"),
           py::arg("stream"), py::arg("last"), kFinishDoc);
}

}  // namespace prodigy
