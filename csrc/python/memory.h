// How a tensor lies in memory, as the tensor table has it.
#pragma once

#include <pybind11/pybind11.h>

#include <algorithm>
#include <vector>

#include "prodigy/eight_bits.h"
#include "prodigy/table.h"
#include "python/tensor_view.h"

namespace prodigy {

// Returns the order of a tensor's memory. Raises ValueError if its elements do not fill one run of memory.
inline MemoryOrder memory_order(const TensorView& view) {
  std::vector<int> dims;
  std::vector<std::int64_t> row_major(view.dims);
  std::int64_t expected = 1;
  bool is_row_major = true;
  for (int k = view.dims - 1; k >= 0; --k) {
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
    if (view.strides[k] != expected || order.dims == kMaxDims) throw pybind11::value_error("unsupported memory layout");
    order.stride[order.dims] = view.strides[k];
    order.row_major_stride[order.dims++] = row_major[k];
  }
  return order;
}

// where: None, or the prodigy_fused.dtensor.IndexMap of a shard. Raises ValueError if kernels cannot follow it.
inline IndexMap index_map(const pybind11::object& where, const Tensor& tensor) {
  if (where.is_none()) return {};
  const pybind11::object affine = where.attr("affine");
  if (affine.is_none() || tensor.order.dims > 0) throw pybind11::value_error("unsupported shard");
  const auto number = [&](const char* name) { return affine.attr(name).cast<std::int64_t>(); };
  return {number("base"), number("length"), number("pitch")};
}

// Whether this can be the scale of a tensor of so many elements. (That one access moves four bytes is a promise of
// prodigy_fused/state.py; alignment is checked because others may put tensors into the state.)
inline bool is_scale(const TensorView& view, std::int64_t numel) {
  const bool fits = view.dims == 2 && view.shape[0] == (numel + kCodeBlock - 1) / kCodeBlock && view.shape[1] == kCodes;
  const bool is_run = fits && view.strides[1] == 1 && (view.shape[0] <= 1 || view.strides[0] == kCodes);
  return is_run && reinterpret_cast<std::uintptr_t>(view.data) % kCodes == 0;
}

}  // namespace prodigy
