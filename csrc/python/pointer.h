// Addresses, which come from Python as integers.
#pragma once

#include <cstdint>

namespace prodigy {

template <class T>
T* pointer(std::uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

}  // namespace prodigy
