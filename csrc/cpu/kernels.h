// The inner loops, compiled once per instruction set. T is the type computed in: float, or double for float64 tokens.
#pragma once

#include "gradients.h"
#include "screen.h"

namespace saemnesia_fast {

// Dot products are sums over blocks of so many of d, each summed in order from zero, added in order. A number therefore
// has the same bits wherever it is computed, and its error grows with the block rather than with d.
constexpr int64_t kBlock = 128;
constexpr int64_t kBlockStride = kBlock + 16;

// Columns whose largest stands for them in a selection.
constexpr int64_t kGroup = 8;

template <typename T>
struct Kernels {
  // Tokens side by side in a panel [d, lanes], and latents of a register tile.
  int64_t lanes;
  int64_t tile;

  // panel[c, l] = x[offsets[l] + c * stride] - shift[c], and 0 in unused lanes.
  void (*pack)(T* panel, const void* x, Storage storage, const int64_t* offsets, int64_t count, int64_t stride,
               const T* shift, int64_t d);

  // exceeds[l] = 1 where a number of lane l is NaN or beyond +-limit.
  void (*check)(const T* panel, int64_t d, T limit, uint8_t* exceeds);

  // rows[b, r] = block b of W[which[r]], as `multiply` takes it: [ceil(d / kBlock), count, kBlockStride].
  void (*load_rows)(T* rows, const void* W, Storage storage, const int64_t* which, int64_t count, int64_t d);

  // pre[r, l] = relu(<rows[r], panel[., l]> + bias[r]) for `tiles` register tiles of rows; maxima[t, l] over a tile;
  // poison[l] becomes NaN where a value is NaN or infinite.
  void (*multiply)(T* pre, T* maxima, T* poison, const T* rows, const T* panel, const T* bias, int64_t tiles,
                   int64_t d);

  // sum[c] = sum_j weights[j] * rows[j][c], in the order of j from zero
  void (*sum_rows)(T* sum, const T* weights, const void* const* rows, int64_t count, Storage storage, int64_t d);

  // maxima[g] = the largest of 0 and the kGroup numbers row[column(g, j)], for a multiple of lanes / 2 groups; false if
  // one of them is NaN or infinite.
  bool (*group_maxima)(T* maxima, const T* row, int64_t groups);

  GradientKernels<T> gradients;

  // Groups lie interleaved.
  int64_t column(int64_t group, int64_t j) const {
    const int64_t width = lanes / 2;
    return group / width * width * kGroup + j * width + group % width;
  }
};

// What each instruction set's file defines.
#if defined(__x86_64__)
namespace avx512vnni {
extern const ScreenKernels kScreen;
}  // namespace avx512vnni
namespace avx512 {
extern const Kernels<float> kSingle;
extern const Kernels<double> kDouble;
}  // namespace avx512
namespace avx2 {
extern const Kernels<float> kSingle;
extern const Kernels<double> kDouble;
}  // namespace avx2
#endif
namespace baseline {
extern const Kernels<float> kSingle;
extern const Kernels<double> kDouble;
}  // namespace baseline

struct InstructionSet {
  const char* name;
  bool available;
  const Kernels<float>* single;
  const Kernels<double>* twice;
  const ScreenKernels* screen;  // or nullptr
};

#if defined(__x86_64__)
constexpr int kNumInstructionSets = 4;
#else
constexpr int kNumInstructionSets = 1;
#endif

// From the widest to the baseline, which every machine has.
const InstructionSet* instruction_sets();

// The one in use: the widest, unless `use_instruction_set` chose another (it returns false if the machine lacks it).
const InstructionSet& current_instruction_set();
bool use_instruction_set(const char* name);

template <typename T>
const Kernels<T>& kernels();

// nullptr where the instruction set in use has none.
const ScreenKernels* screen_kernels();

}  // namespace saemnesia_fast
