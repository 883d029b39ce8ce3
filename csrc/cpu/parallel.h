#pragma once

#include <functional>

namespace prodigy::cpu {

// Calls work(i) for i in [0, count), on up to `threads` threads; the assignment of i to threads is unspecified.
void parallel_for(long count, int threads, const std::function<void(long)>& work);

// Returns whose threads they are: "OpenMP" or "std::thread".
const char* threading();

}  // namespace prodigy::cpu
