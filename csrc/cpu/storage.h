// How tensors hold numbers, and how one is read. No torch, no standard library: every instruction set compiles this.
#pragma once

#include <stdint.h>

namespace saemnesia_fast {

enum class Storage : int32_t { Float32, Float64, Float16, BFloat16 };

struct Float16 {
  uint16_t bits;
};

struct BFloat16 {
  uint16_t bits;
};

// Internal linkage: copies compiled for different instruction sets must not be merged by the linker.
static inline float widen(float value) { return value; }

static inline double widen(double value) { return value; }

static inline float widen(BFloat16 value) {
  const uint32_t bits = uint32_t(value.bits) << 16;
  float wide;
  __builtin_memcpy(&wide, &bits, sizeof wide);
  return wide;
}

static inline float widen(Float16 value) {
  // The exponent's bias grows by 112; the product is exact and normalises what is subnormal.
  uint32_t bits = uint32_t(value.bits & 0x7fff) << 13;
  float wide;
  __builtin_memcpy(&wide, &bits, sizeof wide);
  wide *= 0x1p112f;
  __builtin_memcpy(&bits, &wide, sizeof bits);
  bits |= uint32_t(value.bits & 0x8000) << 16;
  bits |= (value.bits & 0x7c00) == 0x7c00 ? 0x7f800000u : 0u;
  __builtin_memcpy(&wide, &bits, sizeof wide);
  return wide;
}

// Calls `use` with `data` as a pointer to its elements.
template <typename Use>
static inline void with_elements(const void* data, Storage storage, const Use& use) {
  switch (storage) {
    case Storage::Float32:
      return use(static_cast<const float*>(data));
    case Storage::Float64:
      return use(static_cast<const double*>(data));
    case Storage::Float16:
      return use(static_cast<const Float16*>(data));
    case Storage::BFloat16:
      return use(static_cast<const BFloat16*>(data));
  }
}

}  // namespace saemnesia_fast
