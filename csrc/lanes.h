// What host and device have in common: numbers side by side, and sums over d in one order.
//
// A `Lanes` says how a row of d numbers is dealt out. On the device a thread of a warp holds four neighbouring channels
// of every kDotLanes; on the host one thread holds them all in vectors. It has
//   Strip, kStrip     what a thread holds of channels summed side by side, at[kCount], and how many these are in all
//   DotStrip          the same of kDotLanes channels
//   load<S>(row, c, d)  the strip of `row` from channel c, widened; zeros from channel d on
//   store(row, c, d, strip)
//   total(DotStrip)   the sum over all kDotLanes partial sums, the same in every thread
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

#if defined(__CUDACC__)
#define SAEMNESIA_INLINE __device__ __forceinline__
#define SAEMNESIA_UNROLL _Pragma("unroll")
#else
#define SAEMNESIA_INLINE inline __attribute__((always_inline))
#define SAEMNESIA_UNROLL _Pragma("GCC unroll 32")
#endif

namespace saemnesia_fast {

SAEMNESIA_INLINE float square_root(float value) { return sqrtf(value); }
SAEMNESIA_INLINE double square_root(double value) { return sqrt(value); }

// A sum over d is one of so many partial sums, each over every kDotLanes-th channel in order.
constexpr int kDotLanes = 128;

// At most so many neighbours share a scale (adam_rows.h).
constexpr int kMostBlock = 256;

template <typename S>
SAEMNESIA_INLINE S plus(const S& a, const S& b) {
  S sum;
  SAEMNESIA_UNROLL
  for (int i = 0; i < S::kCount; ++i) {
    sum.at[i] = a.at[i] + b.at[i];
  }
  return sum;
}

template <typename S>
SAEMNESIA_INLINE S minus(const S& a, const S& b) {
  S difference;
  SAEMNESIA_UNROLL
  for (int i = 0; i < S::kCount; ++i) {
    difference.at[i] = a.at[i] - b.at[i];
  }
  return difference;
}

// sum += a * b, number by number
template <typename S>
SAEMNESIA_INLINE void add_product(S& sum, const S& a, const S& b) {
  SAEMNESIA_UNROLL
  for (int i = 0; i < S::kCount; ++i) {
    sum.at[i] += a.at[i] * b.at[i];
  }
}

template <typename S, typename T>
SAEMNESIA_INLINE void add_scaled(S& sum, T factor, const S& strip) {
  SAEMNESIA_UNROLL
  for (int i = 0; i < S::kCount; ++i) {
    sum.at[i] += factor * strip.at[i];
  }
}

// <a, b>
template <typename Lanes, typename A, typename B>
SAEMNESIA_INLINE auto dot(const Lanes& lanes, const A* a, const B* b, int64_t d) {
  using S = typename Lanes::DotStrip;
  S sum = {};
  for (int64_t c = 0; c < d; c += kDotLanes) {
    add_product(sum, lanes.template load<S>(a, c, d), lanes.template load<S>(b, c, d));
  }
  return lanes.total(sum);
}

}  // namespace saemnesia_fast
