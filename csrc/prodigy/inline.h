// PRODIGY_INLINE: for functions that the CPU's loops and the CUDA kernels share, and that must be inlined in both.
#pragma once

#if defined(__CUDACC__)
#define PRODIGY_INLINE __host__ __device__ __forceinline__
#elif defined(__GNUC__)
#define PRODIGY_INLINE inline __attribute__((always_inline))
#else
#define PRODIGY_INLINE inline
#endif
