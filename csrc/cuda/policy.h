// Which kernel runs where: the table of the combinations of storage and sampling that have a kernel of their own, and
// the geometry of its launch. Plain C++, for the packer as for the kernels.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>
#include <vector>

#include "prodigy/rule.h"
#include "prodigy/table.h"

namespace prodigy::cuda {

// -- storage: the types of a plan's tensors --------------------------------------------------------------------------

// Numbers of 16 bits, as they lie in memory.
struct BFloat16 {
  std::uint16_t bits;
};
struct Float16 {
  std::uint16_t bits;
};
// A number of any of these types but double: which one is asked at run time.
struct AnyNumber {};

struct ApproximateRoots;  // see intrinsics.cuh, as of the next
struct RootsForCodes;

template <class Number>
constexpr Type kTypeOf = Type::kOther;
template <>
inline constexpr Type kTypeOf<float> = Type::kFloat32;
template <>
inline constexpr Type kTypeOf<double> = Type::kFloat64;
template <>
inline constexpr Type kTypeOf<BFloat16> = Type::kBFloat16;
template <>
inline constexpr Type kTypeOf<Float16> = Type::kFloat16;

// What is kept beside x: nothing; delta, and x is x0 + delta, rounded; or low, 8 more bits of x. Or what there is is
// asked at run time.
enum class Beside { kNothing, kDelta, kLow, kAsked };

// XNumber: of x, x0 and the gradient. StateNumber: of m, v and s.
template <class XNumber, class StateNumber, Beside kWith = Beside::kNothing>
struct Stored {
  using X = XNumber;
  using State = StateNumber;
  using T = std::conditional_t<std::is_same_v<X, double>, double, float>;  // of the arithmetic
  static constexpr Beside kBeside = kWith;
  static constexpr bool kAny = std::is_same_v<X, AnyNumber>;
  static constexpr bool kCoded = false;
  static constexpr bool kRounds = sizeof(X) < 4 || sizeof(State) < 4;  // some array has 16 bits, or may have
  // Elements that a thread takes at a time: 16 bytes of the smallest numbers; of any numbers, four, to save registers.
  static constexpr int kPerThread = kAny ? 4 : int(16 / std::min(sizeof(X), sizeof(State)));
  // Of a v that is stored with 8 or 11 bits, and the quotient by it.
  using Roots = std::conditional_t<kRounds && !kAny && sizeof(State) < 4, ApproximateRoots, ExactRoots>;
};

template <class X>
using Displaced = Stored<X, float, Beside::kDelta>;
template <class State>
using Extended = Stored<BFloat16, State, Beside::kLow>;
using AnyStorage = Stored<AnyNumber, AnyNumber, Beside::kAsked>;

// m, v, and s and x - x0 of all elements, are codes of 8 bits: Note [A warp for each block of codes]. State: of
// samples.
template <class X, Beside kWith = Beside::kNothing>
struct Coded : Stored<X, float, kWith> {
  static constexpr bool kCoded = true;
  static constexpr bool kRounds = true;
  static constexpr int kPerThread = 8;
  using Roots = RootsForCodes;
};

using ExtendedCoded = Coded<BFloat16, Beside::kLow>;
using AnyCoded = Coded<AnyNumber, Beside::kAsked>;

// -- sampling: which elements have s and x0 --------------------------------------------------------------------------

struct EveryElement {};  // slice_p == 1: s and x0 are arrays like the others
struct EveryPth {};      // slice_p > 1: s and x0 hold the elements at row-major positions 0, p, 2p, ...
struct NoElement {};     // a frozen estimate: s is not there, and x0 only for a displacement
struct AnySampling {};   // one of these, asked at run time

// -- what a tensor needs ---------------------------------------------------------------------------------------------

struct Kind {
  Type x, state;
  Beside beside;
  bool counted, sampled;  // counted: there is an s; sampled: not of all elements

