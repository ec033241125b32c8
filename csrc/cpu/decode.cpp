// decode: x_hat = sum_j values_j * W_dec[indices_j] + b_dec (SPEC 1.3).
#include "decode.h"

#include "ops.h"

namespace saemnesia_fast {
namespace {

template <typename T>
void decode_rows(const Tensor& values, const Tensor& indices, const Matrix& W_dec, const std::vector<T>& b_dec,
                 const Rows& x_hat) {
  const int64_t k = values.size(values.dim() - 1);
  const std::vector<T> weights = numbers<T>(values);
  const std::vector<int64_t> latents = integers(indices);
  torch::stable::parallel_for(0, x_hat.count(), grain(k * W_dec.d), [&](int64_t begin, int64_t end) {
    GatherSum<T> gather(W_dec);
    for (int64_t m = begin; m < end; ++m) {
      for (int64_t j = m * k; j < (m + 1) * k; ++j) {
        gather.add(weights[j], latents[j]);
      }
      const T* sum = gather.sum();
      x_hat.assign(m, [&](int64_t c) { return sum[c] + b_dec[c]; });
    }
  });
}

}  // namespace

Tensor decode(const Tensor& values, const Tensor& indices, const Tensor& W_dec, const Tensor& b_dec) {
  std::vector<int64_t> shape(values.sizes().begin(), values.sizes().end());
  shape.back() = W_dec.size(1);
  const Tensor x_hat = torch::stable::new_empty(values, shape);
  if (is_double(values)) {
    decode_rows<double>(values, indices, Matrix(W_dec), numbers<double>(b_dec), Rows(x_hat));
  } else {
    decode_rows<float>(values, indices, Matrix(W_dec), numbers<float>(b_dec), Rows(x_hat));
  }
  return x_hat;
}

}  // namespace saemnesia_fast
