// The loop of adam_rows (SPEC 4.1), for host and device: one row of a parameter, in place.
//
// Beyond lanes.h, a `Lanes` has each(d, f), which calls f(c) for every channel in some thread, and sync(), after which
// all threads see what each other wrote.
#pragma once

#include "lanes.h"

namespace saemnesia_fast {

enum class Shadow : int32_t { None, Float16, BFloat16 };

template <typename T>
struct AdamJob {
  T* W;
  // T, or bfloat16 bits where `short_moments`.
  void* exp_avg;
  void* exp_avg_sq;
  bool short_moments;
  // W rounded to 16 bits.
  uint16_t* shadow;
  Shadow shadow_type;
  // One number on the device of W that the gradient is multiplied by; null: 1. NaN: nothing is done.
  const T* scale;
  int64_t d;
  T beta1;
  T beta2;
  T eps;
  // lr / (1 - beta1^step) and 1 / sqrt(1 - beta2^step)
  T step_size;
  T inverse_root;
  uint32_t step;
  bool remove_parallel;
  bool unit_norm;
};

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

// To the nearest, ties to even.
SAEMNESIA_INLINE uint16_t to_bfloat16(float value) {
  const uint32_t bits = bits_of(value);
  return value == value ? uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16) : uint16_t(0x7fc0);
}

SAEMNESIA_INLINE uint16_t to_float16(float value) {
  const uint32_t all = bits_of(value), bits = all & 0x7fffffff;
  // Adding 0.5 leaves the 10 bits of a subnormal at the end of the sum, rounded.
  const uint32_t small = bits_of(float_of(bits) + 0.5f) - 0x3f000000;
  const uint32_t normal = (bits + 0xfff + (bits >> 13 & 1) - (112u << 23)) >> 13;
  const uint32_t large = bits > 0x7f800000 ? 0x7e00 : 0x7c00;
  const uint32_t magnitude = bits < 0x38800000 ? small : bits < 0x47800000 ? normal : large;
  return uint16_t(magnitude | (all >> 16 & 0x8000));
}

// Up or down with the probabilities that keep the mean: `noise` is 16 random bits.
SAEMNESIA_INLINE uint16_t to_bfloat16(float value, uint32_t noise) {
  return value == value ? uint16_t((bits_of(value) + noise) >> 16) : uint16_t(0x7fc0);
}

// 32 random bits of an element in a step, the same wherever they are computed.
SAEMNESIA_INLINE uint32_t noise_of(int64_t element, uint32_t step) {
  uint32_t h = uint32_t(element) * 0x9e3779b1u + uint32_t(uint64_t(element) >> 32) * 0x7feb352du + step * 0x85ebca77u;
  h = (h ^ h >> 15) * 0x2c1b3c6du;
  h = (h ^ h >> 12) * 0x297a2d39u;
  return h ^ h >> 15;
}

// Moments in 16 bits are rounded at random: to the nearest, a decay by 0.1 % would never take place.
template <typename T, bool Short>
SAEMNESIA_INLINE void adam_element(const AdamJob<T>& job, int64_t i, T gradient) {
  T m, v;
  uint16_t* const short_m = static_cast<uint16_t*>(job.exp_avg);
  uint16_t* const short_v = static_cast<uint16_t*>(job.exp_avg_sq);
  T* const long_m = static_cast<T*>(job.exp_avg);
  T* const long_v = static_cast<T*>(job.exp_avg_sq);
  if (Short) {
    m = float_of(uint32_t(short_m[i]) << 16);
    v = float_of(uint32_t(short_v[i]) << 16);
  } else {
    m = long_m[i];
    v = long_v[i];
  }
  m += (1 - job.beta1) * (gradient - m);
  v = job.beta2 * v + (1 - job.beta2) * (gradient * gradient);
  if (Short) {
    const uint32_t noise = noise_of(i, job.step);
    short_m[i] = to_bfloat16(float(m), noise & 0xffff);
    short_v[i] = to_bfloat16(float(v), noise >> 16);
  } else {
    long_m[i] = m;
    long_v[i] = v;
  }
  job.W[i] -= job.step_size * m / (square_root(v) * job.inverse_root + job.eps);
}

// g = scale * grad, less its part along the row; Adam; the row at unit length; its shadow. A row of zeros has no
// direction and keeps its length.
template <typename Lanes, typename T>
SAEMNESIA_INLINE void adam_row(const Lanes& lanes, const AdamJob<T>& job, const T* grad, int64_t row) {
  const int64_t d = job.d, first = row * d;
  T* const W = job.W + first;
  const T scale = job.scale ? *job.scale : T(1);
  if (scale != scale) {
    return;
  }
  T along = 0;
  if (job.remove_parallel) {
    const T squared = dot(lanes, W, W, d);
    along = squared > 0 ? scale * dot(lanes, grad, W, d) / squared : T(0);
  }
  if (job.short_moments) {
    lanes.each(d, [&](int64_t c) { adam_element<T, true>(job, first + c, scale * grad[c] - along * W[c]); });
  } else {
    lanes.each(d, [&](int64_t c) { adam_element<T, false>(job, first + c, scale * grad[c] - along * W[c]); });
  }
  if (job.unit_norm) {
    lanes.sync();
    const T norm = square_root(dot(lanes, W, W, d));
    lanes.sync();
    if (norm > 0) {
      lanes.each(d, [&](int64_t c) { W[c] /= norm; });
    }
  }
  uint16_t* const shadow = job.shadow + first;
  if (job.shadow_type == Shadow::Float16) {
    lanes.each(d, [&](int64_t c) { shadow[c] = to_float16(float(W[c])); });
  } else if (job.shadow_type == Shadow::BFloat16) {
    lanes.each(d, [&](int64_t c) { shadow[c] = to_bfloat16(float(W[c])); });
  }
}

}  // namespace saemnesia_fast
