// The tensors of a plan as Python objects: read once into the tensor table, and compared with it at every step.
#pragma once

#include <pybind11/pybind11.h>

#include <array>
#include <string>
#include <string_view>
#include <vector>

#include "prodigy/record.h"
#include "prodigy/table.h"
#include "python/footprint.h"
#include "python/state.h"
#include "python/tensor_view.h"

namespace prodigy {

class TensorList {
 public:
  // slots: objects with the attributes of prodigy_fused.step.Slot.
  // state_format: the dtype of exp_avg, exp_avg_sq and s, without "torch.".
  // estimates: their number. The slots must be in the order of their estimates.
  // Raises ValueError if a state tensor does not fit its parameter.
  TensorList(const pybind11::list& slots, pybind11::type tensor_class, const std::string& state_format,
             std::size_t estimates);

  const std::vector<Tensor>& table() const { return table_; }
  Type type() const { return type_; }  // of the parameters
  Type state_type() const { return state_type_; }
  int device() const { return device_; }
  // Throws std::invalid_argument, a ValueError in Python, if the record lacks a group or an estimate of the tensors.
  Record read_record(std::string_view bytes) const { return Record(bytes, group_count_, estimates_); }

  // Whether all tensors are still at the addresses, and of the shapes, that the table has.
  bool unchanged();

  // Keeps the gradients' addresses, null for None, until release_gradients(). Returns -1, or the index of the first
  // that is not laid out as its parameter; then none is kept. The caller keeps the tensors themselves alive.
  long load_gradients(const pybind11::list& grads);
  void release_gradients() { grads_.clear(); }
  // One per tensor. Throws std::logic_error, a RuntimeError in Python, if none are loaded.
  const std::vector<Gradient>& gradients() const;

 private:
  // Borrowed: the Python plan keeps its slots, and a reference from here would hide cycles from the garbage collector.
  struct Entry {
    pybind11::handle param, state;
    void* data;
    Layout layout;
    std::array<void*, kStates> states;  // their addresses
    bool displaced;                     // there must be a delta
    bool frozen;                        // there need be no s, and no x0 unless displaced
    Footprint footprint;
  };

  Tensor read_slot(const pybind11::handle& slot, Entry& entry);
  static bool needs(const Entry& entry, int which);           // else a state that is there is ignored
  PyObject* find_state(const Entry& entry, int which) const;  // null: none
  // The address of a state tensor; null where there is none, or where one number stands for zero everywhere.
  // Raises ValueError if it does not fit its parameter.
  void* read_state(const Entry& entry, const Tensor& tensor, int which) const;
  bool fits_type(Type type, int which) const;
  // The gradient's address; false if it is not laid out as its parameter.
  bool read_gradient(PyObject* object, const Entry& entry, Gradient& gradient) const;

  TensorReader reader_;
  std::vector<Entry> entries_;
  std::vector<Tensor> table_;
  std::vector<Gradient> grads_;  // empty unless loaded
  std::array<pybind11::str, kStates> keys_;
  Type type_ = Type::kOther;   // of all parameters
  Type state_type_;            // of all exp_avg, exp_avg_sq and s
  int device_ = kOtherDevice;  // of all tensors
  std::size_t estimates_;
  std::size_t group_count_;  // groups that the tensors and estimates refer to: their numbers are less than this
};

}  // namespace prodigy
