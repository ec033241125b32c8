// latent_gradients (SPEC 4.3) on the device.
//
// mark -> stable sort by latent -> bounds -> slopes -> sums. Nothing waits for the host and every size is known to it,
// so that a CUDA graph can hold the call. No floating-point atomics: a thread alone writes each number, in a fixed
// order (latent_gradients.h); the one atomic counter orders a list whose order does not matter.
#include <cub/device/device_radix_sort.cuh>

#include "../latent_gradients.h"
#include "kernels.h"
#include "warp.cuh"

namespace saemnesia_fast::cuda {
namespace {

constexpr int kWarps = 8;
constexpr int kThreads = kWarps * kWarp;

int blocks_of(int64_t items, int64_t each) { return int((items + each - 1) / each); }

// Where things lie in the workspace, each at a multiple of 256 bytes.
template <typename T>
struct Workspace {
  int32_t* keys;
  int32_t* sorted_keys;
  int32_t* ids;
  int32_t* sorted_ids;
  int32_t* starts;
  // Latents of more pairs than a segment: how many, and which.
  int32_t* num_long;
  int32_t* long_latents;
  Pair<T>* pairs;
  void* sorting;
  size_t sorting_bytes;
  size_t bytes;

  Workspace(const LatentGradients& job, void* memory) {
    const int64_t P = job.num_pairs;
    char* next = static_cast<char*>(memory);
    const auto take = [&](int64_t size) {
      char* const taken = next;
      next += (size + 255) / 256 * 256;
      return taken;
    };
    keys = reinterpret_cast<int32_t*>(take(4 * P));
    sorted_keys = reinterpret_cast<int32_t*>(take(4 * P));
    ids = reinterpret_cast<int32_t*>(take(4 * P));
    sorted_ids = reinterpret_cast<int32_t*>(take(4 * P));
    starts = reinterpret_cast<int32_t*>(take(4 * (job.num_latents + 1)));
    num_long = reinterpret_cast<int32_t*>(take(4));
    long_latents = reinterpret_cast<int32_t*>(take(4 * (P / kSegment + 1)));
    pairs = reinterpret_cast<Pair<T>*>(take(int64_t(sizeof(Pair<T>)) * P));
    sorting_bytes = 0;
    sort(job, nullptr, nullptr);
    sorting = take(int64_t(sorting_bytes));
    bytes = next - static_cast<char*>(memory);
  }

