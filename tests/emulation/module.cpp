// The CUDA backend's kernels and packer, unchanged, on the CPU: a module for the tests, which is in no wheel.
#include <pybind11/pybind11.h>

#include "emulation.h"
// First what the kernels need.
#include "cuda/codes.cuh"
#include "cuda/entry.h"
#include "prodigy/rounding.h"
#include "python/cuda_plan.h"
#include "python/layout.h"
#include "python/pointer.h"

namespace prodigy::cuda {

int resident_blocks(Variant) { return emulation::resident; }

void launch(Variant variant, std::int64_t blocks, const Arguments& arguments, void*) {
  const auto [function, threads] = entry(variant);
  if (variant.kernel == Kernel::kUpdate) emulation::policy = variant.policy;
  emulation::run(function, unsigned(blocks), unsigned(threads), arguments);
}

}  // namespace prodigy::cuda

namespace {

using namespace prodigy;

// The functions of rounding.h, on arrays of float and of 16-bit numbers at these addresses.
template <Type kType>
void widen_all(std::uintptr_t from, std::uintptr_t to, long n) {
  for (long i = 0; i < n; ++i) pointer<float>(to)[i] = widen<kType>(pointer<std::uint16_t>(from)[i]);
}

template <Type kType>
void nearest_all(std::uintptr_t from, std::uintptr_t to, long n) {
  for (long i = 0; i < n; ++i) pointer<std::uint16_t>(to)[i] = nearest<kType>(pointer<float>(from)[i]);
}

template <Type kType>
void stochastic_all(std::uintptr_t from, std::uintptr_t to, long n, std::uint32_t step, std::uint32_t tensor,
                    bool correction, long begin) {
  const RandomBits random(step, tensor, correction ? kCorrectionStream : kStepStream, begin);
  for (long i = 0; i < n; ++i) {
    pointer<std::uint16_t>(to)[i] = stochastic<kType>(pointer<float>(from)[i], random.of(begin + i));
  }
}

template <Type kType>
void bind_rounding(pybind11::module_ m) {
  m.def("widen", &widen_all<kType>);
  m.def("nearest", &nearest_all<kType>);
  m.def("stochastic", &stochastic_all<kType>);
}

// Between values of 24 bits, x and low.
void kept_all(std::uintptr_t x, std::uintptr_t low, std::uintptr_t to, long n) {
  for (long i = 0; i < n; ++i) {
    pointer<float>(to)[i] = kept_value(pointer<std::uint16_t>(x)[i], pointer<std::int8_t>(low)[i]);
  }
}

void stochastic_24_all(std::uintptr_t from, std::uintptr_t x, std::uintptr_t low, long n, std::uint32_t step) {
  const RandomBits random(step, 0, kStepStream, 0);
  for (long i = 0; i < n; ++i) {
    const Kept kept = stochastic_24(pointer<float>(from)[i], random.of(i));
    pointer<std::uint16_t>(x)[i] = kept.x;
    pointer<std::int8_t>(low)[i] = kept.low;
  }
}

// -- codes of 8 bits, by the functions of cuda/codes.cuh --------------------------------------------------------------

struct CodeArguments {
  const float* numbers;
  std::uint8_t *codes, *bytes;  // of scale, one per block
  float* decoded;
  long n;
  std::uint32_t step;
};

// A warp, which is all there is of a block of threads, takes a block of codes.
template <Code kCode>
void code_kernel(CodeArguments a) {
  using namespace cuda;
  const std::int64_t i = (std::int64_t(blockIdx.x) * kWarpSize + threadIdx.x) * kLaneCodes;
  const int count = int(std::clamp<std::int64_t>(a.n - i, 0, kLaneCodes));
  Numbers numbers{};
  std::copy_n(a.numbers + i, count, numbers.value);
  const std::uint32_t run = RandomBits(a.step, 0, kStepStream, i).run(i);
  std::uint32_t scale = 0;
  const float unit = renewed<kCode>(numbers, scale);
  const auto codes = [&] {
    if constexpr (kCode == Code::kRoot) return encode_roots(numbers, unit, run);
    if constexpr (kCode == Code::kDelta) return encoded_delta(numbers, unit, run);
    if constexpr (kCode == Code::kM) return encoded_m(numbers, unit);
    if constexpr (kCode == Code::kS) return encoded_s(numbers, unit, run);
  }();
  const Numbers decoded = numbers_of<kCode>(codes, scale);
  std::copy_n(decoded.value, count, a.decoded + i);
  store<false>(Array<std::uint8_t>(a.codes, Type::kUInt8), i, count, codes);
  a.bytes[blockIdx.x] = std::uint8_t(byte_in<kCode>(scale));
}

template <Code kCode>
void code_all(std::uintptr_t numbers, std::uintptr_t codes, std::uintptr_t bytes, std::uintptr_t decoded, long n,
              std::uint32_t step) {
  const CodeArguments a{pointer<float>(numbers),
                        pointer<std::uint8_t>(codes),
                        pointer<std::uint8_t>(bytes),
                        pointer<float>(decoded),
                        n,
                        step};
  emulation::run(code_kernel<kCode>, unsigned((n + kCodeBlock - 1) / kCodeBlock), cuda::kWarpSize, a);
}

// For each policy of the update, its threads, chunk and tile.
pybind11::list policies() {
  pybind11::list all;
  for (int n = 0; n < cuda::UpdatePolicies::kSize; ++n) {
    cuda::visit_policy(cuda::UpdatePolicies(), n,
                       [&](auto p) { all.append(pybind11::make_tuple(p.kThreads, p.kChunk, p.kTile)); });
  }
  return all;
}

}  // namespace

PYBIND11_MODULE(_emulated, m) {
  m.doc() = "The CUDA kernels run by the CPU.";
#ifdef __SANITIZE_ADDRESS__
  m.attr("SANITIZED") = true;
#else
  m.attr("SANITIZED") = false;
#endif
  m.def("kept_value", &kept_all);
  m.def("stochastic_24", &stochastic_24_all);
  bind_rounding<Type::kBFloat16>(m.def_submodule("bfloat16"));
  bind_rounding<Type::kFloat16>(m.def_submodule("float16"));
  pybind11::module_ code = m.def_submodule("code");  // by the keys of the state
  code.def("exp_avg", &code_all<Code::kM>);
  code.def("exp_avg_sq", &code_all<Code::kRoot>);
  code.def("s", &code_all<Code::kS>);
  code.def("delta", &code_all<Code::kDelta>);
  m.attr("POLICIES") = policies();
  prodigy::add_layout(m);
  prodigy::bind_cuda_plan(m);
  m.def(
      "configure",
      [](int resident, unsigned seed) {
        emulation::resident = resident;
        emulation::seed = seed;
      },
      pybind11::arg("resident"), pybind11::arg("seed"), "The most blocks of a grid; the order that things run in.");
  m.def("launches", [] { return emulation::launches; }, "How many kernels have been launched.");
  m.def("policy", [] { return emulation::policy; }, "The number of the policy of the last update.");
}
