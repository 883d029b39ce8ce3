// The images of a parameter, of its state's tensors, and of the dictionary that holds these.
#pragma once

#include <pybind11/pybind11.h>

#include <array>
#include <memory>
#include <vector>

#include "python/state.h"
#include "python/tensor_image.h"
#include "python/tensor_view.h"

namespace prodigy {

class ParameterImage {
 public:
  // Which states are read; others that are there may be what they like.
  using Needs = std::array<bool, kStates>;
  using Keys = std::array<pybind11::str, kStates>;

  // Both are borrowed, see TensorList. There are no images yet.
  ParameterImage(const pybind11::handle& param, const pybind11::handle& state)
      : param_(param.ptr()), state_(state.ptr()) {}

  // Takes the images of what was found to be unchanged. Does so a few times only, or the images of tensors some of
  // whose words change in every step would be taken again and again.
  void take(const Needs& needs, const Keys& keys, const TensorReader& reader, const pybind11::handle& tensor_class);
  // Has the image share what is the same in another one: the memory of that is in the cache more often.
  void share(const ParameterImage& other) {
    if (items_ && other.items_ && *items_ == *other.items_) items_ = other.items_;
  }
  // To be called when the parameter has changed.
  void forget() { valid_ = false, tries_ = 0; }

  // Whether the parameter and its state are, word for word, what they were. False if no image may or could be taken.
  bool shows() const;

  // See Note [Fetching ahead].
  void fetch() const;

  // Whether images may take the place of asking torch: not until native.py has found them to be right.
  static inline bool trusted = false;

 private:
  static constexpr int kMostTries = 4;

  // A key of the dictionary, and the state it is the key of; kStates: one that is not read.
  struct Item {
    pybind11::object key;
    int which;

    bool operator==(const Item& other) const { return key.is(other.key) && which == other.which; }
  };
  using Items = std::vector<Item>;  // in the dictionary's order

  bool take_states(const Needs& needs, const Keys& keys, const TensorReader& reader,
                   const pybind11::handle& tensor_class);

  bool valid_ = false;
  int tries_ = 0;
  PyObject *param_, *state_;
  const void* state_keys_ = nullptr;    // where the dictionary keeps its keys
  std::shared_ptr<const Items> items_;  // the same of many parameters
  TensorImage param_image_;
  std::array<TensorImage, kStates> state_images_;
};

}  // namespace prodigy
