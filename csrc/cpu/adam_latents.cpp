// adam_latents (SPEC 4.1, 4.3): Adam on gradients that are nowhere [N, d].
//
// A latent's rows of the gradients are summed in cache, twice: by gradient_norms for their norm, which clips them, and
// by adam_latents, which updates the latent at once. Between the two the sorted pairs are kept, and the rows of those
// latents alone that have most of them.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "pairs.h"

namespace saemnesia_fast {
namespace {

// Rows to add for some latents: (latents [C] int64, dW_enc [C, d], db_enc [C], dW_dec [C, d]), or nothing.
template <typename T>
class DenseRows {
 public:
  DenseRows(const std::vector<Tensor>& tensors, int64_t num_latents, int64_t d)
      : tensors_(tensors), rows_(tensors.empty() ? 0 : num_latents, -1), d_(d) {
    for (int64_t row = 0; !tensors.empty() && row < tensors[0].numel(); ++row) {
      rows_[tensors[0].const_data_ptr<int64_t>()[row]] = row;
    }
  }

  bool has(int64_t latent) const { return !rows_.empty() && rows_[latent] >= 0; }

  GradientRows<const T> operator()(int64_t latent) const {
    if (!has(latent)) {
      return {};
    }
    const int64_t row = rows_[latent];
    return {tensors_[1].const_data_ptr<T>() + row * d_, tensors_[2].const_data_ptr<T>() + row,
            tensors_[3].const_data_ptr<T>() + row * d_};
  }

  void prefetch(int64_t latent) const {
    const GradientRows<const T> rows = (*this)(latent);
    saemnesia_fast::prefetch(rows.dW_enc, d_);
    saemnesia_fast::prefetch(rows.dW_dec, d_);
  }

 private:
  const std::vector<Tensor>& tensors_;
  std::vector<int64_t> rows_;
  int64_t d_;
};

// The latents whose rows are kept, [size, 2, d]. To make the rows of more than kMade pairs again takes longer than to
// read them: those of the most pairs are kept, but no more than there are tokens.
class KeptRows {
 public:
  KeptRows(const int64_t* starts, int64_t num_latents, int64_t tokens) : places_(num_latents, -1) {
    constexpr int64_t kMade = 3, kMost = 256;
    const auto count = [&](int64_t i) { return std::min(starts[i + 1] - starts[i], kMost); };
    std::vector<int64_t> with(kMost + 1);
    for (int64_t i = 0; i < num_latents; ++i) {
      ++with[count(i)];
    }
    int64_t fewest = kMost + 1;
    for (int64_t kept = 0; fewest > kMade + 1 && kept + with[fewest - 1] <= tokens;) {
      kept += with[--fewest];
    }
    for (int64_t i = 0; i < num_latents; ++i) {
      if (count(i) >= fewest) {
        places_[i] = size_++;
      }
    }
  }

  int64_t size() const { return size_; }
  bool has(int64_t latent) const { return places_[latent] >= 0; }

  template <typename T>
  GradientRows<T> rows(T* kept, int64_t latent, int64_t d) const {
    T* const first = kept + 2 * places_[latent] * d;
    return {first, nullptr, first + d};
  }

 private:
  std::vector<int64_t> places_;
  int64_t size_ = 0;
};

// A target of sum_latents that takes the rows' squares.
template <typename T>
struct Norms {
  static constexpr int64_t kWork = 1;
  const SortedPairs<T>& sorted;
  const DenseRows<T>& dense;
  const KeptRows& places;
  T* kept;
  T* db_enc;
  T* squares;

  bool idle(int64_t i) const {
    const bool zero = sorted.count(i) == 0 && !dense.has(i);
    if (zero) {
      db_enc[i] = 0;
      squares[i] = 0;
    }
    return zero;
  }

  GradientRows<const T> from(int64_t i) const { return dense(i); }

  GradientRows<T> out(int64_t i, T* dW_enc, T* dW_dec) const {
    const GradientRows<T> own = {dW_enc, nullptr, dW_dec};
    const GradientRows<T> rows = places.has(i) ? places.rows(kept, i, sorted.rows.d) : own;
    return {rows.dW_enc, db_enc + i, rows.dW_dec};
  }

  void prefetch(int64_t i) const { dense.prefetch(i); }

  void done(int64_t i, const GradientRows<T>& rows) const {
    const auto dot = kernels<T>().gradients.dot;
    const int64_t d = sorted.rows.d;
    squares[i] = dot(rows.dW_enc, rows.dW_enc, d) + dot(rows.dW_dec, rows.dW_dec, d);
  }
};

// A target that updates the rows of both weights.
template <typename T>
struct Updates {
  static constexpr int64_t kWork = 8;
  const DenseRows<T>& dense;
  const KeptRows& places;
  const T* kept;
  AdamJob<T> encoder;
  AdamJob<T> decoder;

  bool idle(int64_t i) const {
    if (places.has(i)) {
      update(i, places.rows(kept, i, encoder.d));
    }
    return places.has(i);
  }

  GradientRows<const T> from(int64_t i) const { return dense(i); }
  GradientRows<T> out(int64_t, T* dW_enc, T* dW_dec) const { return {dW_enc, nullptr, dW_dec}; }

  void prefetch(int64_t i) const {
    const GradientRows<const T> rows = places.has(i) ? places.rows(kept, i, encoder.d) : dense(i);
    saemnesia_fast::prefetch(rows.dW_enc, encoder.d);
    saemnesia_fast::prefetch(rows.dW_dec, encoder.d);
  }

  void done(int64_t i, const GradientRows<T>& rows) const { update(i, {rows.dW_enc, nullptr, rows.dW_dec}); }

