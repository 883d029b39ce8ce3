// What the .cu files of the storages have in common: each instantiates the kernels of its storages, so that they are
// compiled side by side. entry.h, which must not be included here, declares what this defines.
#pragma once

#include "cuda/kernels.cuh"

namespace prodigy::cuda {

template <class Storage>
KernelFunction update_function(int policy) {
  KernelFunction found = nullptr;
  visit_policy(UpdatePolicies(), policy, [&](auto p) {
    using P = decltype(p);
    if constexpr (std::is_same_v<typename P::Storage, Storage>) found = update_kernel<P>;
  });
  return found;
}

template <class Storage>
KernelFunction finish_function(int policy) {
  KernelFunction found = nullptr;
  visit_policy(FinishPolicies(), policy, [&](auto p) {
    using P = decltype(p);
    if constexpr (std::is_same_v<typename P::Storage, Storage>) found = finish_kernel<P>;
  });
  return found;
}

}  // namespace prodigy::cuda
