// The screen (screen.h) by vpdpwssd: 32 products of int16 an instruction.
#if defined(__x86_64__)
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop
#else
#include <immintrin.h>
#endif
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,fma"))), \
                             apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,fma,prefer-vector-width=512")
#endif

#include "kernels.h"

namespace saemnesia_fast {
namespace avx512vnni {
namespace {

constexpr int64_t kTile = 14;
// More than norms of kScreenedChannels numbers are rounded by, and what is made of them.
constexpr float kEnlarged = 1 + 0x1p-9f;
// q stays below 2^15 and, rounding by 1/2 included, |q| below 2^15.5 = 46340.
constexpr float kMostNumber = 32700;
constexpr float kMostNorm = 46000;
constexpr float kLeastScale = 0x1p-56f;

// What the factors need of d: c, near what |w - w'| / |w| is, and the rounding of float32.
struct Shape {
  explicit Shape(int64_t d)
      : root(__builtin_sqrtf(float(d))),
        c(root * 0x1p-17f),
        rounding(float(kBlock + (d + kBlock - 1) / kBlock + 16) * 0x1p-24f) {}
  float root;
  float c;
  float rounding;
};

struct Norm {
  void add(__m512 x) {
    most = _mm512_max_ps(most, _mm512_abs_ps(x));
    squares = _mm512_fmadd_ps(x, x, squares);
  }