  void update(int64_t i, const GradientRows<const T>& rows) const {
    kernels<T>().gradients.adam_row(encoder, rows.dW_enc, i);
    kernels<T>().gradients.adam_row(decoder, rows.dW_dec, i);
  }
};

template <typename T>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> norms(const Tensor& values, const Tensor& latents,
                                                 const std::optional<Tensor>& extra, const std::vector<Tensor>& grads,
                                                 const std::vector<int64_t>& widths, const Tensor& x,
                                                 const Tensor& W_dec, const Tensor& b_dec,
                                                 const std::vector<Tensor>& dense_rows) {
  const int64_t num_latents = W_dec.size(0), d = W_dec.size(1);
  const GivenPairs<T> given(values, latents, extra, widths, x.size(0));
  const Tensor starts = torch::stable::new_empty(latents, {num_latents + 1}, ScalarType::Long);
  given.count(starts.mutable_data_ptr<int64_t>(), num_latents);
  const int64_t bytes = starts.const_data_ptr<int64_t>()[num_latents] * int64_t(sizeof(Pair<T>));
  const Tensor pairs = torch::stable::new_empty(values, {bytes}, ScalarType::Byte);
  const std::vector<const T*> gradients = addresses<T>(grads);
  const SortedPairs<T> sorted = {static_cast<Pair<T>*>(pairs.mutable_data_ptr()),
                                 starts.const_data_ptr<int64_t>(),
                                 num_latents,
                                 {gradients.data(), x.const_data_ptr<T>(), b_dec.const_data_ptr<T>(), d}};
  given.sort(sorted.starts, num_latents, sorted.pairs);
  const Tensor db_enc = torch::stable::new_empty(values, {num_latents});
  const Tensor squared_norm = torch::stable::new_empty(values, {});
  const DenseRows<T> dense(dense_rows, num_latents, d);
  const KeptRows places(sorted.starts, num_latents, x.size(0));
  const Tensor kept = torch::stable::new_empty(values, {places.size(), 2, d});
  std::vector<T> squares(num_latents);
  sum_latents(sorted, W_dec,
              Norms<T>{sorted, dense, places, kept.mutable_data_ptr<T>(), db_enc.mutable_data_ptr<T>(),
                       squares.data()});
  double sum = 0;
  for (const T square : squares) {
    sum += square;
  }
  *squared_norm.mutable_data_ptr<T>() = T(sum);
  return {squared_norm, db_enc, pairs, starts, kept};
}

// grads, x, b_dec and the rows in `dense` are of the type computed in. `pairs` holds Pair<T>s as bytes.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> gradient_norms(const Tensor& values, const Tensor& latents,
                                                          const std::optional<Tensor>& extra,
                                                          const std::vector<Tensor>& grads,
                                                          const std::vector<int64_t>& widths, const Tensor& x,
                                                          const Tensor& W_dec, const Tensor& b_dec,
                                                          const std::vector<Tensor>& dense) {
  const auto run = is_double(values) ? norms<double> : norms<float>;
  return run(values, latents, extra, grads, widths, x, W_dec, b_dec, dense);
}

void adam_latents(const Tensor& pairs, const Tensor& starts, const Tensor& kept, const std::vector<Tensor>& grads,
                  const Tensor& x, const Tensor& b_dec, const std::vector<Tensor>& dense_rows, const Tensor& W_enc,
                  const Tensor& W_dec, const std::vector<Tensor>& moments, const std::vector<Tensor>& scales,
                  const std::optional<Tensor>& scale, const std::optional<Tensor>& shadow, bool unit_norm, int64_t step,
                  double lr, double beta1, double beta2, double eps) {
  const auto run = [&](auto number) {
    using T = decltype(number);
    const int64_t num_latents = W_enc.size(0), d = W_enc.size(1);
    if (scale && std::isnan(*scale->const_data_ptr<T>())) {
      return;
    }
    const std::vector<const T*> gradients = addresses<T>(grads);
    const SortedPairs<T> sorted = {static_cast<Pair<T>*>(pairs.mutable_data_ptr()),
                                   starts.const_data_ptr<int64_t>(),
                                   num_latents,
                                   {gradients.data(), x.const_data_ptr<T>(), b_dec.const_data_ptr<T>(), d}};
    const DenseRows<T> dense(dense_rows, num_latents, d);
    const auto job = [&](const Tensor& W, size_t first, const std::optional<Tensor>& copy, bool unit) {
      return adam_job<T>(W, moments, scales, first, scale, copy, step, lr, beta1, beta2, eps, unit, unit);
    };
    const KeptRows places(sorted.starts, num_latents, x.size(0));
    sum_latents(sorted, std::nullopt,
                Updates<T>{dense, places, kept.const_data_ptr<T>(), job(W_enc, 0, shadow, false),
                           job(W_dec, 2, std::nullopt, unit_norm)});
  };
  is_double(W_enc) ? run(double()) : run(float());
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(saemnesia_fast_cpu, m) {
  m.def(
      "gradient_norms(Tensor values, Tensor latents, Tensor? extra, Tensor[] grads, int[] widths, Tensor x, "
      "Tensor W_dec, Tensor b_dec, Tensor[] dense) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "adam_latents(Tensor pairs, Tensor starts, Tensor kept, Tensor[] grads, Tensor x, Tensor b_dec, Tensor[] dense, "
      "Tensor(a!) W_enc, Tensor(b!) W_dec, Tensor(c!)[] moments, Tensor(d!)[] scales, Tensor? scale, "
      "Tensor(e!)? shadow, bool unit_norm, int step, float lr, float beta1, float beta2, float eps) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(saemnesia_fast_cpu, CPU, m) {
  m.impl("gradient_norms", TORCH_BOX(&gradient_norms));
  m.impl("adam_latents", TORCH_BOX(&adam_latents));
}

}  // namespace saemnesia_fast
