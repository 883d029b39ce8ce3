// The tensors of a plan as Python objects: read once into the tensor table, and compared with it at every step.
#pragma once

#include <array>
#include <vector>

#include "prodigy/chunk.h"
#include "python/tensor_view.h"

namespace prodigy {

class TensorList {
 public:
  // slots: objects with the attributes param, state, group and slice_p (prodigy_fused.step.Slot).
  // Raises ValueError if a state tensor does not fit its parameter.
  TensorList(const pybind11::list& slots, pybind11::type tensor_class);

  const std::vector<Tensor>& table() const { return table_; }
  int bits() const { return bits_; }
  int device() const { return device_; }

  // A tensor that belongs to no slot. False if it is not one on the device of the others.
  bool read(const pybind11::object& tensor, TensorView& view) const {
    return reader_.read(tensor.ptr(), view) && view.device == device_;
  }

  // Whether the tensors are still the ones, at the addresses, that the table has.
  //
  // All parameters are compared, and the state of some of them, in turn: whatever moves optimizer state moves all of
  // it, so the first of them gives it away, and reading the addresses of four more tensors a parameter would cost more
  // than the step of a small one.
  bool unchanged();

  // The gradients' addresses, null for None. Returns the index of the first that is not laid out as its parameter, -1
  // if there is none.
  long read_grads(const pybind11::list& grads, std::vector<const void*>& addresses);

 private:
  static constexpr int kStates = 4;
  static constexpr std::size_t kMinWindow = 64, kWindows = 16;

  struct Entry {
    pybind11::object param;
    pybind11::dict state;
    TensorView view;
    std::array<pybind11::object, kStates> objects;  // null where `state` has no such key
    std::array<void*, kStates> addresses;
  };

  bool state_unchanged(const Entry& entry);
  Tensor read_slot(const pybind11::handle& slot, Entry& entry);
  void* read_state(Entry& entry, int which, bool is_sample, std::int64_t samples);

  TensorReader reader_;
  std::vector<Entry> entries_;
  std::vector<Tensor> table_;
  std::array<pybind11::str, kStates> keys_;
  TensorView scratch_;
  std::size_t cursor_ = 0;
  int bits_ = 0, device_ = kOtherDevice;  // of all tensors
};

}  // namespace prodigy
