// A 16-bit screen of pre-activations: sums of int16 products, and how far they can be from what `Kernels::multiply`
// computes.
#pragma once

#include "storage.h"

namespace saemnesia_fast {

// A token x (less b_dec) and a row w of W are rounded to x' = s_x q_x and w' = s_w q_w with q in int16, so that
// |q_x| |q_w| < 2^31: by Cauchy-Schwarz the int32 sum of their products does not overflow. With u = 2^-24,
//
//   |<x, w> - <x', w'>| <= |x| |w - w'| + |x - x'| |w'|           (Cauchy-Schwarz, norms as measured)
//   |product in float32 - <x, w>| <= 1.01 (kBlock + blocks) u |x| |w|   (so many roundings on the way of a term)
//   adding the bias in float32 rounds by <= u (|x| |w| + |bias|)
//   converting, scaling and adding the screen's numbers rounds by <= 5 u (|x'| |w'| + bound) + 2 u |bias|
//
// and all of it is less than factor_x factor_w + 2^-21 |bias| with any c > 0 and
//
//   factor_w = max(|w|, |w'|, |w - w'| / c)     factor_x = (c + (kBlock + blocks + 16) u) |x| + |x - x'|
//
// each enlarged by more than the norms' own rounding, (d + 3) u. Numbers whose squares are lost below float32's range
// are worth less than kLeast in a norm; kLeast^2 exceeds all that products can lose there.
constexpr int64_t kPanel = 32;
constexpr int64_t kScreenedChannels = 8192;
constexpr float kScreenedMost = 0x1p40f;
constexpr float kScreenedBias = 0x1p100f;
constexpr float kLeast = 0x1p-50f;
constexpr float kBiasSlack = 0x1p-21f;

// Screened rows or tokens: what undoes their rounding's scale, and their factor of the bound.
struct Scales {
  float* scale;
  float* factor;
};

// d <= kScreenedChannels.
struct ScreenKernels {
  int64_t tile;

  // panel [d, kPanel], as `Kernels::pack` makes it, to pairs [ceil(d / 2), kPanel] of neighbouring channels. Lanes with
  // NaN or numbers beyond kScreenedMost are void.
  void (*round_panel)(int32_t* pairs, Scales tokens, const float* panel, int64_t d);

  // W[first], ..., W[first + count - 1] to rows [ceil(d / 2 / kBlock), capacity, kBlockStride] of pairs; `row` is room
  // for d + 32 numbers. False if one has NaN or numbers beyond kScreenedMost.
  bool (*round_rows)(int32_t* rows, Scales latents, float* row, const void* W, Storage storage, int64_t first,
                     int64_t count, int64_t capacity, int64_t d);

  // The r and l, as r * kPanel + l, and upper bounds on the pre-activations where these exceed floors[l]; returns how
  // many. `sums` is room for [tiles * tile, kPanel]; bias[r] includes kBiasSlack.
  int64_t (*screen)(int32_t* where, float* upper, int32_t* sums, const int32_t* rows, const int32_t* pairs,
                    Scales latents, Scales tokens, const float* bias, const float* floors, int64_t tiles, int64_t d);

  // <W[index], token>, with the bits of `Kernels::multiply`; token [blocks in sixteens, kBlock, 16], zeros beyond d;
  // `row` is room for d + kBlock numbers.
  float (*product)(const float* token, float* row, const void* W, Storage storage, int64_t index, int64_t d);
};

}  // namespace saemnesia_fast
