// The kernels of one instruction set. Define INSTRUCTION_SET (a namespace), VECTOR_BYTES and TILE before including.
#include "kernels.h"

namespace saemnesia_fast {
namespace INSTRUCTION_SET {
namespace {

template <typename T>
using Vector __attribute__((vector_size(VECTOR_BYTES))) = T;

template <typename T>
constexpr int64_t kWidth = VECTOR_BYTES / sizeof(T);

template <typename T>
constexpr int64_t kLanes = 2 * kWidth<T>;

template <typename T>
void pack(T* panel, const void* data, Storage storage, const int64_t* offsets, int64_t count, int64_t stride,
          const T* shift, int64_t d) {
  constexpr int64_t L = kLanes<T>;
  constexpr int64_t kCached = 64;
  if (count < L) {
    __builtin_memset(panel, 0, d * L * sizeof(T));
  }
  bool adjacent = true;
  for (int64_t l = 1; l < count; ++l) {
    adjacent = adjacent && offsets[l] == offsets[0] + l;
  }
  with_elements(data, storage, [&](auto x) {
    if (adjacent) {
      for (int64_t c = 0; c < d; ++c) {
        const auto* row = x + offsets[0] + c * stride;
        for (int64_t l = 0; l < count; ++l) {
          panel[c * L + l] = T(widen(row[l])) - shift[c];
        }
      }
      return;
    }
    for (int64_t begin = 0; begin < d; begin += kCached) {
      const int64_t end = begin + kCached < d ? begin + kCached : d;
      for (int64_t l = 0; l < count; ++l) {
        const auto* token = x + offsets[l];
        for (int64_t c = begin; c < end; ++c) {
          panel[c * L + l] = T(widen(token[c * stride])) - shift[c];
        }
      }
    }
  });
}

template <typename T>
void check(const T* panel, int64_t d, T limit, uint8_t* exceeds) {
  constexpr int64_t L = kLanes<T>;
  for (int64_t l = 0; l < L; ++l) {
    exceeds[l] = 0;
  }
  for (int64_t c = 0; c < d; ++c) {
    for (int64_t l = 0; l < L; ++l) {
      exceeds[l] |= !(panel[c * L + l] <= limit) | !(panel[c * L + l] >= -limit);
    }
  }
}

template <typename T>
void load_rows(T* rows, const void* W, Storage storage, const int64_t* which, int64_t count, int64_t d) {
  with_elements(W, storage, [&](auto weights) {
    for (int64_t r = 0; r < count; ++r) {
      const auto* row = weights + which[r] * d;
      for (int64_t begin = 0; begin < d; begin += kBlock) {
        T* block = rows + (begin / kBlock * count + r) * kBlockStride;
        const int64_t size = begin + kBlock < d ? kBlock : d - begin;
        for (int64_t c = 0; c < size; ++c) {
          block[c] = T(widen(row[begin + c]));
        }
      }
    }
  });
}

// One block of one register tile: sums[r, l] (+)= sum over `size` of d.
template <typename T>
inline __attribute__((always_inline)) void multiply_tile(Vector<T> (*sums)[2], const T* rows, const T* panel,
                                                         int64_t size, bool first) {
  Vector<T> acc[TILE][2] = {};
  const Vector<T>* tokens = reinterpret_cast<const Vector<T>*>(panel);
  for (int64_t c = 0; c < size; ++c) {
    const Vector<T> low = tokens[2 * c], high = tokens[2 * c + 1];
#pragma GCC unroll 16
    for (int64_t r = 0; r < TILE; ++r) {
      const T weight = rows[r * kBlockStride + c];
      acc[r][0] += weight * low;
      acc[r][1] += weight * high;
    }
  }
#pragma GCC unroll 16
  for (int64_t r = 0; r < TILE; ++r) {
    sums[r][0] = first ? acc[r][0] : sums[r][0] + acc[r][0];
    sums[r][1] = first ? acc[r][1] : sums[r][1] + acc[r][1];
  }
}

template <typename T>
void multiply(T* pre, T* maxima, T* poison, const T* rows, const T* panel, const T* bias, int64_t tiles, int64_t d) {
  const int64_t count = tiles * TILE;
  auto sums = reinterpret_cast<Vector<T>(*)[2]>(pre);
  for (int64_t begin = 0; begin < d; begin += kBlock) {
    const int64_t size = begin + kBlock < d ? kBlock : d - begin;
    for (int64_t t = 0; t < tiles; ++t) {
      const T* tile = rows + (begin / kBlock * count + t * TILE) * kBlockStride;
      multiply_tile<T>(sums + t * TILE, tile, panel + begin * kLanes<T>, size, begin == 0);
    }
  }
  auto most = reinterpret_cast<Vector<T>(*)[2]>(maxima);
  auto poisoned = reinterpret_cast<Vector<T>*>(poison);
  for (int64_t t = 0; t < tiles; ++t) {
    for (int64_t half = 0; half < 2; ++half) {
      Vector<T> largest = {};
      for (int64_t r = t * TILE; r < (t + 1) * TILE; ++r) {
        const Vector<T> sum = sums[r][half] + bias[r];
        const Vector<T> value = sum < 0 ? Vector<T>{} : sum;
        sums[r][half] = value;
        largest = value > largest ? value : largest;
        poisoned[half] += value - value;
      }
      most[t][half] = largest;
    }
  }
}

template <typename T, typename Element>
inline Vector<T> read(const Element* elements) {
  T wide[kWidth<T>];
  for (int64_t i = 0; i < kWidth<T>; ++i) {
    wide[i] = T(widen(elements[i]));
  }
  Vector<T> values;
  __builtin_memcpy(&values, wide, sizeof values);
  return values;
}

// sum[c] for `Vectors` vectors of columns from `begin`, while later rows are fetched.
template <int Vectors, typename T, typename Row>
inline __attribute__((always_inline)) void sum_columns(T* sum, const T* weights, const void* const* rows, int64_t count,
                                                       int64_t begin, Row) {
  constexpr int64_t kAhead = 3;
  constexpr int64_t kBytes = Vectors * kWidth<T> * sizeof(*Row());
  Vector<T> acc[Vectors] = {};
  for (int64_t j = 0; j < count; ++j) {
    const Row row = static_cast<Row>(rows[j]) + begin;
    const Row ahead = static_cast<Row>(rows[j + kAhead < count ? j + kAhead : j]) + begin;
    for (int64_t byte = 0; byte < kBytes; byte += 64) {
      __builtin_prefetch(reinterpret_cast<const char*>(ahead) + byte);
    }
#pragma GCC unroll 20
    for (int64_t v = 0; v < Vectors; ++v) {
      acc[v] += weights[j] * read<T>(row + v * kWidth<T>);
    }
  }
  __builtin_memcpy(sum + begin, acc, sizeof acc);
}

template <typename T>
void sum_rows(T* sum, const T* weights, const void* const* rows, int64_t count, Storage storage, int64_t d) {
  constexpr int64_t W = kWidth<T>;
  constexpr int kMost = VECTOR_BYTES == 64 ? 20 : 10;
  with_elements(nullptr, storage, [&](auto elements) {
    using Row = decltype(elements);
    int64_t c = 0;
    for (; c + kMost * W <= d; c += kMost * W) {
      sum_columns<kMost>(sum, weights, rows, count, c, Row());
    }
    for (; c + 2 * W <= d; c += 2 * W) {
      sum_columns<2>(sum, weights, rows, count, c, Row());
    }
    for (; c < d; ++c) {
      sum[c] = 0;
      for (int64_t j = 0; j < count; ++j) {
        sum[c] += weights[j] * T(widen(static_cast<Row>(rows[j])[c]));
      }
    }
  });
}

template <typename T>
bool group_maxima(T* maxima, const T* row, int64_t groups) {
  constexpr int64_t W = kWidth<T>;
  Vector<T> poison = {};
  for (int64_t g = 0; g < groups; g += W) {
    Vector<T> most = {};
    for (int64_t j = 0; j < kGroup; ++j) {
      const Vector<T> values = read<T>(row + g * kGroup + j * W);
      most = values > most ? values : most;
      poison += values - values;
    }
    __builtin_memcpy(maxima + g, &most, sizeof most);
  }
  bool finite = true;
  for (int64_t i = 0; i < W; ++i) {
    finite = finite && poison[i] == 0;
  }
  return finite;
}

#include "gradients.inl"

template <typename T>
constexpr Kernels<T> kKernels = {kLanes<T>,    TILE,        pack<T>,    check<T>,
                                 load_rows<T>, multiply<T>, sum_rows<T>, group_maxima<T>,
                                 kGradientKernels<T>};

}  // namespace

extern const Kernels<float> kSingle = kKernels<float>;
extern const Kernels<double> kDouble = kKernels<double>;

}  // namespace INSTRUCTION_SET
}  // namespace saemnesia_fast
