#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,fma,prefer-vector-width=512")
#endif
#define INSTRUCTION_SET avx512
#define VECTOR_BYTES 64
#define TILE 14
#include "kernels.inl"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
