// The kernels by number. Each is instantiated in the .cu file of its storage (unit.cuh).
#pragma once

#include "cuda/launch.h"
#include "cuda/policy.h"

namespace prodigy::cuda {

// policy: its index.
template <class Storage>
KernelFunction update_function(int policy);
template <class Storage>
KernelFunction finish_function(int policy);

struct Entry {
  KernelFunction function;
  int threads;  // of a block
};

inline Entry entry(Variant variant) {
  Entry found{};
  if (variant.kernel == Kernel::kUpdate) {
    visit_policy(UpdatePolicies(), variant.policy, [&](auto policy) {
      using P = decltype(policy);
      found = {update_function<typename P::Storage>(variant.policy), P::kThreads};
    });
  } else {
    visit_policy(FinishPolicies(), variant.policy, [&](auto policy) {
      using P = decltype(policy);
      found = {finish_function<typename P::Storage>(variant.policy), P::kThreads};
    });
  }
  return found;
}

}  // namespace prodigy::cuda
