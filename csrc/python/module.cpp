// prodigy_fused._C: the compiled backends. Knows Python and addresses, not torch.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "cpu/parallel.h"
#include "cpu/plan.h"
#include "cpu/vector.h"
#include "cuda/launch.h"
#include "python/bind_tensors.h"
#include "python/cuda_plan.h"
#include "python/layout.h"
#include "python/objects.h"
#include "python/pointer.h"

namespace py = pybind11;
using namespace prodigy;

namespace {

class CpuPlan {
 public:
  CpuPlan(const py::list& slots, const py::type& tensor_class, const std::string& state_format, std::size_t estimates)
      : list_(slots, tensor_class, state_format, estimates) {
    table_changed();
    if (list_.device() != kCpu) throw py::value_error("the tensors are not on the CPU");
  }

  TensorList& list() { return list_; }
  void table_changed() { plan_ = cpu::make_plan(list_.table(), list_.type(), list_.estimates()); }

  std::size_t chunk_count() const { return plan_->chunks().chunks.size(); }
  const std::vector<std::int64_t>& first_chunks() const { return plan_->chunks().firsts; }

  void update(const py::bytes& record, int threads, std::uintptr_t row, std::uintptr_t partials) {
    const Record numbers = list_.read_record(record);
    const cpu::StepInput input{numbers, list_.gradients(), threads};
    py::gil_scoped_release release;
    plan_->update(input, pointer<Estimate>(row), pointer<Sums<double>>(partials));
  }

  bool update_one(std::size_t i, const py::object& grad, const py::bytes& record, int threads, std::uintptr_t row,
                  std::uintptr_t partials) {
    const Record numbers = list_.read_record(record);
    Gradient gradient;
    if (!list_.read_one_gradient(i, grad, gradient)) return false;
    py::gil_scoped_release release;
    plan_->update_one(numbers, threads, i, gradient, pointer<Estimate>(row), pointer<Sums<double>>(partials));
    return true;
  }

  void add_up(std::uintptr_t partials, std::uintptr_t sums) const {
    plan_->add_up(pointer<Sums<double>>(partials), pointer<Sums<double>>(sums));
  }

  void finish(const py::bytes& record, int threads, std::uintptr_t row, std::uintptr_t new_row, std::uintptr_t sums,
              bool last) {
    const Record numbers = list_.read_record(record);
    const cpu::StepInput input{numbers, list_.gradients(), threads};
    py::gil_scoped_release release;
    plan_->finish(input, pointer<Estimate>(row), pointer<Estimate>(new_row), pointer<Sums<double>>(sums), last);
  }

 private:
  TensorList list_;
  std::unique_ptr<cpu::Plan> plan_;
};

// The addresses of a plan whose kernels are not in this module (triton_kernels/).
class AddressList {
 public:
  AddressList(const py::list& slots, const py::type& tensor_class, const std::string& state_format,
              std::size_t estimates)
      : list_(slots, tensor_class, state_format, estimates) {}

  TensorList& list() { return list_; }
  void table_changed() {}

  bool fits(std::size_t i, const py::object& grad) const {
    Gradient gradient;
    return list_.read_one_gradient(i, grad, gradient);
  }

  // For each gradient, its address and its bits per element, 8 bytes each; zeros for None.
  py::bytes gradient_words(const py::bytes& former) {
    words_.clear();
    for (const Gradient& grad : list_.gradients()) {
      words_.push_back(reinterpret_cast<std::uintptr_t>(grad.data));
      words_.push_back(grad.data == nullptr ? 0 : 8 * size_of(grad.type));
    }
    return words_of(words_, former);
  }

 private:
  TensorList list_;
  std::vector<std::uint64_t> words_;  // kept for its memory
};

// For Python to find out whether images are right with this torch, see Note [Images].
bool image_shows(const py::object& tensor, const py::type& tensor_class, const py::function& change) {
  TensorView view;
  TensorImage image;
  const TensorReader reader(tensor_class);
  const bool taken = reader.read(tensor.ptr(), view) && image.take(tensor, view, tensor_class);
  change(tensor);
  return taken && image.shows(tensor.ptr());
}

constexpr const char* kImageShowsDoc = R"(Returns whether a tensor looks unchanged in memory after change(tensor).

False, too, if no image can be taken of it.)";

