// The ops of the `cpu` backend, of the shapes and meanings of saemnesia_fast/ops.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <tuple>

namespace saemnesia_fast {

using torch::stable::Tensor;

std::tuple<Tensor, Tensor> encode_topk(const Tensor& x, const Tensor& W_enc, const Tensor& b_enc, const Tensor& b_dec,
                                       int64_t k);

// The selection of `encode_topk` alone, from its pre-activations [M, N].
std::tuple<Tensor, Tensor> select_topk(const Tensor& pre, int64_t k);

Tensor decode(const Tensor& values, const Tensor& indices, const Tensor& W_dec, const Tensor& b_dec);

// scale * (x - x_hat) and the |x - x_hat|^2 of each token, in the type computed in.
std::tuple<Tensor, Tensor> decode_error(const Tensor& values, const Tensor& indices, const Tensor& W_dec,
                                        const Tensor& b_dec, const Tensor& x, const Tensor& scale);

// Edits `out`, which is x or a copy of it. Mode "exact" without the scale of the token's norm. A token that is finite but
// whose pre-activations are not is made NaN only if it has a candidate or numbers beyond 2^96.
void erase(const Tensor& x, const Tensor& W_enc, const Tensor& b_enc, const Tensor& b_dec, const Tensor& W_dec,
           int64_t k, const Tensor& latents, const Tensor& thresholds, const Tensor& factors, Tensor& out);

std::tuple<Tensor, Tensor> probe(const Tensor& x, const Tensor& W_enc, const Tensor& b_enc, const Tensor& b_dec,
                                 int64_t k, const Tensor& latents, const Tensor& thresholds);

}  // namespace saemnesia_fast
