// The types that tensors are stored in.
#pragma once

#include <cstdint>

#include "prodigy/inline.h"

namespace prodigy {

enum class Type : std::int32_t { kOther, kFloat32, kFloat64, kBFloat16, kFloat16, kInt8, kUInt8 };

// In bytes, of a floating-point type.
PRODIGY_INLINE constexpr int size_of(Type type) { return type == Type::kFloat64 ? 8 : type == Type::kFloat32 ? 4 : 2; }
PRODIGY_INLINE constexpr bool is_floating(Type type) { return type >= Type::kFloat32 && type <= Type::kFloat16; }
// Whether what is stored are codes of 8 bits.
PRODIGY_INLINE constexpr bool is_coded(Type type) { return type == Type::kUInt8; }
PRODIGY_INLINE constexpr bool is_half(Type type) { return type == Type::kBFloat16 || type == Type::kFloat16; }

}  // namespace prodigy
