// The tensors of a plan as Python objects: read once into the tensor table, and compared with it at every step.
#pragma once

#include <array>
#include <vector>

#include "prodigy/chunk.h"
#include "python/footprint.h"
#include "python/tensor_view.h"

namespace prodigy {

class TensorList {
 public:
  // slots: objects with the attributes param, state, group and slice_p (prodigy_fused.step.Slot).
  // Raises ValueError if a state tensor does not fit its parameter.
  TensorList(const pybind11::list& slots, pybind11::type tensor_class);

  const std::vector<Tensor>& table() const { return table_; }
  Type type() const { return type_; }  // of the parameters
  Type state_type() const { return state_type_; }
  int device() const { return device_; }

  // A tensor that belongs to no slot. False if it is not one on the device of the others.
  bool read(const pybind11::object& tensor, TensorView& view) const {
    return reader_.read(tensor.ptr(), view) && view.device == device_;
  }

  // Whether all tensors are still at the addresses, and of the shapes, that the table has.
  bool unchanged();

  // The gradients' addresses, null for None, and types. Returns the index of the first that is not laid out as its
  // parameter, -1 if there is none.
  long read_grads(const pybind11::list& grads, std::vector<Gradient>& addresses);

 private:
  static constexpr int kStates = 5;

  // Borrowed: the Python plan keeps its slots, and a reference from here would hide cycles from the garbage collector.
  struct Entry {
    pybind11::handle param, state;
    void* data;
    Layout layout;
    std::array<void*, kStates> states;  // their addresses
    bool displaced;                     // there must be a delta
    Footprint footprint;
  };

  Tensor read_slot(const pybind11::handle& slot, Entry& entry);
  PyObject* find_state(const Entry& entry, int which) const;  // null: none
  // The address of a state tensor; null where there is none, or where one number stands for zero everywhere.
  // Raises ValueError if it does not fit its parameter.
  void* read_state(const Entry& entry, const Tensor& tensor, int which);

  bool fits_type(Type type, int which);

  TensorReader reader_;
  std::vector<Entry> entries_;
  std::vector<Tensor> table_;
  std::array<pybind11::str, kStates> keys_;
  Type type_ = Type::kOther, state_type_ = Type::kOther;  // of all parameters, of all states
  int device_ = kOtherDevice;                             // of all tensors
};

}  // namespace prodigy
