// What torch had in memory about a tensor when it was read: to see, without asking torch, that nothing has changed.
//
// Note [Images]
// A step looks at thousands of tensors, to learn whether each is where and what it was. Torch takes 60 ns to answer for
// one of them, although what it looks at are a few words of three objects: the Python object, the c10::TensorImpl it
// refers to, and the c10::StorageImpl that this refers to. An image is the addresses of these and of the data, and a
// digest of all words of the TensorImpl, and takes 20 ns to compare. (Of the storage only the data's address counts,
// and the word behind it, by which the data will be freed: it is another one where tensors share them until one is
// changed.) Words that are the same give the same answer, whatever each of them means; words that differ, for whatever
// reason, are no answer, and torch is asked. So no layout need be known, only that the words which torch looks at are
// in the image:
// - take() looks for the addresses of both objects, of the data, and of shape and strides (which lie in the TensorImpl
//   up to five dimensions; their numbers are looked for where a torch before 2.10 does not give their addresses), and
//   takes no image of a tensor where one of them is not found;
// - prodigy_fused/backends/native.py changes a tensor in every way there is, when it is imported, and lets images be
//   trusted only if each change shows.
// Addresses are compared as they are. The digest is the words' sum, each times an odd number of its own, modulo 2^64:
// of one word it shows every change, and of several all but one in 2^64. (A copy of the words would be five times as
// long, and what takes the time is memory that is in no cache.) What an image refers to is alive as long as its words
// are the same: each object holds the next one.
//
// Note [Fetching ahead]
// After a backward pass these objects are in no cache, and each is at the end of a chain of pointers. An image knows
// where they were, so they can be fetched in parallel: after a backward pass, a look at 5,000 tensors takes 0.7 instead
// of 1.8 ms (Zen 5). An address that is no longer right costs time, never a fault.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <cstring>
#include <utility>

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
    return tensor == object_ && word(tensor, impl_at_) == Word(impl_) && word(impl_, storage_at_) == Word(storage_) &&
           word(storage_, data_at_) == data_ && word(storage_, data_at_ + 1) == owner_ && digest() == digest_;
  }

  // See Note [Fetching ahead].
  void fetch() const {
    fetch_lines(object_, 1);
    fetch_lines(impl_, 3);
    fetch_lines(storage_, 1);
  }
  // The same of a tensor, whose object and reference counts are in the cache already.
  static void fetch_rest(PyObject* tensor) {
    if (storage_at_ == 0) return;
    const auto* impl = reinterpret_cast<const void*>(word(tensor, impl_at_));
    fetch_lines(static_cast<const char*>(impl) + kLine, 2);
    fetch_lines(reinterpret_cast<const void*>(word(impl, storage_at_)), 1);
  }

  // Whether a tensor's values are the negatives of those in memory, as torch marks a part of a conjugate.
  static bool is_negated(PyObject* tensor) {
    if (sign_at_ == 0) return pybind11::handle(tensor).attr("is_neg")().cast<bool>();
    return (word(reinterpret_cast<const void*>(word(tensor, impl_at_)), sign_at_) & sign_) != 0;
  }

 private:
  using Word = std::uint64_t;
  // The words of a TensorImpl that are digested, and of a StorageImpl those among which the data's address is. The
  // first two are a virtual table and counts of references, which change; the ends are those of torch 2.13. (Fewer
  // words than there are would be found out, see above; more are somebody else's, which may change.) The mark of
  // a negated view is one word further on in torch 2.6 and 2.11.
  static constexpr int kBegin = 2, kImplEnd = 22, kSignEnd = 23, kStorageEnd = 12, kInlineDims = 5;

  static Word word(const void* object, int i) {
    std::uintptr_t value;
    std::memcpy(&value, static_cast<const char*>(object) + i * sizeof(value), sizeof(value));
    return value;
  }
  // The index of a word of [begin, end) that has this value; 0: none.
  static int find(const void* object, int begin, int end, const void* value);
  // Looks for that mark: what a negated view has, and the negated view of that has not. A call would take 70 ns.
  static void find_sign(const pybind11::handle& tensor);

  // The i-th of a sequence of odd numbers that have nothing to do with each other (SplitMix64, by Steele et al.).
  static constexpr Word factor(int i) {
    Word z = 0x9e3779b97f4a7c15 * Word(i + 1);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9;
    z = (z ^ (z >> 27)) * 0x94d049bb133111eb;
    return (z ^ (z >> 31)) | 1;
  }
  template <int... kWords>
  static Word sum(const void* object, std::integer_sequence<int, kWords...>) {
    return (... + (std::integral_constant<Word, factor(kWords)>::value * word(object, kBegin + kWords)));
  }
  Word digest() const {
    return sum(impl_, std::make_integer_sequence<int, kImplEnd - kBegin>()) +
           Word(reinterpret_cast<std::uintptr_t>(Py_TYPE(object_)));
  }

  // Where a Python object has the address of its TensorImpl, this that of its StorageImpl, and this that of the data:
  // the same words in all tensors. 0: not known yet.
  static inline int impl_at_ = 0, storage_at_ = 0, data_at_ = 0;
  // The word of a TensorImpl that has the mark, and its bit.
  static inline int sign_at_ = 0;
  static inline Word sign_ = 0;

  PyObject* object_ = nullptr;
  const void *impl_ = nullptr, *storage_ = nullptr;
  Word data_ = 0, owner_ = 0, digest_ = 0;
};

}  // namespace prodigy
