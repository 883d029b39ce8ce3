// Lets g++ compile the CUDA kernels, and runs them on the CPU: the threads of a block are fibers, which take turns at
// barriers and shuffles; blocks run one after the other. Block order and thread order are drawn from a seed, to expose
// results that depend on them because a barrier is missing or a sum has no fixed order.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <numeric>
#include <random>
#include <type_traits>
#include <vector>

#define __global__
#define __device__
#define __forceinline__ inline
#define __noinline__
#define __launch_bounds__(...)
#define __builtin_assume(condition)
#define __shared__ static  // one block runs at a time

struct Index {
  unsigned x;
};
inline Index threadIdx, blockIdx, gridDim;

namespace emulation {

constexpr std::size_t kStack = 256 << 10;
constexpr unsigned kWarp = 32;
enum class At { kStart, kBarrier, kShuffle, kEnd };

inline unsigned seed = 0;
inline int resident = 3;  // the answer of the occupancy query
inline long launches = 0;
inline int policy = -1;  // of the last update

struct Fiber {
  ucontext_t context;
  std::vector<char> stack = std::vector<char>(kStack);
  At at;
  double shuffled[2];  // used in turn, so that the next value does not overwrite one that is yet to be read
  bool odd;
  bool voted[2], odd_vote;
};

inline std::vector<Fiber> fibers;
inline ucontext_t scheduler;
inline std::function<void()> body;

// Waits until every thread of the block (at a barrier) or of the warp (at a shuffle) has come here.
inline void wait(At at) {
  Fiber& self = fibers[threadIdx.x];
  self.at = at;
  swapcontext(&self.context, &scheduler);
}

inline void run_thread() {
  body();
  fibers[threadIdx.x].at = At::kEnd;
}

inline void start(Fiber& fiber) {
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.stack.data();
  fiber.context.uc_stack.ss_size = kStack;
  fiber.context.uc_link = &scheduler;
  fiber.at = At::kStart;
  fiber.odd = fiber.odd_vote = false;
  makecontext(&fiber.context, run_thread, 0);
}

// Whether the `count` threads from `begin` on are all at `at`.
inline bool together(std::size_t begin, std::size_t count, At at) {
  const auto first = fibers.begin() + std::ptrdiff_t(begin);
  return std::all_of(first, first + std::ptrdiff_t(count), [at](const Fiber& f) { return f.at == at; });
}

// Runs a warp up to its next barrier or shuffle. Other warps may be far behind: only barriers hold a block together.
inline void run_warp(unsigned warp, std::mt19937& draw) {
  std::vector<unsigned> order(kWarp);
  std::iota(order.begin(), order.end(), warp * kWarp);
  std::shuffle(order.begin(), order.end(), draw);
  for (unsigned thread : order) {
    threadIdx.x = thread;
    swapcontext(&scheduler, &fibers[thread].context);
  }
  if (together(warp * kWarp, kWarp, fibers[warp * kWarp].at)) return;
  std::fprintf(stderr, "emulation: the threads of a warp are at different barriers\n");
  std::abort();
}

inline void run_block(std::mt19937& draw) {
  for (Fiber& fiber : fibers) start(fiber);
  std::vector<unsigned> ready;
  while (!together(0, fibers.size(), At::kEnd)) {
    if (together(0, fibers.size(), At::kBarrier)) {
      for (Fiber& fiber : fibers) fiber.at = At::kStart;
    }
    ready.clear();
    for (unsigned warp = 0; warp * kWarp < fibers.size(); ++warp) {
      const At at = fibers[warp * kWarp].at;
      if (at == At::kStart || at == At::kShuffle) ready.push_back(warp);
    }
    if (ready.empty()) {
      std::fprintf(stderr, "emulation: the warps of a block are at different barriers\n");
      std::abort();
    }
    const unsigned warp = ready[draw() % ready.size()];
    do {  // often far ahead of the other warps
      run_warp(warp, draw);
    } while (fibers[warp * kWarp].at == At::kShuffle && draw() % 16 != 0);
  }
}

template <class Arguments>
void run(void (*kernel)(Arguments), unsigned blocks, unsigned threads, const Arguments& arguments) {
  std::mt19937 draw(seed);
  ++launches;
  fibers.resize(threads);
  body = [&] { kernel(arguments); };
  gridDim.x = blocks;
  std::vector<unsigned> order(blocks);
  std::iota(order.begin(), order.end(), 0u);
  std::shuffle(order.begin(), order.end(), draw);
  for (unsigned block : order) {
    blockIdx.x = block;
    run_block(draw);
  }
}

// Shows a number to the other lanes, and returns where they have theirs.
inline bool share(unsigned mask, double mine) {
  if (mask != ~0u) {  // all lanes come here, see `wait`
    std::fprintf(stderr, "emulation: a shuffle of all lanes with the mask %x\n", mask);
    std::abort();
  }
  Fiber& self = fibers[threadIdx.x];
  self.odd = !self.odd;
  self.shuffled[self.odd] = mine;
  const bool turn = self.odd;
  wait(At::kShuffle);
  return turn;
}

}  // namespace emulation

inline void __syncthreads() { emulation::wait(emulation::At::kBarrier); }

inline int __syncthreads_or(int mine) {
  using namespace emulation;
  Fiber& self = fibers[threadIdx.x];
  self.odd_vote = !self.odd_vote;
  self.voted[self.odd_vote] = mine != 0;
  const bool turn = self.odd_vote;
  wait(At::kBarrier);
  return std::any_of(fibers.begin(), fibers.end(), [turn](const Fiber& f) { return f.voted[turn]; });
}

inline double __shfl_down_sync(unsigned mask, double mine, int offset) {
  using namespace emulation;
  const bool turn = share(mask, mine);
  const unsigned from = threadIdx.x + unsigned(offset);
  return threadIdx.x % kWarp + unsigned(offset) < kWarp ? fibers[from].shuffled[turn] : mine;
}

inline unsigned __reduce_max_sync(unsigned mask, unsigned mine) {
  using namespace emulation;
  const bool turn = share(mask, mine);
  const auto first = fibers.begin() + threadIdx.x / kWarp * kWarp;
  const auto less = [turn](const Fiber& a, const Fiber& b) { return a.shuffled[turn] < b.shuffled[turn]; };
  return unsigned(std::max_element(first, first + kWarp, less)->shuffled[turn]);
}

inline unsigned atomicAdd(unsigned* to, unsigned term) {
  const unsigned before = *to;
  *to += term;
  return before;
}

inline void __threadfence() {}

inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }

template <class T>
T __ldcg(const T* from) {
  return *from;
}

// Bytes of the eight of (high, low), one for each of the four digits of `which`.
inline std::uint32_t __byte_perm(std::uint32_t low, std::uint32_t high, std::uint32_t which) {
  const std::uint64_t bytes = std::uint64_t(high) << 32 | low;
  std::uint32_t result = 0;
  for (unsigned k = 0; k < 4; ++k) {
    result |= std::uint32_t(bytes >> 8 * (which >> 4 * k & 7u) & 0xffu) << 8 * k;
  }
  return result;
}
