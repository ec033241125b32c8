// The loops of latent_gradients (SPEC 4.3), for host and device.
//
// Pairs lie sorted by latent, and within it by group, token and column. Those of one latent are summed in segments of
// kSegment, each in order from zero, added in order: who sums a segment makes no difference.
#pragma once

#include "lanes.h"

namespace saemnesia_fast {

constexpr int64_t kSegment = 64;

template <typename T>
struct Pair {
  int32_t token;
  int32_t group;
  T value;
  T d_value;
};

// d_value += <g, direction> where the latent is active.
template <typename Lanes, typename T, typename A, typename W>
SAEMNESIA_INLINE void add_slope(const Lanes& lanes, Pair<T>& pair, const A* const* grads, const W* direction,
                                int64_t d) {
  if (pair.value > 0) {
    pair.d_value += dot(lanes, grads[pair.group] + pair.token * d, direction, d);
  }
}

// Sums over pairs: of d_value, of d_value * (x - b_dec), and of value * g.
template <typename Lanes, typename T>
struct PairSums {
  T bias;
  typename Lanes::Strip encoder;
  typename Lanes::Strip decoder;

  SAEMNESIA_INLINE void add(const PairSums& other) {
    bias += other.bias;
    encoder = plus(encoder, other.encoder);
    decoder = plus(decoder, other.decoder);
  }
};

// Where the rows lie. A number of a pair that is 0 has its rows left unread, so what is not wanted may be null.
template <typename T, typename A>
struct PairRows {
  const A* const* grads;
  const A* x;
  const T* b_dec;
  int64_t d;
};

// The sums over `count` pairs, at most a segment, for the strip from channel c.
template <typename Lanes, typename T, typename A>
SAEMNESIA_INLINE PairSums<Lanes, T> sum_segment(const Lanes& lanes, const Pair<T>* pairs, int64_t count,
                                                const PairRows<T, A>& rows, int64_t c) {
  using S = typename Lanes::Strip;
  PairSums<Lanes, T> sums = {};
  const S shift = rows.b_dec ? lanes.template load<S>(rows.b_dec, c, rows.d) : S{};
  for (int64_t q = 0; q < count; ++q) {
    const Pair<T> pair = pairs[q];
    if (pair.value != 0) {
      add_scaled(sums.decoder, pair.value,
                 lanes.template load<S>(rows.grads[pair.group] + pair.token * rows.d, c, rows.d));
    }
    if (pair.d_value != 0) {
      sums.bias += pair.d_value;
      add_scaled(sums.encoder, pair.d_value,
                 minus(lanes.template load<S>(rows.x + pair.token * rows.d, c, rows.d), shift));
    }
  }
  return sums;
}

// The gradients of one latent; null where there are none, or none are wanted.
template <typename T>
struct GradientRows {
  T* dW_enc;
  T* db_enc;
  T* dW_dec;
};

// What the segments' sums are added to.
template <typename Lanes, typename T>
SAEMNESIA_INLINE PairSums<Lanes, T> begin_sums(const Lanes& lanes, const GradientRows<const T>& from, int64_t c,
                                               int64_t d) {
  using S = typename Lanes::Strip;
  PairSums<Lanes, T> sums = {};
  if (from.dW_enc) {
    sums.encoder = lanes.template load<S>(from.dW_enc, c, d);
  }
  if (from.db_enc) {
    sums.bias = *from.db_enc;
  }
  if (from.dW_dec) {
    sums.decoder = lanes.template load<S>(from.dW_dec, c, d);
  }
  return sums;
}

template <typename Lanes, typename T>
SAEMNESIA_INLINE void end_sums(const Lanes& lanes, const PairSums<Lanes, T>& sums, const GradientRows<T>& out,
                               int64_t c, int64_t d) {
  if (out.dW_enc) {
    lanes.store(out.dW_enc, c, d, sums.encoder);
  }
  if (out.db_enc && c == 0) {
    *out.db_enc = sums.bias;
  }
  if (out.dW_dec) {
    lanes.store(out.dW_dec, c, d, sums.decoder);
  }
}

// out = from + the sums over `count` pairs, at most a segment, for the strip from channel c.
template <typename Lanes, typename T, typename A>
SAEMNESIA_INLINE void add_segment(const Lanes& lanes, const Pair<T>* pairs, int64_t count, const PairRows<T, A>& rows,
                                  const GradientRows<const T>& from, const GradientRows<T>& out, int64_t c) {
  PairSums<Lanes, T> sums = begin_sums(lanes, from, c, rows.d);
  if (count > 0) {
    sums.add(sum_segment(lanes, pairs, count, rows, c));
  }
  end_sums(lanes, sums, out, c, rows.d);
}

// sum += `sum_r weights[r] * rows[r]` for the strip from channel c; without weights each row counts once.
template <typename Lanes, typename T, typename A>
SAEMNESIA_INLINE void add_rows(const Lanes& lanes, typename Lanes::Strip& sum, const A* rows, const T* weights,
                               int64_t count, int64_t c, int64_t d) {
  for (int64_t r = 0; r < count; ++r) {
    const T weight = weights ? weights[r] : T(1);
    if (weight != 0) {
      add_scaled(sum, weight, lanes.template load<typename Lanes::Strip>(rows + r * d, c, d));
    }
  }
}

}  // namespace saemnesia_fast
