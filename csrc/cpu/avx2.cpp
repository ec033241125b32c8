#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx2,fma")
#endif
#define INSTRUCTION_SET avx2
#define VECTOR_BYTES 32
#define TILE 6
#include "kernels.inl"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