  explicit Kind(const Tensor& t)
      : x(t.type),
        state(t.state_type),
        beside(t.delta != nullptr ? Beside::kDelta
               : t.low != nullptr ? Beside::kLow
                                  : Beside::kNothing),
        counted(t.s != nullptr),
        sampled(counted && t.slice_p > 1) {}
};

template <class Storage>
bool fits_storage(const Kind& kind) {
  if (is_coded(kind.state) != Storage::kCoded) return false;
  if constexpr (Storage::kAny) return kind.x != Type::kFloat64 && kind.x != Type::kOther;
  return kind.x == kTypeOf<typename Storage::X> && kind.beside == Storage::kBeside &&
         (Storage::kCoded || kind.state == kTypeOf<typename Storage::State>);
}

template <class Sampling>
bool fits_sampling(const Kind& kind) {
  if constexpr (std::is_same_v<Sampling, EveryElement>) return kind.counted && !kind.sampled;
  if constexpr (std::is_same_v<Sampling, EveryPth>) return kind.sampled;
  if constexpr (std::is_same_v<Sampling, NoElement>) return !kind.counted;
  return true;
}

// -- the tables ------------------------------------------------------------------------------------------------------

// The emulation of the tests has smaller blocks and chunks: it is slow, and its tensors should span several of both.
#ifdef PRODIGY_CUDA_SMALL
constexpr int kFewerThreads = 4, kShorterTiles = 8, kLongestChunk = 1;
#else
constexpr int kFewerThreads = 1, kShorterTiles = 1, kLongestChunk = 32;
#endif

// A kernel: what it is for, and the geometry of its launch. threads: of a block. blocks: for which a multiprocessor
// must have registers. chunk: elements of a chunk, in thousands of 1,024; tile: of a part of it, see
// Note [Samples first].
template <class StorageT, class SamplingT, int threads, int blocks, int chunk, int tile = chunk>
struct Policy {
  using Storage = StorageT;
  using Sampling = SamplingT;
  using T = typename Storage::T;
  static constexpr int kThreads = threads / kFewerThreads;
  static constexpr int kMinBlocks = blocks;
  static constexpr int kChunk = std::min(chunk, kLongestChunk) << 10;
  static constexpr int kTile = std::min((tile << 10) / kShorterTiles, kChunk);
};

template <class... Policies>
struct List {
  static constexpr int kSize = sizeof...(Policies);
};

// The first that fits is taken; a step whose gradients have another type than the parameters runs in the last that
// fits. docs/design.md, "The CUDA kernels", says what the numbers rest on.
// clang-format off
using UpdatePolicies = List<
    Policy<Stored<float, float>,       EveryElement, 256, 3,  8>,
    Policy<Stored<float, float>,       EveryPth,     512, 2,  8, 4>,
    Policy<Stored<float, float>,       NoElement,    256, 4,  8>,
    Policy<Stored<double, double>,     AnySampling,  256, 2,  8>,
    Policy<Stored<BFloat16, float>,    EveryElement, 128, 5,  8>,
    Policy<Stored<BFloat16, float>,    EveryPth,     256, 3,  8, 4>,
    Policy<Stored<BFloat16, float>,    NoElement,    128, 6,  8>,
    Policy<Stored<BFloat16, BFloat16>, EveryElement, 128, 5, 16>,
    Policy<Stored<BFloat16, BFloat16>, EveryPth,     256, 3, 16, 4>,
    Policy<Stored<BFloat16, BFloat16>, NoElement,    128, 6, 16>,
    Policy<Displaced<BFloat16>,        EveryElement, 128, 4,  8>,
    Policy<Extended<float>,            EveryElement, 128, 4,  8>,
    Policy<Extended<float>,            EveryPth,     256, 3,  8, 4>,
    Policy<Extended<BFloat16>,         EveryElement, 128, 5, 16>,
    Policy<Extended<BFloat16>,         EveryPth,     256, 3, 16, 4>,
    Policy<Stored<Float16, float>,     EveryElement, 128, 4,  8>,
    Policy<Stored<Float16, float>,     EveryPth,     256, 3,  8, 4>,
    Policy<Displaced<Float16>,         EveryElement, 128, 4,  8>,
    Policy<Stored<float, BFloat16>,    EveryElement, 128, 5,  8>,
    Policy<Stored<float, BFloat16>,    EveryPth,     256, 3,  8, 4>,
    Policy<Coded<float>,               EveryElement, 128, 5, 32>,
    Policy<Coded<float>,               EveryPth,     128, 7, 32, 2>,
    Policy<Coded<BFloat16>,            EveryElement, 128, 5, 32>,
    Policy<Coded<BFloat16>,            EveryPth,     128, 6, 32, 4>,
    Policy<ExtendedCoded,              EveryElement, 128, 5, 32>,
    Policy<ExtendedCoded,              EveryPth,     128, 6, 32, 4>,
    Policy<AnyCoded,                   AnySampling,  256, 2, 32, 4>,
    Policy<AnyStorage,                 AnySampling,  256, 2,  8>>;

using FinishPolicies = List<
    Policy<Stored<float, float>,       AnySampling,  256, 2,  8>,
    Policy<Stored<double, double>,     AnySampling,  256, 2,  8>,
    Policy<Stored<BFloat16, float>,    AnySampling,  256, 2,  8>,
    Policy<Stored<BFloat16, BFloat16>, AnySampling,  256, 2,  8>,
    Policy<AnyCoded,                   AnySampling,  256, 2, 32>,
    Policy<AnyStorage,                 AnySampling,  256, 2,  8>>;
// clang-format on

// Calls visit(policy) with the policy of that number.
template <class... Policies, class Visit>
void visit_policy(List<Policies...>, int number, Visit visit) {
  int n = 0;
  ((n++ == number ? visit(Policies()) : void()), ...);
}

template <class Policy>
bool fits(const Kind& kind) {
  return fits_storage<typename Policy::Storage>(kind) && fits_sampling<typename Policy::Sampling>(kind);
}

// The numbers of policies; -1: none.
struct Fitting {
  int first = -1, last = -1;
};

// Those that fit all tensors. One without elements has no addresses, and needs no kernel.
template <class... Policies>
Fitting fitting_policies(List<Policies...>, const std::vector<Tensor>& tensors) {
  int n = 0;
  Fitting found;
  const auto look_at = [&](auto policy) {
    using P = decltype(policy);
    if (std::all_of(tensors.begin(), tensors.end(), [](const Tensor& t) { return t.numel == 0 || fits<P>(Kind(t)); })) {
      found = {found.first < 0 ? n : found.first, n};
    }
    ++n;
  };
  (look_at(Policies()), ...);
  return found;
}

}  // namespace prodigy::cuda
