// prodigy_fused._C: the compiled backends. Knows Python and addresses, not torch.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <variant>

#include "cpu/parallel.h"
#include "cpu/plan.h"
#include "cuda/launch.h"
#include "python/cuda_plan.h"
#include "python/read_step.h"
#include "python/tensor_list.h"

namespace py = pybind11;
using namespace prodigy;

namespace {

// From prodigy_fused.step.Step.
cpu::StepInput read_step(const py::handle& step, int threads) {
  cpu::StepInput input;
  for (const py::handle& h : step.attr("hypers")) input.hypers.push_back(read_hyper(h));
  input.shared = read_shared(step.attr("shared"));
  input.grad_scale = step.attr("grad_scale").cast<double>();
  input.threads = threads;
  return input;
}

class CpuPlan {
 public:
  CpuPlan(const py::list& slots, const py::type& tensor_class) : list_(slots, tensor_class) {
    if (list_.device() != kCpu) throw py::value_error("the tensors are not on the CPU");
    if (list_.type() == Type::kOther) throw py::value_error("unsupported dtype");
    if (list_.type() == Type::kFloat64) {
      plan_.emplace<cpu::Plan<double>>(list_.table());
    } else {
      plan_.emplace<cpu::Plan<float>>(list_.table());
    }
  }

  bool unchanged() { return list_.unchanged(); }

  long read_grads(const py::list& grads) { return list_.read_grads(grads, grads_); }

  void update(const py::object& step, int threads, std::uintptr_t row, std::uintptr_t sums) {
    const auto input = read_step(step, threads);
    py::gil_scoped_release release;
    std::visit(
        [&](auto& plan) {
          for (std::size_t i = 0; i < grads_.size(); ++i) plan.set_grad(i, grads_[i]);
          *at<Sums<double>>(sums) = plan.update(input, *at<Estimate>(row));
        },
        plan_);
  }

  void finish(const py::object& step, int threads, std::uintptr_t row, std::uintptr_t sums, bool last) {
    const auto input = read_step(step, threads);
    py::gil_scoped_release release;
    std::visit(
        [&](auto& plan) {
          const Estimate estimate = plan.finish(input, *at<Estimate>(row), *at<Sums<double>>(sums));
          if (last) *at<Estimate>(row) = estimate;
        },
        plan_);
  }

 private:
  TensorList list_;
  std::vector<Gradient> grads_;
  std::variant<cpu::Plan<float>, cpu::Plan<double>> plan_{cpu::Plan<float>({})};
};

// The addresses of a plan whose kernels are not in this module (triton_kernels/).
class AddressList {
 public:
  AddressList(const py::list& slots, const py::type& tensor_class) : list_(slots, tensor_class) {}

  bool unchanged() { return list_.unchanged(); }

  long read_grads(const py::list& grads) { return list_.read_grads(grads, grads_); }

  py::bytes addresses() const {
    std::vector<std::int64_t> words;
    for (const Gradient& grad : grads_) {
      words.push_back(std::int64_t(reinterpret_cast<std::uintptr_t>(grad.at)));
      words.push_back(grad.at == nullptr ? 0 : 8 * size_of(grad.type));
    }
    return py::bytes(reinterpret_cast<const char*>(words.data()), words.size() * sizeof(std::int64_t));
  }

 private:
  TensorList list_;
  std::vector<Gradient> grads_;
};

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled backends of prodigy_fused; see prodigy_fused/backends for their use.";
  m.attr("ESTIMATE_FIELDS") = sizeof(Estimate) / sizeof(double);
  m.attr("MAX_DIMS") = kMaxDims;
  m.def("threading", &cpu::threading, "Whose threads the CPU backend uses.");
  m.def("instruction_set", &cpu::instruction_set, "The instruction set that calls are dispatched to.");
  py::class_<CpuPlan>(m, "CpuPlan", "The tensors of one bucket; addresses of float64 rows are given as integers.")
      .def(py::init<py::list, py::type>(), py::arg("slots"), py::arg("tensor_class"))
      .def("unchanged", &CpuPlan::unchanged, "Whether every parameter and state tensor is where it was.")
      .def("read_grads", &CpuPlan::read_grads, "The index of the first gradient laid out otherwise, or -1.")
      .def("update", &CpuPlan::update)
      .def("finish", &CpuPlan::finish);
  py::class_<AddressList>(m, "TensorList", "The tensors of one bucket, as prodigy_fused.backends.addresses has them.")
      .def(py::init<py::list, py::type>(), py::arg("slots"), py::arg("tensor_class"))
      .def("unchanged", &AddressList::unchanged, "Whether every parameter and state tensor is where it was.")
      .def("read_grads", &AddressList::read_grads, "The index of the first gradient laid out otherwise, or -1.")
      .def("addresses", &AddressList::addresses, "The gradients' addresses and bits, 8 bytes each, 0 for None.");
#ifdef PRODIGY_FUSED_CUDA
  m.attr("CUDA") = PRODIGY_FUSED_CUDA;
  m.def("cuda_problem", &cuda::problem, "Why the kernels cannot run on the current CUDA device; empty if they can.");
  bind_cuda_plan(m);
#else
  m.attr("CUDA") = py::none();
#endif
}
