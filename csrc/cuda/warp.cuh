// The lanes of a warp (lanes.h): a thread holds four neighbouring channels of every kDotLanes.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "../lanes.h"

namespace saemnesia_fast {

constexpr int kWarp = 32;
constexpr int kHeld = kDotLanes / kWarp;
constexpr unsigned kAll = 0xffffffffu;

__device__ __forceinline__ float widen(float value) { return value; }
__device__ __forceinline__ double widen(double value) { return value; }
__device__ __forceinline__ float widen(__half value) { return __half2float(value); }
__device__ __forceinline__ float widen(__nv_bfloat16 value) { return __bfloat162float(value); }

template <typename A>
struct alignas(kHeld * sizeof(A)) Packed {
  A at[kHeld];
};

template <typename T>
struct Warp {
  struct Strip {
    static constexpr int kCount = kHeld;
    T at[kCount];
  };
  using DotStrip = Strip;
  static constexpr int64_t kStrip = kDotLanes;

  int lane;
  // Whether all rows begin at a multiple of kHeld numbers, and d is one.
  bool packed;

  template <typename S, typename A>
  __device__ __forceinline__ S load(const A* row, int64_t c, int64_t d) const {
    S strip = {};
    const int64_t first = c + kHeld * lane;
    if (packed && first < d) {
      const Packed<A> held = *reinterpret_cast<const Packed<A>*>(row + first);
      SAEMNESIA_UNROLL
      for (int i = 0; i < kHeld; ++i) {
        strip.at[i] = T(widen(held.at[i]));
      }
    } else {
      SAEMNESIA_UNROLL
      for (int i = 0; i < kHeld; ++i) {
        strip.at[i] = first + i < d ? T(widen(row[first + i])) : T(0);
      }
    }
    return strip;
  }

  __device__ __forceinline__ void store(T* row, int64_t c, int64_t d, const Strip& strip) const {
    const int64_t first = c + kHeld * lane;
    if (packed && first < d) {
      Packed<T> held;
      SAEMNESIA_UNROLL
      for (int i = 0; i < kHeld; ++i) {
        held.at[i] = strip.at[i];
      }
      *reinterpret_cast<Packed<T>*>(row + first) = held;
    } else {
      SAEMNESIA_UNROLL
      for (int i = 0; i < kHeld; ++i) {
        if (first + i < d) {
          row[first + i] = strip.at[i];
        }
      }
    }
  }

  __device__ __forceinline__ T total(const Strip& strip) const {
    T sum = (strip.at[0] + strip.at[1]) + (strip.at[2] + strip.at[3]);
    SAEMNESIA_UNROLL
    for (int half = kWarp / 2; half > 0; half /= 2) {
      sum += __shfl_xor_sync(kAll, sum, half);
    }
    return sum;
  }

  template <typename Use>
  __device__ __forceinline__ void each(int64_t d, const Use& use) const {
    for (int64_t c = lane; c < d; c += kWarp) {
      use(c);
    }
  }

  static constexpr int kHeldOfBlock = kMostBlock / kWarp;

  template <typename Use>
  __device__ __forceinline__ void each_held(int64_t count, const Use& use) const {
    SAEMNESIA_UNROLL
    for (int h = 0; h < kHeldOfBlock; ++h) {
      if (h * kWarp + lane < count) {
        use(int64_t(h * kWarp + lane), h);
      }
    }
  }

  __device__ __forceinline__ uint32_t largest(uint32_t number) const {
    SAEMNESIA_UNROLL
    for (int half = kWarp / 2; half > 0; half /= 2) {
      const uint32_t other = __shfl_xor_sync(kAll, number, half);
      number = number > other ? number : other;
    }
    return number;
  }

  __device__ __forceinline__ void sync() const { __syncwarp(); }
};

}  // namespace saemnesia_fast