constexpr const char* kUpdateDoc = R"(Phase 1: moves m, v, s and x, and gathers the sums of each chunk.

Releases the GIL: the caller keeps all tensors, the gradients included, alive until it returns.

Args:
    record: the step's, of prodigy_fused.record.
    threads: the most that are used.
    row: the address of the estimates, float64[estimates, 8].
    partials: the address of float64[chunk_count, 2], which become the chunks' sums.

Raises:
    ValueError: the record does not fit the plan.
    RuntimeError: no gradients are loaded.)";

constexpr const char* kUpdateOneDoc = R"(Phase 1 of one tensor, whose partials alone are written.

Returns:
    False, and nothing is done, if its gradient is not laid out as it is.)";

constexpr const char* kFinishDoc =
    R"(Phase 2: derives the new estimates, and gives x the value that follows from them.

Releases the GIL, as update does.

Args, beyond those of update:
    new_row: the address to which the new estimates are written; it may be that of `row`.
    sums: the address of the sums over the tensors of all plans.
    last: whether this is the last plan of the step, which writes `new_row`.)";

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled backends of prodigy_fused; see prodigy_fused/backends for their use.";
  add_layout(m);
  m.def("threading", &cpu::threading, "Returns whose threads the CPU backend uses: \"OpenMP\" or \"std::thread\".");
  m.def("instruction_set", &cpu::instruction_set_name,
        "Returns the instruction set that the CPU backend uses: the best that this machine has.");
  m.def("use_instruction_set", &cpu::use_instruction_set, py::arg("name"),
        "Chooses another instruction set, for tests. Returns False if this machine does not have it.");
  bind_objects(m);
  m.def("image_shows", &image_shows, py::arg("tensor"), py::arg("tensor_class"), py::arg("change"), kImageShowsDoc);
  m.def(
      "trust_images", [](bool trusted) { ParameterImage::trusted = trusted; }, py::arg("trusted"),
      "Says whether a step may compare the images of tensors instead of asking torch.");
  bind_tensors<CpuPlan>(m, "CpuPlan", "The tensors of one bucket on the CPU, and the phases of a step over them.")
      .def("update", &CpuPlan::update, py::arg("record"), py::arg("threads"), py::arg("row"), py::arg("partials"),
           kUpdateDoc)
      .def("update_one", &CpuPlan::update_one, py::arg("i"), py::arg("grad"), py::arg("record"), py::arg("threads"),
           py::arg("row"), py::arg("partials"), kUpdateOneDoc)
      .def("add_up", &CpuPlan::add_up, py::arg("partials"), py::arg("sums"),
           "Adds up the chunks' sums: `sums` is the address of float64[estimates, 2].")
      .def_property_readonly("chunk_count", &CpuPlan::chunk_count, "The number of chunks.")
      .def_property_readonly("first_chunks", &CpuPlan::first_chunks, kFirstChunksDoc)
      .def("finish", &CpuPlan::finish, py::arg("record"), py::arg("threads"), py::arg("row"), py::arg("new_row"),
           py::arg("sums"), py::arg("last"), kFinishDoc);
  bind_tensors<AddressList>(m, "TensorList",
                            "The tensors of one bucket, as prodigy_fused.backends.tensor_list has them.")
      .def("fits", &AddressList::fits, py::arg("i"), py::arg("grad"),
           "Returns whether a gradient is laid out as tensor i.")
      .def("gradient_words", &AddressList::gradient_words, py::arg("former") = py::bytes(), kGradientWordsDoc);
#ifdef PRODIGY_FUSED_CUDA
  m.attr("CUDA") = PRODIGY_FUSED_CUDA;
  m.def("cuda_problem", &cuda::problem,
        "Returns why the kernels cannot run on the current CUDA device; empty if they can.");
  bind_cuda_plan(m);
#else
  m.attr("CUDA") = py::none();
#endif
}