  __m512 most;
  __m512 squares;
};

__m512 enlarged_root(__m512 squares) { return _mm512_mul_ps(_mm512_sqrt_ps(squares), _mm512_set1_ps(kEnlarged)); }

__m512 scale_for(__m512 norm, __m512 most, const Shape& shape) {
  const __m512 by_norm = _mm512_div_ps(norm, _mm512_set1_ps(kMostNorm - shape.root));
  const __m512 by_most = _mm512_div_ps(most, _mm512_set1_ps(kMostNumber));
  return _mm512_max_ps(_mm512_max_ps(by_norm, by_most), _mm512_set1_ps(kLeastScale));
}

// q, and to `errors` the square of x - scale q.
__m512i round_number(__m512 x, __m512 scale, __m512 inverse, __m512& errors) {
  const __m512i q = _mm512_cvtps_epi32(_mm512_mul_ps(x, inverse));
  const __m512 error = _mm512_fnmadd_ps(scale, _mm512_cvtepi32_ps(q), x);
  errors = _mm512_fmadd_ps(error, error, errors);
  return q;
}

void round_panel(int32_t* pairs, Scales tokens, const float* panel, int64_t d) {
  const Shape shape(d);
  const __m512i low_half = _mm512_set1_epi32(0xffff);
  for (int64_t half = 0; half < kPanel; half += 16) {
    Norm norm = {};
    for (int64_t c = 0; c < d; ++c) {
      norm.add(_mm512_load_ps(panel + c * kPanel + half));
    }
    const __m512 root = enlarged_root(norm.squares);
    const __m512 scale = scale_for(root, norm.most, shape), inverse = _mm512_div_ps(_mm512_set1_ps(1), scale);
    __m512 errors = _mm512_setzero_ps();
    for (int64_t c = 0; c < d; c += 2) {
      const __m512 next = c + 1 < d ? _mm512_load_ps(panel + (c + 1) * kPanel + half) : _mm512_setzero_ps();
      const __m512i low = round_number(_mm512_load_ps(panel + c * kPanel + half), scale, inverse, errors);
      const __m512i high = round_number(next, scale, inverse, errors);
      _mm512_store_si512(pairs + c / 2 * kPanel + half,
                         _mm512_or_si512(_mm512_and_si512(low, low_half), _mm512_slli_epi32(high, 16)));
    }
    const __m512 least = _mm512_set1_ps(kLeast);
    const __m512 factor = _mm512_fmadd_ps(_mm512_set1_ps((shape.c + shape.rounding) * kEnlarged),
                                          _mm512_add_ps(root, least), _mm512_add_ps(enlarged_root(errors), least));
    const __mmask16 any = _mm512_cmp_ps_mask(norm.most, _mm512_setzero_ps(), _CMP_NEQ_UQ);
    _mm512_store_ps(tokens.scale + half, scale);
    _mm512_store_ps(tokens.factor + half, _mm512_maskz_mul_ps(any, factor, _mm512_set1_ps(kEnlarged)));
  }
}

// row[0], ..., row[d - 1], and zeros up to a multiple of 32.
void read_row(float* row, const void* W, Storage storage, int64_t index, int64_t d) {
  with_elements(W, storage, [&](auto weights) {
    const auto* elements = weights + index * d;
    for (int64_t c = 0; c < d; ++c) {
      row[c] = float(widen(elements[c]));
    }
  });
  for (int64_t c = d; c % 32; ++c) {
    row[c] = 0;
  }
}

bool round_row(int16_t* blocks, int64_t block_stride, float* scale_out, float* factor, const float* row, int64_t d,
               const Shape& shape) {
  Norm norm[2] = {};
  for (int64_t c = 0; c < d; c += 32) {
    norm[0].add(_mm512_load_ps(row + c));
    norm[1].add(_mm512_load_ps(row + c + 16));
  }
  const float squares = _mm512_reduce_add_ps(_mm512_add_ps(norm[0].squares, norm[1].squares));
  const float most = _mm512_reduce_max_ps(_mm512_max_ps(norm[0].most, norm[1].most));
  if (!(squares < __builtin_inff()) || most > kScreenedMost) {
    return false;
  }
  const __m512 root = enlarged_root(_mm512_set1_ps(squares));
  const __m512 scale = scale_for(root, _mm512_set1_ps(most), shape);
  const __m512 inverse = _mm512_div_ps(_mm512_set1_ps(1), scale);
  __m512 errors[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
  for (int64_t c = 0; c < d; c += 32) {
    int16_t* const block = blocks + c / (2 * kBlock) * block_stride + c % (2 * kBlock);
    for (int64_t half = 0; half < 2; ++half) {
      const __m512i q = round_number(_mm512_load_ps(row + c + 16 * half), scale, inverse, errors[half]);
      _mm256_store_si256(reinterpret_cast<__m256i*>(block + 16 * half), _mm512_cvtepi32_epi16(q));
    }
  }
  const float error = _mm512_reduce_add_ps(_mm512_add_ps(errors[0], errors[1]));
  const float off = __builtin_sqrtf(error) * kEnlarged + kLeast;
  const float length = _mm512_cvtss_f32(root) + off;
  *scale_out = _mm512_cvtss_f32(scale);
  *factor = most == 0 ? 0 : (length * shape.c > off ? length : off / shape.c) * kEnlarged;
  return true;
}

bool round_rows(int32_t* rows, Scales latents, float* row, const void* W, Storage storage, int64_t first,
                int64_t count, int64_t capacity, int64_t d) {
  const Shape shape(d);
  bool ordinary = true;
  for (int64_t r = 0; r < count && ordinary; ++r) {
    read_row(row, W, storage, first + r, d);
    int16_t* const blocks = reinterpret_cast<int16_t*>(rows + r * kBlockStride);
    ordinary = round_row(blocks, 2 * capacity * kBlockStride, latents.scale + r, latents.factor + r, row, d, shape);
  }
  return ordinary;
}

// One block of one register tile: sums[r, l] += the products of `size` pairs.
inline __attribute__((always_inline)) void multiply_tile(int32_t* sums, const int32_t* rows, const int32_t* pairs,
                                                         int64_t size, bool first) {
  __m512i acc[kTile][2];
#pragma GCC unroll 16
  for (int64_t r = 0; r < kTile; ++r) {
    acc[r][0] = first ? _mm512_setzero_si512() : _mm512_load_si512(sums + r * kPanel);
    acc[r][1] = first ? _mm512_setzero_si512() : _mm512_load_si512(sums + r * kPanel + 16);
  }
  for (int64_t p = 0; p < size; ++p) {
    const __m512i low = _mm512_load_si512(pairs + p * kPanel), high = _mm512_load_si512(pairs + p * kPanel + 16);
#pragma GCC unroll 16
    for (int64_t r = 0; r < kTile; ++r) {
      const __m512i weights = _mm512_set1_epi32(rows[r * kBlockStride + p]);
      acc[r][0] = _mm512_dpwssd_epi32(acc[r][0], low, weights);
      acc[r][1] = _mm512_dpwssd_epi32(acc[r][1], high, weights);
    }
  }
#pragma GCC unroll 16
  for (int64_t r = 0; r < kTile; ++r) {
    _mm512_store_si512(sums + r * kPanel, acc[r][0]);
    _mm512_store_si512(sums + r * kPanel + 16, acc[r][1]);
  }
}

int64_t screen(int32_t* where, float* upper, int32_t* sums, const int32_t* rows, const int32_t* pairs, Scales latents,
               Scales tokens, const float* bias, const float* floors, int64_t tiles, int64_t d) {
  const int64_t count = tiles * kTile, all = (d + 1) / 2;
  for (int64_t begin = 0; begin < all; begin += kBlock) {
    const int64_t size = begin + kBlock < all ? kBlock : all - begin;
    for (int64_t t = 0; t < tiles; ++t) {
      const int32_t* tile = rows + (begin / kBlock * count + t * kTile) * kBlockStride;
      multiply_tile(sums + t * kTile * kPanel, tile, pairs + begin * kPanel, size, begin == 0);
    }
  }
  const __m512i lane = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  int64_t found = 0;
  for (int64_t half = 0; half < kPanel; half += 16) {
    const __m512 scale = _mm512_load_ps(tokens.scale + half), factor = _mm512_load_ps(tokens.factor + half);
    const __m512 floor = _mm512_load_ps(floors + half);
    for (int64_t r = 0; r < count; ++r) {
      const __m512 sum = _mm512_cvtepi32_ps(_mm512_load_si512(sums + r * kPanel + half));
      const __m512 product = _mm512_mul_ps(sum, _mm512_set1_ps(latents.scale[r]));
      const __m512 pre = _mm512_fmadd_ps(product, scale, _mm512_set1_ps(bias[r]));
      const __m512 bound = _mm512_fmadd_ps(factor, _mm512_set1_ps(latents.factor[r]), pre);
      const __mmask16 above = _mm512_cmp_ps_mask(bound, floor, _CMP_GT_OQ);
      if (above) {
        const __m512i places = _mm512_add_epi32(lane, _mm512_set1_epi32(int32_t(r * kPanel + half)));
        _mm512_storeu_si512(where + found, _mm512_maskz_compress_epi32(above, places));
        _mm512_storeu_ps(upper + found, _mm512_maskz_compress_ps(above, bound));
        found += __builtin_popcount(above);
      }
    }
  }
  return found;
}

// columns[i][b] = rows[b][i]
inline __attribute__((always_inline)) void transpose(__m512* columns, const __m512* rows) {
  __m512 fours[16], eights[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; i += 4) {
    const __m512d a = _mm512_castps_pd(_mm512_unpacklo_ps(rows[i], rows[i + 1]));
    const __m512d b = _mm512_castps_pd(_mm512_unpackhi_ps(rows[i], rows[i + 1]));
    const __m512d c = _mm512_castps_pd(_mm512_unpacklo_ps(rows[i + 2], rows[i + 3]));
    const __m512d e = _mm512_castps_pd(_mm512_unpackhi_ps(rows[i + 2], rows[i + 3]));
    fours[i] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, c));
    fours[i + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, c));
    fours[i + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(b, e));
    fours[i + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(b, e));
  }
#pragma GCC unroll 16
  for (int j = 0; j < 4; ++j) {
    eights[j] = _mm512_shuffle_f32x4(fours[j], fours[4 + j], 0x88);
    eights[4 + j] = _mm512_shuffle_f32x4(fours[j], fours[4 + j], 0xdd);
    eights[8 + j] = _mm512_shuffle_f32x4(fours[8 + j], fours[12 + j], 0x88);
    eights[12 + j] = _mm512_shuffle_f32x4(fours[8 + j], fours[12 + j], 0xdd);
  }
#pragma GCC unroll 16
  for (int j = 0; j < 4; ++j) {
    columns[j] = _mm512_shuffle_f32x4(eights[j], eights[8 + j], 0x88);
    columns[8 + j] = _mm512_shuffle_f32x4(eights[j], eights[8 + j], 0xdd);
    columns[4 + j] = _mm512_shuffle_f32x4(eights[4 + j], eights[12 + j], 0x88);
    columns[12 + j] = _mm512_shuffle_f32x4(eights[4 + j], eights[12 + j], 0xdd);
  }
}

float product(const float* token, float* row, const void* W, Storage storage, int64_t index, int64_t d) {
  const int64_t blocks = (d + kBlock - 1) / kBlock;
  const float* numbers = static_cast<const float*>(W) + index * d;
  if (storage != Storage::Float32 || d % kBlock) {
    read_row(row, W, storage, index, d);
    for (int64_t c = (d + 31) / 32 * 32; c < blocks * kBlock; ++c) {
      row[c] = 0;
    }
    numbers = row;
  }
  float total = 0;
  for (int64_t first = 0; first < blocks; first += 16, token += kBlock * 16) {
    const int64_t some = first + 16 < blocks ? 16 : blocks - first;
    const float* starts[16];
    for (int64_t b = 0; b < 16; ++b) {
      starts[b] = numbers + (first + (b < some ? b : 0)) * kBlock;
    }
    __m512 acc = _mm512_setzero_ps();
    for (int64_t c = 0; c < kBlock; c += 16) {
      __m512 rows[16], columns[16];
#pragma GCC unroll 16
      for (int64_t b = 0; b < 16; ++b) {
        rows[b] = _mm512_loadu_ps(starts[b] + c);
      }
      transpose(columns, rows);
#pragma GCC unroll 16
      for (int64_t i = 0; i < 16; ++i) {
        acc = _mm512_fmadd_ps(columns[i], _mm512_load_ps(token + (c + i) * 16), acc);
      }
    }
    alignas(64) float sums[16];
    _mm512_store_ps(sums, acc);
    for (int64_t b = 0; b < some; ++b) {
      total = first + b == 0 ? sums[0] : total + sums[b];
    }
  }
  return total;
}

}  // namespace

extern const ScreenKernels kScreen = {kTile, round_panel, round_rows, screen, product};

}  // namespace avx512vnni
}  // namespace saemnesia_fast
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
