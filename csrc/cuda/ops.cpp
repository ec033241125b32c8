// The ops of csrc/gradient_ops.h for tensors on a GPU: memory from torch, launches on its current stream.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <limits>
#include <tuple>
#include <vector>

#include "../gradient_ops.h"
#include "kernels.h"

namespace saemnesia_fast::cuda {
namespace {

Type type_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return Type::Float32;
    case ScalarType::Double:
      return Type::Float64;
    case ScalarType::Half:
      return Type::Float16;
    case ScalarType::BFloat16:
      return Type::BFloat16;
    default:
      STD_TORCH_CHECK(false, "expected float64, float32, float16 or bfloat16, got ", tensor.scalar_type());
  }
}

bool is_double(const Tensor& tensor) { return type_of(tensor) == Type::Float64; }

// Whether rows of d numbers can be read four numbers at a time.
template <typename... Tensors>
bool packed(int64_t d, const Tensors&... tensors) {
  const auto fits = [](const Tensor& tensor) {
    return reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % (4 * tensor.element_size()) == 0;
  };
  return d % 4 == 0 && (fits(tensors) && ...);
}

// Makes the tensor's device the current one.
class OnDevice {
 public:
  explicit OnDevice(const Tensor& tensor) : guard_(tensor.get_device_index()) {
    const auto error = aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream_);
    STD_TORCH_CHECK(error == AOTI_TORCH_SUCCESS, "no current stream of GPU ", tensor.get_device_index());
    int device = 0;
    check(cudaGetDevice(&device));
    check(cudaDeviceGetAttribute(&processors_, cudaDevAttrMultiProcessorCount, device));
  }

  cudaStream_t stream() const { return static_cast<cudaStream_t>(stream_); }
  int processors() const { return processors_; }

  static void check(cudaError_t error) { STD_TORCH_CHECK(error == cudaSuccess, "CUDA: ", cudaGetErrorString(error)); }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  void* stream_ = nullptr;
  int processors_ = 0;
};

void latent_gradients_op(const Tensor& values, const Tensor& latents, const std::optional<Tensor>& extra,
                         const std::vector<Tensor>& grads, const std::vector<int64_t>& widths,
                         const std::optional<Tensor>& x, const std::optional<Tensor>& W_dec,
                         const std::optional<Tensor>& b_dec, const std::optional<Tensor>& dW_enc,
                         const std::optional<Tensor>& db_enc, const std::optional<Tensor>& dW_dec, bool accumulate) {
  STD_TORCH_CHECK(grads.size() <= kMostGroups, "expected at most ", kMostGroups, " groups of pairs, got ",
                  grads.size());
  STD_TORCH_CHECK(values.numel() < std::numeric_limits<int32_t>::max(), "expected fewer than 2^31 pairs, got ",
                  values.numel());
  const OnDevice device(values);
  const Tensor& out = dW_enc ? *dW_enc : *dW_dec;
  const auto data = [](const std::optional<Tensor>& tensor) {
    return tensor ? tensor->mutable_data_ptr() : nullptr;
  };
  LatentGradients job = {};
  job.values = values.const_data_ptr();
  job.latents = latents.const_data_ptr<int32_t>();
  job.extra = data(extra);
  job.groups = int(grads.size());
  job.num_pairs = values.numel();
  job.num_latents = out.size(0);
  job.d = out.size(1);
  job.x = data(x);
  job.W_dec = dW_enc ? data(W_dec) : nullptr;
  job.b_dec = data(b_dec);
  job.dW_enc = data(dW_enc);
  job.db_enc = data(db_enc);
  job.dW_dec = data(dW_dec);
  job.accumulate = accumulate;
  job.row_type = type_of(grads[0]);
  job.weight_type = W_dec ? type_of(*W_dec) : job.row_type;
  job.processors = device.processors();
  job.packed = packed(job.d, x.value_or(out), W_dec.value_or(out), b_dec.value_or(out), dW_enc.value_or(out),
                      dW_dec.value_or(out));
  int64_t first = 0;
  for (size_t group = 0; group < grads.size(); ++group) {
    job.grads[group] = grads[group].const_data_ptr();
    job.firsts[group] = first;
    job.widths[group] = widths[group];
    job.packed = job.packed && packed(job.d, grads[group]);
    first += widths[group] * grads[group].size(0);
  }
  const Tensor workspace =
      torch::stable::new_empty(values, {int64_t(workspace_bytes(job))}, ScalarType::Byte);
  OnDevice::check(latent_gradients(job, workspace.mutable_data_ptr(), device.stream()));
}

Tensor sum_rows_op(const Tensor& rows, const std::optional<Tensor>& weights, const Tensor& like) {
  const OnDevice device(rows);
  const int64_t d = rows.size(1);
  const void* scale = weights ? weights->const_data_ptr() : nullptr;
  Tensor sums = rows;
  do {
    const int64_t count = sums.size(0);
    const Tensor parts = torch::stable::new_empty(like, {std::max<int64_t>((count + kRows - 1) / kRows, 1), d});
    OnDevice::check(sum_rows(sums.const_data_ptr(), type_of(sums), scale, parts.mutable_data_ptr(), is_double(like),
                             count, d, packed(d, sums, parts), device.stream()));
    sums = parts;
    scale = nullptr;
  } while (sums.size(0) > 1);
  return torch::stable::select(sums, 0, 0);
}

Tensor gather_dot_op(const Tensor& latents, const Tensor& W, const Tensor& grad) {
  const OnDevice device(grad);
  const int64_t tokens = latents.size(0), k = latents.size(1), d = W.size(1);
  const Tensor out = torch::stable::new_empty(grad, {tokens, k});
  OnDevice::check(gather_dot(latents.const_data_ptr<int32_t>(), W.const_data_ptr(), type_of(W), grad.const_data_ptr(),
                             out.mutable_data_ptr(), is_double(grad), tokens, k, d, packed(d, W, grad),
                             device.stream()));
  return out;
}

void adam_rows_op(const Tensor& W, const Tensor& grad, const std::vector<Tensor>& moments,
                  const std::vector<Tensor>& scales, const std::optional<Tensor>& scale,
                  const std::optional<Tensor>& shadow, int64_t step, double lr, double beta1, double beta2, double eps,
                  bool remove_parallel, bool unit_norm) {
  const OnDevice device(W);
  const auto run = [&](auto number) {
    using T = decltype(number);
    const auto job = adam_job<T>(W, moments, scales, 0, scale, shadow, step, lr, beta1, beta2, eps, remove_parallel,
                                 unit_norm);
    OnDevice::check(
        adam_rows(job, grad.const_data_ptr<T>(), W.size(0), packed(job.d, W, grad), device.stream()));
  };
  is_double(W) ? run(double()) : run(float());
}

}  // namespace

STABLE_TORCH_LIBRARY(saemnesia_fast_cuda, m) { define_gradient_ops(m); }

STABLE_TORCH_LIBRARY_IMPL(saemnesia_fast_cuda, CUDA, m) {
  m.impl("latent_gradients", TORCH_BOX(&latent_gradients_op));
  m.impl("sum_rows", TORCH_BOX(&sum_rows_op));
  m.impl("gather_dot", TORCH_BOX(&gather_dot_op));
  m.impl("adam_rows", TORCH_BOX(&adam_rows_op));
}

}  // namespace saemnesia_fast::cuda
