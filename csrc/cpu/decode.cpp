// decode: x_hat = sum_j values_j * W_dec[indices_j] + b_dec (SPEC 1.3); decode_error: what it misses of x (SPEC 4.1).
#include "decode.h"

#include <tuple>

#include "ops.h"

namespace saemnesia_fast {
namespace {

// Calls use(m, sum) for each token m, `sum` being the T[d] of sum_j values[m, j] * W_dec[indices[m, j]].
template <typename T, typename Use>
void sum_directions(const Tensor& values, const Tensor& indices, const Matrix& W_dec, int64_t tokens, const Use& use) {
  const int64_t k = values.size(values.dim() - 1);
  const std::vector<T> weights = numbers<T>(values);
  const std::vector<int64_t> latents = integers(indices);
  torch::stable::parallel_for(0, tokens, grain(k * W_dec.d), [&](int64_t begin, int64_t end) {
    GatherSum<T> gather(W_dec);
    for (int64_t m = begin; m < end; ++m) {
      for (int64_t j = m * k; j < (m + 1) * k; ++j) {
        gather.add(weights[j], latents[j]);
      }
      use(m, gather.sum());
    }
  });
}

template <typename T>
void decode_rows(const Tensor& values, const Tensor& indices, const Matrix& W_dec, const std::vector<T>& b_dec,
                 const Rows& x_hat) {
  sum_directions<T>(values, indices, W_dec, x_hat.count(), [&](int64_t m, const T* sum) {
    x_hat.assign(m, [&](int64_t c) { return sum[c] + b_dec[c]; });
  });
}

template <typename T>
void decode_error_rows(const Tensor& values, const Tensor& indices, const Matrix& W_dec, const std::vector<T>& b_dec,
                       const Rows& x, T scale, T* grad, T* squares) {
  const int64_t d = W_dec.d;
  sum_directions<T>(values, indices, W_dec, x.count(), [&](int64_t m, const T* sum) {
    T* const error = grad + m * d;
    x.read(m, [&](int64_t c, T value) { error[c] = value - (sum[c] + b_dec[c]); });
    squares[m] = kernels<T>().gradients.dot(error, error, d);
    for (int64_t c = 0; c < d; ++c) {
      error[c] *= scale;
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

std::tuple<Tensor, Tensor> decode_error(const Tensor& values, const Tensor& indices, const Tensor& W_dec,
                                        const Tensor& b_dec, const Tensor& x, const Tensor& scale) {
  std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end());
  const ScalarType type = is_double(values) ? ScalarType::Double : ScalarType::Float;
  const Tensor grad = torch::stable::new_empty(values, shape, type);
  shape.pop_back();
  const Tensor squares = torch::stable::new_empty(values, shape, type);
  const auto run = [&](auto number) {
    using T = decltype(number);
    decode_error_rows<T>(values, indices, Matrix(W_dec), numbers<T>(b_dec), Rows(x), numbers<T>(scale)[0],
                         grad.mutable_data_ptr<T>(), squares.mutable_data_ptr<T>());
  };
  is_double(values) ? run(double()) : run(float());
  return {grad, squares};
}

}  // namespace saemnesia_fast
