#include "python/tensor_list.h"

#include <algorithm>

namespace prodigy {
namespace py = pybind11;

namespace {

enum State { kM, kV, kS, kX0, kDelta };

// Sets `order` if the tensor is not row-major. Raises ValueError if its elements do not fill one run of memory.
MemoryOrder memory_order(const TensorView& view) {
  std::vector<int> dims;
  std::vector<std::int64_t> row_major(view.shape.size());
  std::int64_t expected = 1;
  bool is_row_major = true;
  for (int k = int(view.shape.size()) - 1; k >= 0; --k) {
    row_major[k] = expected;
    if (view.shape[k] == 1) continue;
    is_row_major &= view.strides[k] == expected;
    expected *= view.shape[k];
    dims.push_back(k);
  }
  MemoryOrder order;
  if (is_row_major || view.numel() == 0) return order;

  std::sort(dims.begin(), dims.end(), [&](int a, int b) { return view.strides[a] > view.strides[b]; });
  expected = view.numel();
  for (int k : dims) {
    expected /= view.shape[k];
    if (view.strides[k] != expected || order.dims == kMaxDims) throw py::value_error("unsupported memory layout");
    order.stride[order.dims] = view.strides[k];
    order.row_major_stride[order.dims++] = row_major[k];
  }
  return order;
}

}  // namespace

TensorList::TensorList(const py::list& slots, py::type tensor_class)
    : reader_(std::move(tensor_class)), keys_{"exp_avg", "exp_avg_sq", "s", "p0", "delta"} {
  entries_.resize(slots.size());
  table_.reserve(slots.size());
  for (std::size_t i = 0; i < slots.size(); ++i) table_.push_back(read_slot(slots[i], entries_[i]));
}

Tensor TensorList::read_slot(const py::handle& slot, Entry& entry) {
  entry.param = slot.attr("param");
  entry.state = slot.attr("state");
  const bool readable = reader_.read(entry.param.ptr(), entry.view) && entry.view.device != kOtherDevice;
  const bool first = table_.empty();
  if (!readable || (!first && (entry.view.type != type_ || entry.view.device != device_))) {
    throw py::value_error("unsupported parameter");
  }
  type_ = entry.view.type;
  device_ = entry.view.device;
  Tensor t{};
  t.x = entry.view.data;
  t.type = type_;
  t.index = slot.attr("index").cast<std::uint32_t>();
  const py::object rounding = slot.attr("low_precision");
  const auto is = [&](const char* mode) { return !rounding.is_none() && rounding.equal(py::str(mode)); };
  t.stochastic = is("stochastic");
  entry.displaced = is("displacement");
  t.numel = entry.view.numel();
  t.slice_p = slot.attr("slice_p").cast<std::int64_t>();
  t.group = slot.attr("group").cast<int>();
  t.order = memory_order(entry.view);
  for (int which = 0; which < kStates; ++which) entry.addresses[which] = read_state(entry, t, which);
  t.m = entry.addresses[kM];
  t.v = entry.addresses[kV];
  t.s = entry.addresses[kS];
  t.x0 = entry.addresses[kX0];
  t.delta = static_cast<float*>(entry.addresses[kDelta]);
  t.state_type = state_type_;
  return t;
}

void* TensorList::read_state(const Entry& entry, const Tensor& tensor, int which) {
  if (which == kDelta && !entry.displaced) return nullptr;
  PyObject* object = PyDict_GetItemWithError(entry.state.ptr(), keys_[which].ptr());
  if (object == nullptr && which == kM) return nullptr;  // beta1 is 0
  TensorView& view = scratch_;
  if (object == nullptr || !reader_.read(object, view) || view.device != device_ || !fits_type(view.type, which)) {
    throw py::value_error("unsupported state");
  }
  const bool packed = tensor.slice_p > 1 && (which == kS || which == kX0);
  if (which == kX0 && view.shape.empty() && (packed || !entry.view.shape.empty())) return nullptr;
  const std::int64_t samples = (tensor.numel + tensor.slice_p - 1) / tensor.slice_p;
  const bool fits = packed
                        ? view.shape.size() == 1 && view.shape[0] == samples && (samples <= 1 || view.strides[0] == 1)
                        : view.same_layout(entry.view);
  if (!fits) throw py::value_error("state of another shape");
  return view.data;
}

bool TensorList::fits_type(Type type, int which) {
  if (type == Type::kOther || (type == Type::kFloat64) != (type_ == Type::kFloat64)) return false;
  if (which == kX0) return type == type_;
  if (which == kDelta) return type == Type::kFloat32;
  if (state_type_ == Type::kOther) state_type_ = type;  // the first of all
  return type == state_type_;
}

bool TensorList::unchanged() {
  for (std::size_t i = 0; i < entries_.size(); ++i) {
    const Entry& entry = entries_[i];
    TensorView& now = scratch_;
    const bool same = reader_.read(entry.param.ptr(), now) && now.data == entry.view.data && now.device == device_ &&
                      now.type == type_ && now.same_layout(entry.view);
    if (!same) return false;
    for (int which = 0; which < kStates; ++which) {
      try {
        if (read_state(entry, table_[i], which) != entry.addresses[which]) return false;
      } catch (const py::value_error&) {
        return false;
      }
    }
  }
  return true;
}

long TensorList::read_grads(const py::list& grads, std::vector<Gradient>& addresses) {
  if (grads.size() != entries_.size()) throw py::value_error("one gradient, or None, per tensor");
  addresses.resize(entries_.size());
  for (std::size_t i = 0; i < entries_.size(); ++i) {
    PyObject* grad = PyList_GET_ITEM(grads.ptr(), i);
    addresses[i] = {};
    if (grad == Py_None) continue;
    const bool fits = reader_.read(grad, scratch_) && scratch_.device == device_ &&
                      (scratch_.type == type_ || (is_half(type_) && scratch_.type == Type::kFloat32)) &&
                      scratch_.same_layout(entries_[i].view);
    if (!fits) return long(i);
    addresses[i] = {scratch_.data, scratch_.type};
  }
  return -1;
}

}  // namespace prodigy
