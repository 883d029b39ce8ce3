// What torch had in memory about a tensor when it was read: to see, without asking torch, that nothing has changed.
//
// Note [Images]
// A step looks at thousands of tensors, to learn whether each is where and what it was. Torch takes 60 ns to answer for
// one of them, although what it looks at are a few words of three objects: the Python object, the c10::TensorImpl it
// refers to, and the c10::StorageImpl that this refers to. An image is a copy of these words, and comparing it takes
// 10 ns. Words that are the same give the same answer, whatever each of them means; words that differ, for whatever
// reason, are no answer, and torch is asked. So no layout need be known, only that the words which torch looks at are
// in the image:
// - take() looks for the addresses of both objects, of the data, and of shape and strides (which lie in the TensorImpl
//   up to five dimensions), and takes no image of a tensor where one of them is not found;
// - prodigy_fused/backends/native.py changes a tensor in every way there is, when it is imported, and lets images be
//   trusted only if each change shows.
// What an image refers to is alive as long as its words are the same: each object holds the next one.
//
// Note [Fetching ahead]
// After a backward pass these objects are in no cache, and each is at the end of a chain of pointers. An image knows
// where they were, so they can be fetched in parallel: after a backward pass, a look at 5,000 tensors takes 0.7 instead
// of 1.8 ms (Zen 5). An address that is no longer right costs time, never a fault.
#pragma once

#include <pybind11/pybind11.h>

#include <array>
#include <cstdint>
#include <cstring>

#include "python/tensor_view.h"

namespace prodigy {

constexpr int kLine = 64;  // bytes of a cache line

inline void fetch_lines(const void* begin, int lines) {
#if defined(__GNUC__)
  for (int line = 0; line < lines; ++line) __builtin_prefetch(static_cast<const char*>(begin) + line * kLine);
#else
  (void)begin, (void)lines;
#endif
}

class TensorImage {
 public:
  // Takes an image of a tensor that was read as `view`; returns whether it could. Raises what the tensor's methods do.
  bool take(const pybind11::handle& tensor, const TensorView& view, const pybind11::handle& tensor_class);

  // Whether `tensor` is the one that was taken, and its words are the same. Only where take() has returned true.
  bool shows(PyObject* tensor) const {
    return tensor == object_ && Py_TYPE(tensor) == type_ && word(tensor, impl_at_) == Word(impl_) &&
           same(impl_, impl_words_) && same(storage_, storage_words_);
  }

  // See Note [Fetching ahead].
  void fetch() const {
    fetch_lines(object_, 1);
    fetch_lines(impl_, 3);
    fetch_lines(storage_, 2);
  }
  // The same of a tensor, whose object and reference counts are in the cache already.
  static void fetch_rest(PyObject* tensor) {
    if (storage_at_ == 0) return;
    const auto* impl = reinterpret_cast<const void*>(word(tensor, impl_at_));
    fetch_lines(static_cast<const char*>(impl) + kLine, 2);
    fetch_lines(reinterpret_cast<const void*>(word(impl, storage_at_)), 1);
  }

 private:
  using Word = std::uintptr_t;
  // The words after those two with which both objects begin: a virtual table and counts of references, which change.
  static constexpr int kSkipped = 2;
  // As many as torch 2.13 has. (Fewer than there are would be found out, see above; more are somebody else's, which
  // may change.)
  using ImplWords = std::array<Word, 22 - kSkipped>;
  using StorageWords = std::array<Word, 12 - kSkipped>;

  static Word word(const void* object, int i) {
    Word value;
    std::memcpy(&value, static_cast<const char*>(object) + i * sizeof(Word), sizeof(Word));
    return value;
  }
  // The index of a word from [begin, end) that has this value; 0: none.
  static int find(const void* object, std::size_t begin, std::size_t end, Word value);
  template <class Words>
  static const void* begin(const void* object, const Words&) {
    return static_cast<const char*>(object) + kSkipped * sizeof(Word);
  }
  template <class Words>
  static bool same(const void* object, const Words& words) {
    Words now;
    copy(object, now);
    Word different = 0;
    for (std::size_t i = 0; i < now.size(); ++i) different |= now[i] ^ words[i];
    return different == 0;
  }
  template <class Words>
  static void copy(const void* object, Words& words) {
    std::memcpy(words.data(), begin(object, words), sizeof(Words));
  }

  // Which word of a Python object is the address of its TensorImpl, and which of that is its StorageImpl's: the same of
  // all tensors. 0: not known yet.
  static inline int impl_at_ = 0, storage_at_ = 0;

  const PyObject* object_ = nullptr;
  const PyTypeObject* type_ = nullptr;
  const void *impl_ = nullptr, *storage_ = nullptr;
  ImplWords impl_words_;
  StorageWords storage_words_;
};

}  // namespace prodigy
