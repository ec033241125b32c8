#define INSTRUCTION_SET baseline
#define VECTOR_BYTES 16
#if defined(__x86_64__)
#define TILE 6
#else
#define TILE 12
#endif
#include "kernels.inl"