  cudaError_t sort(const LatentGradients& job, void* scratch, cudaStream_t stream) {
    int bits = 1;
    while (job.num_latents >> bits) {
      ++bits;
    }
    return cub::DeviceRadixSort::SortPairs(scratch, sorting_bytes, keys, sorted_keys, ids, sorted_ids,
                                           int(job.num_pairs), 0, bits, stream);
  }
};

template <typename T>
struct Numbers {
  const T* values;
  const T* extra;
};

// A pair without value and extra term sorts behind all latents.
template <typename T>
__global__ void mark(LatentGradients job, Numbers<T> numbers, int32_t* keys, int32_t* ids) {
  const int64_t p = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (p < job.num_pairs) {
    const int32_t latent = job.latents[p];
    const bool active = numbers.values[p] != 0 || (numbers.extra && numbers.extra[p] != 0);
    keys[p] = active && latent >= 0 && latent < job.num_latents ? latent : int32_t(job.num_latents);
    ids[p] = int32_t(p);
  }
}

__device__ int32_t first_at_least(const int32_t* sorted, int64_t count, int32_t wanted) {
  int64_t low = 0, high = count;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (sorted[middle] < wanted) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return int32_t(low);
}

__global__ void bounds(LatentGradients job, const int32_t* sorted_keys, int32_t* starts, int32_t* num_long,
                       int32_t* long_latents) {
  const int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i <= job.num_latents) {
    const int32_t start = first_at_least(sorted_keys, job.num_pairs, int32_t(i));
    starts[i] = start;
    if (i < job.num_latents && start + kSegment < job.num_pairs && sorted_keys[start + kSegment] == i) {
      long_latents[atomicAdd(num_long, 1)] = int32_t(i);
    }
  }
}

// A warp for each pair, in the sorted order: neighbours share a row of W_dec.
template <typename T, typename A, typename W>
__global__ void slopes(LatentGradients job, Numbers<T> numbers, const int32_t* sorted_keys, const int32_t* sorted_ids,
                       Pair<T>* pairs) {
  const int64_t q = int64_t(blockIdx.x) * kWarps + threadIdx.x / kWarp;
  if (q >= job.num_pairs || sorted_keys[q] == job.num_latents) {
    return;
  }
  const Warp<T> warp = {int(threadIdx.x % kWarp), job.packed};
  const int64_t p = sorted_ids[q];
  int32_t group = 0;
  while (group + 1 < job.groups && p >= job.firsts[group + 1]) {
    ++group;
  }
  const int32_t token = int32_t((p - job.firsts[group]) / job.widths[group]);
  Pair<T> pair = {token, group, numbers.values[p], numbers.extra ? numbers.extra[p] : T(0)};
  if (job.W_dec) {
    add_slope(warp, pair, reinterpret_cast<const A* const*>(job.grads),
              static_cast<const W*>(job.W_dec) + sorted_keys[q] * job.d, job.d);
  }
  if (warp.lane == 0) {
    pairs[q] = pair;
  }
}

template <typename T>
__device__ GradientRows<T> rows_of(const LatentGradients& job, int64_t latent) {
  const auto row = [&](void* matrix) { return matrix ? static_cast<T*>(matrix) + latent * job.d : nullptr; };
  return {row(job.dW_enc), job.db_enc ? static_cast<T*>(job.db_enc) + latent : nullptr, row(job.dW_dec)};
}

// What they are added to. db_enc never is: the gradient of b_dec needs it by itself.
template <typename T>
__device__ GradientRows<const T> begin_of(const LatentGradients& job, const GradientRows<T>& out) {
  return job.accumulate ? GradientRows<const T>{out.dW_enc, nullptr, out.dW_dec} : GradientRows<const T>{};
}

template <typename T, typename A>
__device__ PairRows<T, A> inputs_of(const LatentGradients& job) {
  return {reinterpret_cast<const A* const*>(job.grads), static_cast<const A*>(job.x),
          static_cast<const T*>(job.b_dec), job.d};
}

// A warp for each strip of each latent of at most a segment.
template <typename T, typename A>
__global__ void short_sums(LatentGradients job, const int32_t* starts, const Pair<T>* pairs) {
  const int64_t strips = (job.d + kDotLanes - 1) / kDotLanes;
  const int64_t item = int64_t(blockIdx.x) * kWarps + threadIdx.x / kWarp;
  const int64_t latent = item / strips, c = item % strips * kDotLanes;
  if (latent >= job.num_latents) {
    return;
  }
  const int32_t first = starts[latent], count = starts[latent + 1] - first;
  const Warp<T> warp = {int(threadIdx.x % kWarp), job.packed};
  const GradientRows<T> out = rows_of<T>(job, latent);
  if (count == 0 && job.accumulate) {
    if (out.db_enc && c == 0) {
      *out.db_enc = 0;
    }
  } else if (count <= kSegment) {
    add_segment(warp, pairs + first, count, inputs_of<T, A>(job), begin_of(job, out), out, c);
  }
}

// A block for each strip of each longer latent, in turn: a warp sums a segment, and the first adds them up in order.
template <typename T, typename A>
__global__ void long_sums(LatentGradients job, const int32_t* starts, const Pair<T>* pairs, const int32_t* num_long,
                          const int32_t* long_latents) {
  using Sums = PairSums<Warp<T>, T>;
  __shared__ Sums of_segments[kWarps][kWarp];
  const int64_t strips = (job.d + kDotLanes - 1) / kDotLanes, items = *num_long * strips;
  const int warp_index = threadIdx.x / kWarp;
  const Warp<T> warp = {int(threadIdx.x % kWarp), job.packed};
  for (int64_t item = blockIdx.x; item < items; item += gridDim.x) {
    const int64_t latent = long_latents[item / strips], c = item % strips * kDotLanes;
    const int32_t begin = starts[latent], end = starts[latent + 1];
    const GradientRows<T> out = rows_of<T>(job, latent);
    Sums sums = begin_sums(warp, begin_of(job, out), c, job.d);
    for (int64_t round = begin; round < end; round += kWarps * kSegment) {
      const int64_t first = round + warp_index * kSegment;
      const int64_t count = end - first < kSegment ? end - first : kSegment;
      if (count > 0) {
        of_segments[warp_index][warp.lane] = sum_segment(warp, pairs + first, count, inputs_of<T, A>(job), c);
      }
      __syncthreads();
      if (warp_index == 0) {
        for (int64_t w = 0; w < kWarps && round + w * kSegment < end; ++w) {
          sums.add(of_segments[w][warp.lane]);
        }
      }
      __syncthreads();
    }
    if (warp_index == 0) {
      end_sums(warp, sums, out, c, job.d);
    }
  }
}

template <typename T, typename A>
__global__ void row_sums(const A* rows, const T* weights, T* sums, int64_t count, int64_t d, bool packed) {
  const int64_t strips = (d + kDotLanes - 1) / kDotLanes;
  const int64_t item = int64_t(blockIdx.x) * kWarps + threadIdx.x / kWarp;
  const int64_t part = item / strips, first = part * kRows, c = item % strips * kDotLanes;
  if (part > 0 && first >= count) {
    return;
  }
  const Warp<T> warp = {int(threadIdx.x % kWarp), packed};
  typename Warp<T>::Strip sum = {};
  add_rows(warp, sum, rows + first * d, weights ? weights + first : nullptr, min(kRows, count - first), c, d);
  warp.store(sums + part * d, c, d, sum);
}

template <typename T, typename W>
__global__ void dots(const int32_t* latents, const W* weight, const T* grad, T* out, int64_t pairs, int64_t k,
                     int64_t d, bool packed) {
  const int64_t p = int64_t(blockIdx.x) * kWarps + threadIdx.x / kWarp;
  if (p >= pairs) {
    return;
  }
  const Warp<T> warp = {int(threadIdx.x % kWarp), packed};
  const T product = dot(warp, grad + p / k * d, weight + latents[p] * d, d);
  if (warp.lane == 0) {
    out[p] = product;
  }
}

// use(number) for a number of `type`; float64 goes with float64 alone.
template <typename T, typename Use>
void with_type(Type type, const Use& use) {
  if constexpr (sizeof(T) == 8) {
    use(double());
  } else if (type == Type::Float16) {
    use(__half());
  } else if (type == Type::BFloat16) {
    use(__nv_bfloat16());
  } else {
    use(float());
  }
}

template <typename T>
cudaError_t run(const LatentGradients& job, void* memory, cudaStream_t stream) {
  Workspace<T> space(job, memory);
  const Numbers<T> numbers = {static_cast<const T*>(job.values), static_cast<const T*>(job.extra)};
  const int64_t strips = (job.d + kDotLanes - 1) / kDotLanes;
  cudaMemsetAsync(space.num_long, 0, 4, stream);
  if (job.num_pairs) {
    mark<<<blocks_of(job.num_pairs, kThreads), kThreads, 0, stream>>>(job, numbers, space.keys, space.ids);
    if (const cudaError_t error = space.sort(job, space.sorting, stream)) {
      return error;
    }
  }
  bounds<<<blocks_of(job.num_latents + 1, kThreads), kThreads, 0, stream>>>(job, space.sorted_keys, space.starts,
                                                                           space.num_long, space.long_latents);
  with_type<T>(job.row_type, [&](auto row) {
    using A = decltype(row);
    if (job.num_pairs) {
      with_type<T>(job.weight_type, [&](auto weight) {
        slopes<T, A, decltype(weight)><<<blocks_of(job.num_pairs, kWarps), kThreads, 0, stream>>>(
            job, numbers, space.sorted_keys, space.sorted_ids, space.pairs);
      });
    }
    short_sums<T, A><<<blocks_of(job.num_latents * strips, kWarps), kThreads, 0, stream>>>(job, space.starts,
                                                                                           space.pairs);
    if (job.num_pairs > kSegment) {
      long_sums<T, A><<<2 * job.processors, kThreads, 0, stream>>>(job, space.starts, space.pairs, space.num_long,
                                                                   space.long_latents);
    }
  });
  return cudaGetLastError();
}

template <typename T>
void sum_typed_rows(const void* rows, Type type, const void* weights, void* sums, int64_t count, int64_t d,
                    bool packed, cudaStream_t stream) {
  const int64_t parts = count > kRows ? (count + kRows - 1) / kRows : 1, strips = (d + kDotLanes - 1) / kDotLanes;
  with_type<T>(type, [&](auto row) {
    row_sums<<<blocks_of(parts * strips, kWarps), kThreads, 0, stream>>>(
        static_cast<const decltype(row)*>(rows), static_cast<const T*>(weights), static_cast<T*>(sums), count, d,
        packed);
  });
}

template <typename T>
void dot_typed_rows(const int32_t* latents, const void* W, Type type, const void* grad, void* out, int64_t pairs,
                    int64_t k, int64_t d, bool packed, cudaStream_t stream) {
  with_type<T>(type, [&](auto weight) {
    dots<<<blocks_of(pairs, kWarps), kThreads, 0, stream>>>(latents, static_cast<const decltype(weight)*>(W),
                                                            static_cast<const T*>(grad), static_cast<T*>(out), pairs,
                                                            k, d, packed);
  });
}

}  // namespace

