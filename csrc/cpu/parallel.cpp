#include "cpu/parallel.h"

#include <atomic>
#include <system_error>
#include <thread>
#include <vector>

// The entry of GCC's OpenMP runtime (libgomp's ABI; LLVM's runtime has it too). Weak symbol: resolved only if
// torch has loaded an OpenMP runtime.
//
// After a backward pass torch's OpenMP threads spin for some milliseconds, waiting for more work. Threads of our own
// would have to fight them for the cores (measured: a step on 1,000 small tensors took twice as long as on one thread),
// so we give them the work.
#if defined(__GNUC__) && defined(__linux__)
extern "C" void GOMP_parallel(void (*work)(void*), void* data, unsigned threads, unsigned flags) __attribute__((weak));
#define PRODIGY_HAS_OPENMP (GOMP_parallel != nullptr)
#else
#define PRODIGY_HAS_OPENMP false
#define GOMP_parallel(work, data, threads, flags) (void)0
#endif

namespace prodigy::cpu {
namespace {

struct Job {
  const std::function<void(long)>& work;
  const long count;
  std::atomic<long> next{0};

  void drain() {
    for (long i; (i = next.fetch_add(1, std::memory_order_relaxed)) < count;) work(i);
  }
};

void run_on_own_threads(Job& job, int threads) {
  std::vector<std::thread> helpers;
  helpers.reserve(threads);
  try {
    for (int t = 1; t < threads; ++t) helpers.emplace_back([&job] { job.drain(); });
  } catch (const std::system_error&) {
    // No more threads can be started: those that have, and this one, do the work.
  }
  job.drain();
  for (auto& helper : helpers) helper.join();
}

}  // namespace

void parallel_for(long count, int threads, const std::function<void(long)>& work) {
  Job job{work, count};
  if (threads <= 1 || count <= 1) {
    job.drain();
  } else if (PRODIGY_HAS_OPENMP) {
    GOMP_parallel([](void* data) { static_cast<Job*>(data)->drain(); }, &job, unsigned(threads), 0);
  } else {
    run_on_own_threads(job, threads);
  }
}

const char* threading() { return PRODIGY_HAS_OPENMP ? "OpenMP" : "std::thread"; }

}  // namespace prodigy::cpu
