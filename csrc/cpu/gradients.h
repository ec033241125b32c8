// The loops of the gradients and of Adam as one thread runs them, compiled once per instruction set.
#pragma once

#include "../adam_rows.h"
#include "../latent_gradients.h"
#include "storage.h"

namespace saemnesia_fast {

// Pairs sorted by latent, those of latent i being [starts[i], starts[i + 1]), and their rows.
template <typename T>
struct SortedPairs {
  Pair<T>* pairs;
  const int64_t* starts;
  int64_t num_latents;
  PairRows<T, T> rows;

  int64_t count(int64_t latent) const { return starts[latent + 1] - starts[latent]; }
};

template <typename T>
struct GradientKernels {
  // Channels of a strip: where a row is divided among threads, at multiples of it.
  int64_t strip;

  // wide[i] = narrow[i], of `storage`
  void (*widen)(T* wide, const void* narrow, Storage storage, int64_t count);

  // The slopes of pairs [first, last), all of the latent with this row of W_dec.
  void (*add_slopes)(const SortedPairs<T>& sorted, const T* direction, int64_t first, int64_t last);

  // out = from + the sums over pairs [first, last), at most a segment, for channels [begin, end).
  void (*add_segment)(const SortedPairs<T>& sorted, int64_t first, int64_t last, const GradientRows<const T>& from,
                      const GradientRows<T>& out, int64_t begin, int64_t end);

  // out[c] = sum_r weights[r] * rows[r, c]; all rows count once where weights is null.
  void (*sum_rows)(T* out, const T* rows, const T* weights, int64_t count, int64_t d);

  T (*dot)(const T* a, const T* b, int64_t d);

  void (*adam_row)(const AdamJob<T>& job, const T* grad, int64_t row);
};

}  // namespace saemnesia_fast
