// The launches of latent_gradients.cu and adam_rows.cu; no torch headers. Every call returns cudaGetLastError().
#pragma once

#include <cuda_runtime_api.h>

#include "../adam_rows.h"

namespace saemnesia_fast::cuda {

enum class Type : int32_t { Float32, Float64, Float16, BFloat16 };

constexpr int kMostGroups = 8;

// What is computed of the pairs of kMostGroups or fewer groups; pointers of the type computed in, except grads and x,
// of row_type, and W_dec, of weight_type. Null where not wanted.
struct LatentGradients {
  const void* values;
  const int32_t* latents;
  const void* extra;
  const void* grads[kMostGroups];
  // Pairs of group g begin at firsts[g], widths[g] for each token.
  int64_t firsts[kMostGroups];
  int64_t widths[kMostGroups];
  int groups;
  int64_t num_pairs;
  int64_t num_latents;
  int64_t d;
  const void* x;
  const void* W_dec;
  const void* b_dec;
  void* dW_enc;
  void* db_enc;
  void* dW_dec;
  bool accumulate;
  Type row_type;
  Type weight_type;
  bool packed;
  int processors;
};

// Memory that latent_gradients needs beside its arguments.
size_t workspace_bytes(const LatentGradients& job);
cudaError_t latent_gradients(const LatentGradients& job, void* workspace, cudaStream_t stream);

// sums[p] = sum of weights[r] * rows[r] over the p-th kRows rows of [count, d]; weights may be null: 1.
constexpr int64_t kRows = 128;
cudaError_t sum_rows(const void* rows, Type type, const void* weights, void* sums, bool is_double, int64_t count,
                     int64_t d, bool packed, cudaStream_t stream);

// out[m, j] = <grad[m], W[latents[m, j]]>
cudaError_t gather_dot(const int32_t* latents, const void* W, Type type, const void* grad, void* out, bool is_double,
                       int64_t tokens, int64_t k, int64_t d, bool packed, cudaStream_t stream);

cudaError_t adam_rows(const AdamJob<float>& job, const float* grad, int64_t rows, bool packed, cudaStream_t stream);
cudaError_t adam_rows(const AdamJob<double>& job, const double* grad, int64_t rows, bool packed, cudaStream_t stream);

}  // namespace saemnesia_fast::cuda
