#include "cpu/walk.h"

#include <algorithm>

#include "cpu/finish.h"
#include "cpu/update.h"

namespace prodigy::cpu {
namespace {

using std::int64_t;

// update(arrays, begin, n, samples): phase 1 for a block.
template <class X, class S, bool kMomentum, class Update>
Sums<double> walk_blocks(const Tensor& t, const Gradient& grad, const Chunk& chunk, const Coefficients<Wide<X>>& c,
                         Update update) {
  const int64_t shift = random_shift(t, chunk);
  const RandomBits random(c.k, t.index, kStepStream, chunk.begin + shift);
  const bool rounds = needs_random_bits(t);
  Scratch<Wide<X>> scratch;
  Sums<double> sums{0.0, 0.0};
  for (int64_t begin = chunk.begin; begin < chunk.end; begin += kBlock) {
    const int n = int(std::min<int64_t>(kBlock, chunk.end - begin));
    const Samples samples(t, chunk, begin, n);
    Arrays<X, S> a = open_update<X, S>(t, grad, begin, n, kMomentum, samples, scratch);
    a.random = draw(random, begin + shift, n, rounds, scratch);
    const Sums<double> part = update(a, begin, n, samples);
    close_update(t, begin, n, kMomentum, samples, a);
    sums.dot += part.dot;
    sums.norm += part.norm;
  }
  return sums;
}

// Which loops can walk a tensor.
template <class X, class S, bool kMomentum, Beside kBeside, Sampled kSampled>
Sums<double> update_blocks(const Tensor& t, const Gradient& grad, const Chunk& chunk, const Coefficients<Wide<X>>& c) {
  using Kernel = UpdateBlock<X, S, kMomentum, kBeside, kSampled>;
  return walk_blocks<X, S, kMomentum>(t, grad, chunk, c,
                                      [&](const Arrays<X, S>& a, int64_t begin, int n, const Samples& samples) {
                                        return run<Kernel>(a, &t, begin, n, samples, c);
                                      });
}

// State in codes, but for s and x0 where not all elements have samples.
template <bool kMomentum, Sampled kSampled>
Sums<double> coded_blocks(const Tensor& t, const Gradient& grad, const Chunk& chunk, const Coefficients<float>& c) {
  using Samplers = SampleBlock<kMomentum, kSampled>;
  return walk_blocks<float, float, kMomentum>(
      t, grad, chunk, c, [&](const Arrays<float, float>& a, int64_t begin, int n, const Samples& samples) {
        const auto update = [&](auto codes) { return codes.update(t, begin, n, a, c); };
        if (kSampled == Sampled::kAll || kSampled == Sampled::kNone) return run_codes(update);
        const Sums<double> sums = run<Samplers>(a, &t, begin, n, samples, c);
        run_codes(update);
        return sums;
      });
}

template <bool kMomentum>
Sums<double> update_coded(const Tensor& t, const Gradient& grad, const Chunk& chunk, const Coefficients<float>& c) {
  if (t.s == nullptr || t.slice_p == 1) return coded_blocks<kMomentum, Sampled::kAll>(t, grad, chunk, c);
  return t.order.dims > 0 ? coded_blocks<kMomentum, Sampled::kStrided>(t, grad, chunk, c)
                          : coded_blocks<kMomentum, Sampled::kPacked>(t, grad, chunk, c);
}

template <class X, class S, bool kMomentum, Beside kBeside>
Sums<double> update_samples(const Tensor& t, const Gradient& grad, const Chunk& chunk, const Coefficients<Wide<X>>& c) {
  if (t.s == nullptr) return update_blocks<X, S, kMomentum, kBeside, Sampled::kNone>(t, grad, chunk, c);
  if constexpr (kBeside != Beside::kDelta) {  // a displacement needs all of x0
    if (t.slice_p > 1) {
      return t.order.dims > 0 ? update_blocks<X, S, kMomentum, kBeside, Sampled::kStrided>(t, grad, chunk, c)
                              : update_blocks<X, S, kMomentum, kBeside, Sampled::kPacked>(t, grad, chunk, c);
    }
  }
  return update_blocks<X, S, kMomentum, kBeside, Sampled::kAll>(t, grad, chunk, c);
}

template <class X, class S, bool kMomentum = true>
Sums<double> update_typed(const Tensor& t, const Gradient& grad, const Chunk& chunk, const Coefficients<Wide<X>>& c) {
  if constexpr (!std::is_same_v<X, double>) {
    if (t.delta != nullptr) return update_samples<X, S, kMomentum, Beside::kDelta>(t, grad, chunk, c);
  }
  if constexpr (std::is_same_v<X, Bits16>) {
    if (t.low != nullptr) return update_samples<X, S, kMomentum, Beside::kLow>(t, grad, chunk, c);
  }
  return update_samples<X, S, kMomentum, Beside::kNothing>(t, grad, chunk, c);
}

}  // namespace

template <>
Sums<double> update_chunk(const Tensor& t, const Gradient& grad, const Chunk& chunk, const Coefficients<double>& c) {
  return c.momentum ? update_typed<double, double>(t, grad, chunk, c)
                    : update_typed<double, double, false>(t, grad, chunk, c);
}

template <>
Sums<double> update_chunk(const Tensor& t, const Gradient& grad, const Chunk& chunk, const Coefficients<float>& c) {
  // The loops know bfloat16 that is rounded as usual; everything else is copied to float32 for them.
  if (is_coded(t.state_type)) {
    return c.momentum ? update_coded<true>(t, grad, chunk, c) : update_coded<false>(t, grad, chunk, c);
  }
  const bool x16 = t.type == Type::kBFloat16 && grad.type == t.type && (t.stochastic || t.delta != nullptr);
  const bool state16 = t.state_type == Type::kBFloat16;
  if (!c.momentum) return update_typed<float, float, false>(t, grad, chunk, c);
  if (x16 && state16) return update_typed<Bits16, Bits16>(t, grad, chunk, c);
  if (x16) return update_typed<Bits16, float>(t, grad, chunk, c);
  if (state16) return update_typed<float, Bits16>(t, grad, chunk, c);
  return update_typed<float, float>(t, grad, chunk, c);
}

template <class T>
void finish_chunk(const Tensor& t, const Gradient& grad, const Chunk& chunk, const GroupRow<T>& group) {
  const int64_t shift = random_shift(t, chunk);
  const RandomBits random(group.c.k, t.index, stream_of(group.how), chunk.begin + shift);
  Scratch<T> scratch;
  for (int64_t begin = chunk.begin; begin < chunk.end; begin += kBlock) {
    const int n = int(std::min<int64_t>(kBlock, chunk.end - begin));
    Arrays<T, T> a = open_finish(t, grad, begin, n, group.c.momentum, scratch);
    a.random = draw(random, begin + shift, n, t.stochastic || t.moved != nullptr, scratch);
    is_coded(t.state_type) ? run<FinishBlock<T, KeptRoots>>(a, n, group) : run<FinishBlock<T>>(a, n, group);
    close_position(t, begin, n, a);
  }
}

template void finish_chunk(const Tensor&, const Gradient&, const Chunk&, const GroupRow<float>&);
template void finish_chunk(const Tensor&, const Gradient&, const Chunk&, const GroupRow<double>&);

}  // namespace prodigy::cpu
