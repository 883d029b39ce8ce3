#include "python/tensor_list.h"

#include <algorithm>
#include <numeric>
#include <stdexcept>
#include <string>

namespace prodigy {
namespace py = pybind11;

namespace {

enum State { kM, kV, kS, kX0 };

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
    : reader_(std::move(tensor_class)), keys_{"exp_avg", "exp_avg_sq", "s", "p0"} {
  entries_.resize(slots.size());
  table_.reserve(slots.size());
  for (std::size_t i = 0; i < slots.size(); ++i) table_.push_back(read_slot(slots[i], entries_[i]));
}

Tensor TensorList::read_slot(const py::handle& slot, Entry& entry) {
  entry.param = slot.attr("param");
  entry.state = slot.attr("state");
  const bool readable = reader_.read(entry.param.ptr(), entry.view) && entry.view.device != kOtherDevice;
  const bool first = table_.empty();
  if (!readable || (!first && (entry.view.bits != bits_ || entry.view.device != device_))) {
    throw py::value_error("unsupported parameter");
  }
  bits_ = entry.view.bits;
  device_ = entry.view.device;
  Tensor t{};
  t.x = entry.view.data;
  t.numel = entry.view.numel();
  t.slice_p = slot.attr("slice_p").cast<std::int64_t>();
  t.group = slot.attr("group").cast<int>();
  t.order = memory_order(entry.view);
  const std::int64_t samples = (t.numel + t.slice_p - 1) / t.slice_p;
  t.m = read_state(entry, kM, false, 0);
  t.v = read_state(entry, kV, false, 0);
  t.s = read_state(entry, kS, t.slice_p > 1, samples);
  t.x0 = read_state(entry, kX0, t.slice_p > 1, samples);
  return t;
}

void* TensorList::read_state(Entry& entry, int which, bool is_sample, std::int64_t samples) {
  PyObject* object = PyDict_GetItemWithError(entry.state.ptr(), keys_[which].ptr());
  entry.objects[which] = py::reinterpret_borrow<py::object>(object);
  entry.addresses[which] = nullptr;
  if (object == nullptr) return nullptr;  // no exp_avg: beta1 is 0
  TensorView& view = scratch_;
  if (!reader_.read(object, view) || view.device != device_ || view.bits != bits_) throw py::value_error("unsupported state");
  entry.addresses[which] = view.data;
  if (which == kX0 && view.shape.empty() && !entry.view.shape.empty()) return nullptr;  // stands for zero everywhere
  const bool packed = view.shape.size() == 1 && view.numel() == samples && (samples <= 1 || view.strides[0] == 1);
  if (is_sample ? !packed : !view.same_layout(entry.view)) throw py::value_error("state of another shape");
  return view.data;
}

bool TensorList::unchanged() {
  TensorView& now = scratch_;
  for (const Entry& entry : entries_) {
    const bool same = reader_.read(entry.param.ptr(), now) && now.data == entry.view.data && now.device == device_ &&
                      now.bits == bits_ && now.same_layout(entry.view);
    if (!same) return false;
  }
  const std::size_t window = std::min(entries_.size(), std::max(kMinWindow, entries_.size() / kWindows));
  for (std::size_t n = 0; n < window; ++n) {
    cursor_ = (cursor_ + 1) % entries_.size();
    if (!state_unchanged(entries_[cursor_])) return false;
  }
  return true;
}

bool TensorList::state_unchanged(const Entry& entry) {
  for (int which = 0; which < kStates; ++which) {
    PyObject* object = PyDict_GetItemWithError(entry.state.ptr(), keys_[which].ptr());
    if (object != entry.objects[which].ptr()) return false;
    if (object != nullptr && !(reader_.read(object, scratch_) && scratch_.data == entry.addresses[which])) return false;
  }
  return true;
}

long TensorList::read_grads(const py::list& grads, std::vector<const void*>& addresses) {
  if (grads.size() != entries_.size()) throw py::value_error("one gradient, or None, per tensor");
  addresses.resize(entries_.size());
  for (std::size_t i = 0; i < entries_.size(); ++i) {
    PyObject* grad = PyList_GET_ITEM(grads.ptr(), i);
    addresses[i] = nullptr;
    if (grad == Py_None) continue;
    const bool fits = reader_.read(grad, scratch_) && scratch_.device == device_ && scratch_.bits == bits_ &&
                      scratch_.same_layout(entries_[i].view);
    if (!fits) return long(i);
    addresses[i] = scratch_.data;
  }
  return -1;
}

}  // namespace prodigy
