// The ops around the gradients, as the C++ and the CUDA library both register them.
//
// latent_gradients: values, extra [P] and latents [P] int32 of the groups one after another, group g having widths[g]
// pairs for each of M tokens; grads [M, d] of each group; of the outputs [N, d], [N], [N, d] only what is given is
// computed. db_enc is written, the others are added to where `accumulate`. Without W_dec no d_value but `extra`.
// sum_rows: sum_r weights[r] * rows[r], in the type of `like`; gather_dot: <grad[m], W[latents[m, j]]>.
// adam_rows: moments are exp_avg and exp_avg_sq [N, d], of the type computed in or bfloat16; or in 8 bits, with a scale
// for each block of d / B numbers of a row, in scales [N, B] of both, else empty.
// All tensors are contiguous; values, extra, weights, b_dec and outputs are of the type computed in.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cmath>
#include <optional>
#include <vector>

#include "adam_rows.h"

namespace saemnesia_fast {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <typename Library>
void define_gradient_ops(Library& m) {
  m.def(
      "latent_gradients(Tensor values, Tensor latents, Tensor? extra, Tensor[] grads, int[] widths, Tensor? x, "
      "Tensor? W_dec, Tensor? b_dec, Tensor(a!)? dW_enc, Tensor(b!)? db_enc, Tensor(c!)? dW_dec, bool accumulate) "
      "-> ()");
  m.def("sum_rows(Tensor rows, Tensor? weights, Tensor like) -> Tensor");
  m.def("gather_dot(Tensor latents, Tensor W, Tensor grad) -> Tensor");
  m.def(
      "adam_rows(Tensor(a!) W, Tensor grad, Tensor(b!)[] moments, Tensor(c!)[] scales, Tensor? scale, "
      "Tensor(d!)? shadow, int step, float lr, float beta1, float beta2, float eps, bool remove_parallel, "
      "bool unit_norm) -> ()");
}

template <typename T>
const T* data_or_null(const std::optional<Tensor>& tensor) {
  return tensor ? tensor->const_data_ptr<T>() : nullptr;
}

template <typename T>
T* output_or_null(const std::optional<Tensor>& tensor) {
  return tensor ? tensor->mutable_data_ptr<T>() : nullptr;
}

// W's moments are number `first` and the next.
template <typename T>
AdamJob<T> adam_job(const Tensor& W, const std::vector<Tensor>& moments, const std::vector<Tensor>& scales,
                    size_t first, const std::optional<Tensor>& scale, const std::optional<Tensor>& shadow, int64_t step,
                    double lr, double beta1, double beta2, double eps, bool remove_parallel, bool unit_norm) {
  const bool eight_bit = !scales.empty();
  const auto moment = [&](size_t i) {
    return Moment{moments[i].mutable_data_ptr(), eight_bit ? scales[i].mutable_data_ptr<float>() : nullptr};
  };
  AdamJob<T> job;
  job.W = W.mutable_data_ptr<T>();
  job.exp_avg = moment(first);
  job.exp_avg_sq = moment(first + 1);
  job.moments = eight_bit                                                ? MomentType::EightBit
                : moments[first].scalar_type() == ScalarType::BFloat16 ? MomentType::BFloat16
                                                                        : MomentType::Wide;
  job.block = eight_bit ? W.size(1) / scales[first].size(1) : 0;
  job.shadow = shadow ? static_cast<uint16_t*>(shadow->mutable_data_ptr()) : nullptr;
  job.shadow_type = !shadow                                        ? Shadow::None
                    : shadow->scalar_type() == ScalarType::BFloat16 ? Shadow::BFloat16
                                                                    : Shadow::Float16;
  job.scale = data_or_null<T>(scale);
  job.d = W.size(1);
  job.beta1 = T(beta1);
  job.beta2 = T(beta2);
  job.eps = T(eps);
  job.step_size = T(lr / (1 - std::pow(beta1, double(step))));
  job.inverse_root = T(1 / std::sqrt(1 - std::pow(beta2, double(step))));
  job.step = uint32_t(step);
  job.remove_parallel = remove_parallel;
  job.unit_norm = unit_norm;
  return job;
}

}  // namespace saemnesia_fast
