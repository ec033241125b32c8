// The loops of latent_gradients and adam_rows as one thread runs them, compiled once per instruction set.
#pragma once

#include "../adam_rows.h"
#include "../latent_gradients.h"
#include "storage.h"

namespace saemnesia_fast {

// latent_gradients on the host; null where not wanted.
template <typename T>
struct LatentJob {
  // Sorted pairs; those of latent i are [starts[i], starts[i + 1]).
  Pair<T>* pairs;
  const int64_t* starts;
  PairRows<T, T> rows;
  T* dW_enc;
  T* db_enc;
  T* dW_dec;
  bool accumulate;

  GradientRows<T> out(int64_t latent) const {
    return {dW_enc ? dW_enc + latent * rows.d : nullptr, db_enc ? db_enc + latent : nullptr,
            dW_dec ? dW_dec + latent * rows.d : nullptr, accumulate};
  }
};

template <typename T>
struct GradientKernels {
  // Channels of a strip: where a row is divided among threads, at multiples of it.
  int64_t strip;

  // wide[i] = narrow[i], of `storage`
  void (*widen)(T* wide, const void* narrow, Storage storage, int64_t count);

  // The slopes of pairs [first, last), all of the latent with this row of W_dec.
  void (*add_slopes)(const LatentJob<T>& job, const T* direction, int64_t first, int64_t last);

  // The sums of one latent for channels [begin, end).
  void (*sum_strips)(const LatentJob<T>& job, int64_t latent, int64_t begin, int64_t end);

  // out[c] = sum_r weights[r] * rows[r, c]; all rows count once where weights is null.
  void (*sum_rows)(T* out, const T* rows, const T* weights, int64_t count, int64_t d);

  T (*dot)(const T* a, const T* b, int64_t d);

  void (*adam_row)(const AdamJob<T>& job, int64_t row);
};

}  // namespace saemnesia_fast
