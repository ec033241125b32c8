// Numbers from -1 or 0 to 1 in 8 bits, as torchao keeps them (saemnesia_fast/ops/eight_bit.py), by arithmetic.
//
// The interval [0.1, 1] of each of seven decades up to 1 is cut into equal parts, twice as many as of the decade below,
// and a code means the middle of one. Counted from the smallest on, the parts of a decade that has n begin at number n:
// in binary the number's length tells the decade, and the digits after the first one the part. Before the first part
// there is the number 0, after the last the number 1.
#pragma once

#include "lanes.h"

namespace saemnesia_fast {

SAEMNESIA_INLINE uint32_t bits_of(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

SAEMNESIA_INLINE float float_of(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

// With a sign, the code of 0.
constexpr int kZero = 127;
// Parts of the lowest decade.
template <bool Signed>
constexpr int kFewest = Signed ? 1 : 2;
constexpr int kDecades = 7;

// No branches below, which would keep a loop from becoming vectors: numbers that grow or shrink from decade to decade
// are sums of differences of their bits, over the decades that are reached.
SAEMNESIA_INLINE int32_t where(bool reached, int32_t bits) { return bits & -int32_t(reached); }

template <bool Signed>
SAEMNESIA_INLINE float decode(int32_t code) {
  // What the middle of a part in [0.1, 1] is multiplied by; the last makes 1 of what is after the highest decade.
  constexpr float kAbove = 1 / (0.9f * (0.5f / (128 * kFewest<Signed>)) + 0.1f);
  constexpr float kPowers[] = {0, 1e-6f, 1e-5f, 1e-4f, 1e-3f, 1e-2f, 1e-1f, 1.0f, kAbove};
  const int32_t offset = code - kZero;
  const int32_t place = Signed ? (offset ^ offset >> 31) - (offset >> 31) : code + 1;
  int32_t power = 0;
  SAEMNESIA_UNROLL
  for (int i = 0; i <= kDecades; ++i) {
    power += where(place >= kFewest<Signed> << i, int32_t(bits_of(kPowers[i + 1]) - bits_of(kPowers[i])));
  }
  const float part = float_of((bits_of(float(place) + 0.5f) & 0x7fffff) | 0x3f800000) - 1;
  const float size = float_of(power) * (0.9f * part + 0.1f);
  return float_of(bits_of(size) | (Signed ? offset & 0x80000000u : 0));
}

// The nearest code, borders being rounded as float32 rounds.
template <bool Signed>
SAEMNESIA_INLINE int32_t encode(float number) {
  // What maps the decades to [1/9, 10/9]; the last maps what is next to 1 to a little more than 1/9.
  constexpr float kFactors[] = {1e6f / 0.9f, 1e5f / 0.9f, 1e4f / 0.9f, 1e3f / 0.9f,
                                1e2f / 0.9f, 1e1f / 0.9f, 1 / 0.9f,    0.1117f};
  constexpr float kPowers[] = {1e-6f, 1e-5f, 1e-4f, 1e-3f, 1e-2f, 1e-1f, 1.0f};
  const int32_t sign = int32_t(bits_of(number)) >> 31, size = int32_t(bits_of(number) & 0x7fffffff);
  const auto reaches = [&](float border) { return size >= int32_t(bits_of(border)); };
  int32_t factor = int32_t(bits_of(kFactors[0])), parts = int32_t(bits_of(float(kFewest<Signed>)));
  SAEMNESIA_UNROLL
  for (int i = 1; i <= kDecades; ++i) {
    const int all = kFewest<Signed> << i;
    const bool reached = reaches(i < kDecades ? kPowers[i] * (0.1f + 0.18f / all) : 1 - 0.45f / all);
    factor += where(reached, int32_t(bits_of(kFactors[i]) - bits_of(kFactors[i - 1])));
    parts += where(reached, 1 << 23);
  }
  const float found = float_of(factor) * float_of(size) + 8.0f / 9;
  const float within = float_of(found < 2.0f ? bits_of(found) : 0x3fffffff);
  const int32_t place = int32_t(float_of(parts) * within) - (Signed ? 0 : 1);
  const int32_t code = where(reaches(1e-6f * (0.05f + 0.225f / kFewest<Signed>)), place);
  // There is no -1.
  return Signed ? kZero + ((code ^ sign) - sign) + ((code & sign) >> 7) : code;
}

}  // namespace saemnesia_fast
