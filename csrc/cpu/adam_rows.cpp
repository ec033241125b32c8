// adam_rows (SPEC 4.1): rows in torch's threads.
#include <torch/csrc/stable/library.h>

#include "../gradient_ops.h"
#include "tensors.h"

namespace saemnesia_fast {
namespace {

template <typename T>
void update(const AdamJob<T>& job, const T* grad, int64_t rows) {
  torch::stable::parallel_for(0, rows, grain(4 * job.d), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      kernels<T>().gradients.adam_row(job, grad + row * job.d, row);
    }
  });
}

void adam_rows(const Tensor& W, const Tensor& grad, const std::vector<Tensor>& moments,
               const std::vector<Tensor>& scales, const std::optional<Tensor>& scale,
               const std::optional<Tensor>& shadow, int64_t step, double lr, double beta1, double beta2, double eps,
               bool remove_parallel, bool unit_norm) {
  const auto run = [&](auto number) {
    using T = decltype(number);
    update(adam_job<T>(W, moments, scales, 0, scale, shadow, step, lr, beta1, beta2, eps, remove_parallel, unit_norm),
           grad.const_data_ptr<T>(), W.size(0));
  };
  is_double(W) ? run(double()) : run(float());
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(saemnesia_fast_cpu, CPU, m) { m.impl("adam_rows", TORCH_BOX(&adam_rows)); }

}  // namespace saemnesia_fast
