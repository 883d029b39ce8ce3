// From the types that tensors are stored in to the type of the arithmetic, and back: the rule sees only the latter.
#pragma once

#include <cstdint>

#include "prodigy/rule.h"

namespace prodigy {

template <class T, class Stored>
PRODIGY_INLINE T load(const Stored* array, std::int64_t i) {
  return static_cast<T>(array[i]);
}

template <class Stored, class T>
PRODIGY_INLINE void store(Stored* array, std::int64_t i, T value) {
  array[i] = static_cast<Stored>(value);
}

}  // namespace prodigy
