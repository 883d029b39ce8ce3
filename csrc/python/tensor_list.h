// The tensors of a plan as Python objects: read once into the tensor table, and compared with it at every step.
#pragma once

#include <pybind11/pybind11.h>

#include <array>
#include <string>
#include <string_view>
#include <vector>

#include "prodigy/record.h"
#include "prodigy/table.h"
#include "python/parameter_image.h"
#include "python/state.h"
#include "python/tensor_view.h"

namespace prodigy {

class TensorList {
 public:
  // slots: objects with the attributes of prodigy_fused.step.Slot.
  // state_format: the dtype of exp_avg, exp_avg_sq and s, without "torch.", or "8bit".
  // estimates: their number. The slots must be in the order of their estimates.
  // Raises ValueError if a state tensor does not fit its parameter.
  TensorList(const pybind11::list& slots, pybind11::type tensor_class, const std::string& state_format,
             std::size_t estimates);

  const std::vector<Tensor>& table() const { return table_; }
  Type type() const { return type_; }  // of the parameters
  int device() const { return device_; }
  std::size_t estimates() const { return estimates_; }
  // Throws std::invalid_argument, a ValueError in Python, if the record lacks a group or an estimate of the tensors.
  Record read_record(std::string_view bytes) const { return Record(bytes, group_count_, estimates_); }

  // Whether all tensors are still at the addresses, and of the shapes, that the table has.
  bool unchanged();
  // Whether those of slot i are.
  bool unchanged_at(std::size_t i) const;

  // Puts the tensors' addresses into the table, as they are now. Returns false if anything else of a tensor has
  // changed, too: then this list is of no more use.
  bool mend();

  // Takes up more tensors. slots: those of this list and new ones among them, in the order of all. Raises ValueError if
  // a state tensor does not fit its parameter; this list is then what it was.
  void extend(const pybind11::list& slots);

  // Keeps the gradients' addresses, null for None, until release_gradients(). Returns -1, or the index of the first
  // that is not laid out as its parameter: from there on the caller may go on with another one. It keeps the tensors
  // themselves alive.
  long load_gradients(const pybind11::list& grads, std::size_t first = 0);
  void release_gradients() { grads_.clear(); }
  // Reads the gradient of tensor i, which is not kept. Returns false if it is not laid out as its parameter.
  bool read_one_gradient(std::size_t i, const pybind11::handle& grad, Gradient& gradient) const;
  // One per tensor. Throws std::logic_error, a RuntimeError in Python, if none are loaded.
  const std::vector<Gradient>& gradients() const;

 private:
  // Borrowed: the Python plan keeps its slots, and a reference from here would hide cycles from the garbage collector.
  struct Entry {
    pybind11::handle slot, param, state;
    void* data;
    Layout layout;
    std::array<void*, kStates> states;  // their addresses
    bool displaced, extended;           // there must be a delta, or a low
    bool moves_in_codes;                // there must be a delta, and need be no x0
    bool frozen;                        // there need be no s, and no x0 unless displaced
    bool packed;                        // slice_p > 1
    std::int64_t samples;               // then the elements of s and x0
  };

  // Appends to `entries` and `table` the slots of a list that are not among this list's.
  void read_new(const pybind11::list& slots, std::vector<Entry>& entries, std::vector<Tensor>& table);
  Tensor read_slot(const pybind11::handle& slot, Entry& entry);
  // Reads the parameter's address and those of its state. Raises ValueError if one of them does not fit the entry.
  void read_addresses(Entry& entry, Tensor& tensor) const;
  bool read_param(const Entry& entry, TensorView& view) const;
  ParameterImage::Needs needs(const Entry& entry) const;      // a state that is not needed is ignored
  PyObject* find_state(const Entry& entry, int which) const;  // null: none
  // The address of a state tensor; null where there is none, or where one number stands for zero everywhere.
  // Raises ValueError if it does not fit its parameter.
  void* read_state(const Entry& entry, const Tensor& tensor, int which) const;
  bool fits_type(Type type, int which, bool packed) const;
  bool is_unchanged(const Entry& entry, const Tensor& tensor) const;
  // See Note [Fetching ahead].
  void fetch_gradient(PyObject* grad, const Entry& entry) const;
  // The gradient's address; false if it is not laid out as its parameter.
  bool read_gradient(PyObject* object, const Entry& entry, Gradient& gradient) const;

  pybind11::type tensor_class_;
  TensorReader reader_;
  std::vector<ParameterImage> images_;  // what unchanged() looks at first; of the tensors of `entries_`
  std::vector<Entry> entries_;
  std::vector<Tensor> table_;
  std::vector<Gradient> grads_;  // empty unless loaded
  ParameterImage::Keys keys_;
  Type type_ = Type::kOther;   // of all parameters
  Type state_type_;            // of all exp_avg, exp_avg_sq and s
  int device_ = kOtherDevice;  // of all tensors
  std::size_t estimates_;
  std::size_t group_count_;  // groups that the tensors and estimates refer to: their numbers are less than this
};

}  // namespace prodigy
