#include "python/cuda_plan.h"

#include <pybind11/stl.h>

#include "cuda/plan.h"
#include "python/read_step.h"
#include "python/tensor_list.h"

namespace py = pybind11;

namespace prodigy {
namespace {

using cuda::Scalar;

class CudaPlan {
 public:
  CudaPlan(const py::list& slots, const py::type& tensor_class)
      : list_(slots, tensor_class), plan_(list_.table(), number()) {
    if (list_.type() == Type::kOther) throw py::value_error("unsupported dtype");
  }

  bool unchanged() { return list_.unchanged(); }
  long read_grads(const py::list& grads) { return list_.read_grads(grads, grads_); }

  std::size_t table_bytes() const { return plan_.table_bytes(); }
  std::size_t step_bytes() const { return plan_.step_bytes(); }
  std::size_t chunk_count() const { return plan_.chunk_count(); }
  void write_table(std::uintptr_t to) const { plan_.write_table(at<void>(to)); }
  void write_step(std::uintptr_t to) const { plan_.write_step(at<void>(to)); }

  // lrs: for each group None, or the tensor on the plan's device that takes the place of the number.
  bool pack_step(const py::object& step, const py::list& lrs) {
    std::vector<cuda::Group> groups;
    std::size_t i = 0;
    for (const py::handle& h : step.attr("hypers")) {
      const Hyper hyper = read_hyper(h);
      groups.push_back({hyper, read_scalar("lr", py::object(lrs[i++]), hyper.lr)});
    }
    shared_ = read_shared(step.attr("shared"));
    return plan_.pack_step(groups, grads_);
  }

  // grad_scale, found_inf: a number, or a tensor on the plan's device.
  void update(const py::dict& buffers, const py::object& grad_scale, const py::object& found_inf,
              std::uintptr_t stream) {
    plan_.update(arguments(buffers, grad_scale, found_inf), buffer<void>(buffers, "table"),
                 buffer<void>(buffers, "step"), at<void>(stream));
  }

  void finish(const py::dict& buffers, const py::object& grad_scale, const py::object& found_inf, std::uintptr_t stream,
              bool last) {
    cuda::Arguments a = arguments(buffers, grad_scale, found_inf);
    a.last = last;
    plan_.finish(a, buffer<void>(buffers, "table"), buffer<void>(buffers, "step"), at<void>(stream));
  }

 private:
  cuda::Number number() const {
    if (list_.type() == Type::kFloat64) return cuda::Number::kFloat64;
    const bool plain = list_.type() == Type::kFloat32 && list_.state_type() == Type::kFloat32;
    return plain ? cuda::Number::kFloat32 : cuda::Number::kMixed;
  }

  Scalar read_scalar(const std::string& name, const py::object& value, double number) {
    if (value.is_none()) return {number, nullptr, 0};
    if (py::isinstance<py::float_>(value) || py::isinstance<py::int_>(value)) {
      return {value.cast<double>(), nullptr, 0};
    }
    TensorView view;
    const bool floating = list_.read(value, view) && (view.type == Type::kFloat32 || view.type == Type::kFloat64);
    const bool fits = floating && view.numel() == 1;
    if (!fits) throw py::value_error(name + " must be a number or a float32 or float64 tensor with one element");
    return {0.0, view.data, 8 * size_of(view.type)};
  }

  template <class T>
  static T* buffer(const py::dict& buffers, const char* name) {
    return at<T>(buffers[name].cast<std::uintptr_t>());
  }

  cuda::Arguments arguments(const py::dict& buffers, const py::object& grad_scale, const py::object& found_inf) {
    cuda::Arguments a{};
    a.partials = buffer<Sums<double>>(buffers, "partials");
    a.arrived = buffer<unsigned>(buffers, "arrived");
    a.sums = buffer<Sums<double>>(buffers, "sums");
    a.row = buffer<Estimate>(buffers, "row");
    a.shared = shared_;
    a.grad_scale = read_scalar("grad_scale", grad_scale, 1.0);
    a.found_inf = read_scalar("found_inf", found_inf, 0.0);
    return a;
  }

  TensorList list_;
  cuda::Plan plan_;
  std::vector<Gradient> grads_;
  Shared shared_{};
};

}  // namespace

void bind_cuda_plan(py::module_& m) {
  py::class_<CudaPlan>(m, "CudaPlan", "The tensors of one bucket; addresses on its device are given as integers.")
      .def(py::init<py::list, py::type>(), py::arg("slots"), py::arg("tensor_class"))
      .def("unchanged", &CudaPlan::unchanged, "Whether every parameter and state tensor is where it was.")
      .def("read_grads", &CudaPlan::read_grads, "The index of the first gradient laid out otherwise, or -1.")
      .def_property_readonly("table_bytes", &CudaPlan::table_bytes)
      .def_property_readonly("step_bytes", &CudaPlan::step_bytes)
      .def_property_readonly("chunk_count", &CudaPlan::chunk_count)
      .def("write_table", &CudaPlan::write_table, "Writes the tensors and chunks to host memory, to be uploaded.")
      .def("pack_step", &CudaPlan::pack_step, "Takes up groups and gradients; whether they differ from the last.")
      .def("write_step", &CudaPlan::write_step, "Writes groups and gradients to host memory, to be uploaded.")
      .def("update", &CudaPlan::update)
      .def("finish", &CudaPlan::finish);
}

}  // namespace prodigy
