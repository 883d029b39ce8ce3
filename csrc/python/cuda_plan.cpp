#include "python/cuda_plan.h"

#include "cuda/plan.h"
#include "python/bind_tensors.h"
#include "python/pointer.h"

namespace py = pybind11;

namespace prodigy {
namespace {

class CudaPlan {
 public:
  CudaPlan(const py::list& slots, const py::type& tensor_class, const std::string& state_format)
      : list_(slots, tensor_class, state_format), plan_(list_.table(), list_.type(), list_.state_type()) {}

  TensorList& list() { return list_; }

  py::bytes gradient_words() const {
    const std::vector<Gradient>& grads = list_.gradients();
    return py::bytes(reinterpret_cast<const char*>(grads.data()), grads.size() * sizeof(Gradient));
  }

  std::size_t table_bytes() const { return plan_.table_bytes(); }
  std::size_t chunk_count() const { return plan_.chunk_count(); }
  void write_table(std::uintptr_t to) const { plan_.write_table(pointer<void>(to)); }

  void update(const py::bytes& record, std::uintptr_t table, std::uintptr_t step, std::uintptr_t partials,
              std::uintptr_t arrived, std::uintptr_t sums, std::uintptr_t row, std::uintptr_t stream) {
    plan_.update(Record(record, list_.group_count()), buffers(table, step, partials, arrived, sums, row),
                 pointer<void>(stream));
  }

  void finish(const py::bytes& record, std::uintptr_t table, std::uintptr_t step, std::uintptr_t partials,
              std::uintptr_t arrived, std::uintptr_t sums, std::uintptr_t row, std::uintptr_t stream, bool last) {
    plan_.finish(Record(record, list_.group_count()), buffers(table, step, partials, arrived, sums, row),
                 pointer<void>(stream), last);
  }

 private:
  static cuda::Buffers buffers(std::uintptr_t table, std::uintptr_t step, std::uintptr_t partials,
                               std::uintptr_t arrived, std::uintptr_t sums, std::uintptr_t row) {
    return {pointer<void>(table),       pointer<void>(step),         pointer<Sums<double>>(partials),
            pointer<unsigned>(arrived), pointer<Sums<double>>(sums), pointer<Estimate>(row)};
  }

  TensorList list_;
  cuda::Plan plan_;
};

}  // namespace

void bind_cuda_plan(py::module_& m) {
  bind_tensors<CudaPlan>(m, "CudaPlan",
                         "The tensors of one bucket on a GPU, and the phases of a step over them. Addresses on the "
                         "device are given as integers; no function waits for it, and all hold the GIL.")
      .def("gradient_words", &CudaPlan::gradient_words,
           "The loaded gradients as bytes, 16 each: what the kernels read after the groups in `step`.")
      .def_property_readonly("table_bytes", &CudaPlan::table_bytes, "Size of the table of the tensors and chunks.")
      .def_property_readonly("chunk_count", &CudaPlan::chunk_count, "Length of `partials`, in pairs of float64.")
      .def("write_table", &CudaPlan::write_table, py::arg("to"),
           "Writes the table to host memory at the address `to`, to be uploaded.")
      .def("update", &CudaPlan::update, py::arg("record"), py::kw_only(), py::arg("table"), py::arg("step"),
           py::arg("partials"), py::arg("arrived"), py::arg("sums"), py::arg("row"), py::arg("stream"),
           "Phase 1, launched on `stream`: moves m, v, s and x, and writes this plan's sums to the float64[2] at "
           "`sums`. "
           "`record`: the step's, of prodigy_fused.record, whose groups, and then gradient_words(), are at `step`; "
           "`table`: the bytes of write_table(); `partials`: float64[2 * chunk_count]; `arrived`: an int32, 0; `row`: "
           "the estimate, float64[8]. The caller keeps all of it, the gradients included, alive until the kernels have "
           "run.")
      .def(
          "finish", &CudaPlan::finish, py::arg("record"), py::kw_only(), py::arg("table"), py::arg("step"),
          py::arg("partials"), py::arg("arrived"), py::arg("sums"), py::arg("row"), py::arg("stream"), py::arg("last"),
          "Phases 2 and 3, launched on `stream`: derives the new estimate from `row` and from the sums of all plans at "
          "`sums`, gives x the value that follows, and, if this is the `last` plan, writes the estimate to `row`. The "
          "other arguments are those of `update`.");
}

}  // namespace prodigy
