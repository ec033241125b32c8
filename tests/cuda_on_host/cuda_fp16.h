#pragma once

#include <stdint.h>
#include <string.h>

struct __half {
  uint16_t bits;
};

inline float __half2float(__half value) {
  uint32_t bits = uint32_t(value.bits & 0x7fff) << 13;
  float wide;
  memcpy(&wide, &bits, sizeof wide);
  wide *= 0x1p112f;
  memcpy(&bits, &wide, sizeof bits);
  bits |= uint32_t(value.bits & 0x8000) << 16 | ((value.bits & 0x7c00) == 0x7c00 ? 0x7f800000u : 0u);
  memcpy(&wide, &bits, sizeof wide);
  return wide;
}