size_t workspace_bytes(const LatentGradients& job) {
  return job.row_type == Type::Float64 ? Workspace<double>(job, nullptr).bytes : Workspace<float>(job, nullptr).bytes;
}

cudaError_t latent_gradients(const LatentGradients& job, void* workspace, cudaStream_t stream) {
  return job.row_type == Type::Float64 ? run<double>(job, workspace, stream) : run<float>(job, workspace, stream);
}

cudaError_t sum_rows(const void* rows, Type type, const void* weights, void* sums, bool is_double, int64_t count,
                     int64_t d, bool packed, cudaStream_t stream) {
  const auto run = is_double ? sum_typed_rows<double> : sum_typed_rows<float>;
  run(rows, type, weights, sums, count, d, packed, stream);
  return cudaGetLastError();
}

cudaError_t gather_dot(const int32_t* latents, const void* W, Type type, const void* grad, void* out, bool is_double,
                       int64_t tokens, int64_t k, int64_t d, bool packed, cudaStream_t stream) {
  if (tokens) {
    const auto run = is_double ? dot_typed_rows<double> : dot_typed_rows<float>;
    run(latents, W, type, grad, out, tokens * k, k, d, packed, stream);
  }
  return cudaGetLastError();
}

}  // namespace saemnesia_fast::cuda
