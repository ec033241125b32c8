// adam_rows (SPEC 4.1) on the device: a warp for each row, which no other touches.
#include "kernels.h"
#include "warp.cuh"

namespace saemnesia_fast::cuda {
namespace {

constexpr int kWarps = 8;

template <typename T>
__global__ void update(AdamJob<T> job, const T* grad, int64_t rows, bool packed) {
  const int64_t row = int64_t(blockIdx.x) * kWarps + threadIdx.x / kWarp;
  if (row < rows) {
    adam_row(Warp<T>{int(threadIdx.x % kWarp), packed}, job, grad + row * job.d, row);
  }
}

template <typename T>
cudaError_t launch(const AdamJob<T>& job, const T* grad, int64_t rows, bool packed, cudaStream_t stream) {
  if (rows) {
    update<<<int((rows + kWarps - 1) / kWarps), kWarps * kWarp, 0, stream>>>(job, grad, rows, packed);
  }
  return cudaGetLastError();
}

}  // namespace

cudaError_t adam_rows(const AdamJob<float>& job, const float* grad, int64_t rows, bool packed, cudaStream_t stream) {
  return launch(job, grad, rows, packed, stream);
}

cudaError_t adam_rows(const AdamJob<double>& job, const double* grad, int64_t rows, bool packed, cudaStream_t stream) {
  return launch(job, grad, rows, packed, stream);
}

}  // namespace saemnesia_fast::cuda
