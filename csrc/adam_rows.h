// The loop of adam_rows (SPEC 4.1), for host and device: one row of a parameter, in place.
//
// Beyond lanes.h, a `Lanes` has
//   each(d, f)        calls f(c) for every channel in some thread
//   each_held(n, f)   calls f(c, h) for each of n <= kMostBlock channels, h being its place among the kHeldOfBlock that
//                     its thread holds, in every such loop the same
//   largest(number)   the largest of all threads' numbers
//   sync()            after which all threads see what each other wrote
#pragma once

#include "eight_bit.h"

namespace saemnesia_fast {

enum class Shadow : int32_t { None, Float16, BFloat16 };
enum class MomentType : int32_t { Wide, BFloat16, EightBit };

// One of Adam's two; `scale` of each block where it is in 8 bits.
struct Moment {
  void* data;
  float* scale;
};

template <typename T>
struct AdamJob {
  T* W;
  Moment exp_avg;
  Moment exp_avg_sq;
  MomentType moments;
  int64_t block;
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

// m, v and the weight of element i.
template <typename T>
SAEMNESIA_INLINE void adam_element(const AdamJob<T>& job, int64_t i, T gradient, T& m, T& v) {
  m += (1 - job.beta1) * (gradient - m);
  v = job.beta2 * v + (1 - job.beta2) * (gradient * gradient);
  job.W[i] -= job.step_size * m / (square_root(v) * job.inverse_root + job.eps);
}

template <typename T>
SAEMNESIA_INLINE void adam_wide(const AdamJob<T>& job, int64_t i, T gradient) {
  T* const all_m = static_cast<T*>(job.exp_avg.data);
  T* const all_v = static_cast<T*>(job.exp_avg_sq.data);
  T m = all_m[i], v = all_v[i];
  adam_element(job, i, gradient, m, v);
  all_m[i] = m;
  all_v[i] = v;
}

// Rounded at random: to the nearest, a decay by 0.1 % would never take place.
template <typename T>
SAEMNESIA_INLINE void adam_bfloat16(const AdamJob<T>& job, int64_t i, T gradient) {
  uint16_t* const all_m = static_cast<uint16_t*>(job.exp_avg.data);
  uint16_t* const all_v = static_cast<uint16_t*>(job.exp_avg_sq.data);
  T m = float_of(uint32_t(all_m[i]) << 16), v = float_of(uint32_t(all_v[i]) << 16);
  adam_element(job, i, gradient, m, v);
  const uint32_t noise = noise_of(i, job.step);
  all_m[i] = to_bfloat16(float(m), noise & 0xffff);
  all_v[i] = to_bfloat16(float(v), noise >> 16);
}

// The scale of a block whose largest magnitude this is, as bits.
SAEMNESIA_INLINE float block_scale(uint32_t most) {
  constexpr float kLeast = 1e-12f;
  return float_of(most) < kLeast ? kLeast : float_of(most);
}

// gradient(c) is that of channel c of the row that begins at element `first`.
template <typename Lanes, typename T, typename Gradient>
SAEMNESIA_INLINE void adam_eight_bit(const Lanes& lanes, const AdamJob<T>& job, int64_t first,
                                     const Gradient& gradient) {
  const int64_t block = job.block;
  for (int64_t begin = 0; begin < job.d; begin += block) {
    const int64_t from = first + begin;
    uint8_t* const codes_m = static_cast<uint8_t*>(job.exp_avg.data) + from;
    uint8_t* const codes_v = static_cast<uint8_t*>(job.exp_avg_sq.data) + from;
    float* const scale_m = job.exp_avg.scale + from / block;
    float* const scale_v = job.exp_avg_sq.scale + from / block;
    const float old_m = *scale_m, old_v = *scale_v;
    float held_m[Lanes::kHeldOfBlock], held_v[Lanes::kHeldOfBlock];
    uint32_t most_m = 0, most_v = 0;
    lanes.each_held(block, [&](int64_t c, int64_t h) {
      T m = decode<true>(codes_m[c]) * old_m, v = decode<false>(codes_v[c]) * old_v;
      adam_element(job, from + c, gradient(begin + c), m, v);
      held_m[h] = float(m);
      held_v[h] = float(v);
      const uint32_t size_m = bits_of(held_m[h]) & 0x7fffffff, size_v = bits_of(held_v[h]) & 0x7fffffff;
      most_m = size_m > most_m ? size_m : most_m;
      most_v = size_v > most_v ? size_v : most_v;
    });
    const float new_m = block_scale(lanes.largest(most_m)), new_v = block_scale(lanes.largest(most_v));
    const float up_m = 1 / new_m, up_v = 1 / new_v;
    lanes.each_held(block, [&](int64_t c, int64_t h) {
      codes_m[c] = uint8_t(encode<true>(held_m[h] * up_m));
      codes_v[c] = uint8_t(encode<false>(held_v[h] * up_v));
    });
    lanes.each_held(1, [&](int64_t, int64_t) {
      *scale_m = new_m;
      *scale_v = new_v;
    });
  }
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
  const auto gradient = [&](int64_t c) { return scale * grad[c] - along * W[c]; };
  if (job.moments == MomentType::EightBit) {
    adam_eight_bit(lanes, job, first, gradient);
  } else if (job.moments == MomentType::BFloat16) {
    lanes.each(d, [&](int64_t c) { adam_bfloat16(job, first + c, gradient(c)); });
  } else {
    lanes.each(d, [&](int64_t c) { adam_wide(job, first + c, gradient(c)); });
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
