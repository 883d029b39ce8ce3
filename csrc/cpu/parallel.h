#pragma once

#include <functional>

namespace prodigy::cpu {

// Calls work(i) for i in [0, count), on up to `threads` threads; which thread takes which i is left to chance.
void parallel_for(long count, int threads, const std::function<void(long)>& work);

// Whose threads they are: "OpenMP" or "std::thread".
const char* threading();

}  // namespace prodigy::cpu
