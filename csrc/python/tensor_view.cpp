#include "python/tensor_view.h"

#include <pybind11/stl.h>

#include <algorithm>
#include <functional>
#include <numeric>
#include <string>

namespace prodigy {
namespace py = pybind11;

// The part of DLPack's ABI, version 1, that is needed here (dlpack.h of the DLPack project).
struct DLTensor {
  void* data;
  std::int32_t device_type, device_id;
  std::int32_t ndim;
  std::uint8_t type_code, type_bits;
  std::uint16_t type_lanes;
  std::int64_t *shape, *strides;
  std::uint64_t byte_offset;
};

namespace {

constexpr int kDLCPU = 1, kDLCUDA = 2;
constexpr int kDLInt = 0, kDLUInt = 1, kDLFloat = 2, kDLBfloat = 4;
constexpr std::uint32_t kMajor = 1;
constexpr std::string_view kTorch = "torch.";  // the beginning of a dtype's name

Type type_of(int code, int bits) {
  if (code == kDLBfloat) return bits == 16 ? Type::kBFloat16 : Type::kOther;
  if (code == kDLInt) return bits == 8 ? Type::kInt8 : Type::kOther;
  if (code == kDLUInt) return bits == 8 ? Type::kUInt8 : Type::kOther;
  if (code != kDLFloat) return Type::kOther;
  return bits == 16 ? Type::kFloat16 : bits == 32 ? Type::kFloat32 : bits == 64 ? Type::kFloat64 : Type::kOther;
}

}  // namespace

Type type_named(std::string_view name) {
  if (name == "bfloat16") return Type::kBFloat16;
  if (name == "float16") return Type::kFloat16;
  if (name == "int8") return Type::kInt8;
  if (name == "uint8" || name == "8bit") return Type::kUInt8;
  return name == "float32" ? Type::kFloat32 : name == "float64" ? Type::kFloat64 : Type::kOther;
}

struct TensorReader::ExchangeApi {
  std::uint32_t major, minor;
  void* previous;
  void* unused[3];  // allocator, from_py_object, to_py_object
  int (*view)(void* object, DLTensor* out);
  void* current_work_stream;
};

bool TensorView::has(const Layout& layout) const {
  if (std::size_t(dims) != layout.shape.size()) return false;
  for (int i = 0; i < dims; ++i) {
    if (shape[i] != layout.shape[i] || (shape[i] > 1 && strides[i] != layout.strides[i])) return false;
  }
  return true;
}

std::int64_t TensorView::numel() const {
  return std::accumulate(shape, shape + dims, std::int64_t(1), std::multiplies<std::int64_t>());
}

TensorReader::TensorReader(py::type tensor_class) : tensor_class_(std::move(tensor_class)) {
  if (!py::hasattr(tensor_class_, "__dlpack_c_exchange_api__")) return;
  const py::object capsule = tensor_class_.attr("__dlpack_c_exchange_api__");
  const auto* api = static_cast<const ExchangeApi*>(PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
  if (api == nullptr) throw py::error_already_set();
  if (api->major == kMajor && api->view != nullptr) api_ = api;
}

bool TensorReader::read(PyObject* object, TensorView& view) const {
  if (!is_tensor(object)) return false;
  return api_ ? read_exchanged(object, view) : read_methods(object, view);
}

bool TensorReader::read_exchanged(PyObject* object, TensorView& view) const {
  DLTensor t;
  if (api_->view(object, &t) != 0) {
    PyErr_Clear();  // sparse, meta, ...: the caller lets Python build the error message
    return false;
  }
  view.data = static_cast<char*>(t.data) + t.byte_offset;
  view.type = t.type_lanes == 1 ? type_of(t.type_code, t.type_bits) : Type::kOther;
  view.device = t.device_type == kDLCPU ? kCpu : t.device_type == kDLCUDA ? t.device_id : kOtherDevice;
  view.dims = t.ndim;
  view.shape = t.shape;
  view.strides = t.strides;
  return t.data != nullptr || view.numel() == 0;  // null: freed, or a wrapper around other tensors
}

bool TensorReader::read_methods(PyObject* object, TensorView& view) const {
  try {
    const auto t = py::reinterpret_borrow<py::object>(object);
    view.data = reinterpret_cast<void*>(t.attr("data_ptr")().cast<std::uintptr_t>());
    const auto dtype = py::str(t.attr("dtype")).cast<std::string>();
    view.type = type_named(std::string_view(dtype).substr(std::min(dtype.size(), kTorch.size())));
    const bool is_cpu = t.attr("is_cpu").cast<bool>(), is_cuda = t.attr("is_cuda").cast<bool>();
    view.device = is_cpu ? kCpu : is_cuda ? t.attr("get_device")().cast<int>() : kOtherDevice;
    scratch_.shape = t.attr("shape").cast<std::vector<std::int64_t>>();
    scratch_.strides = t.attr("stride")().cast<std::vector<std::int64_t>>();
    view.dims = int(scratch_.shape.size());
    view.shape = scratch_.shape.data();
    view.strides = scratch_.strides.data();
    return view.data != nullptr || view.numel() == 0;
  } catch (const py::error_already_set&) {
    return false;
  }
}

}  // namespace prodigy
