// latent_gradients (SPEC 4.3) and what it consists of, in torch's threads.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "../gradient_ops.h"
#include "tensors.h"

namespace saemnesia_fast {
namespace {

// A latent with more pairs is shared by the threads; the sums are the same.
constexpr int64_t kShared = 1024;
// Rows that are summed one after another.
constexpr int64_t kRows = 128;
// Latents for which memory is asked ahead of time.
constexpr int64_t kAhead = 2;

// The pairs that have a value or an extra term, sorted by latent and else as they came; those of latent i begin at
// starts[i].
template <typename T>
std::vector<Pair<T>> sort_pairs(const Tensor& values, const Tensor& latents, const T* extra,
                                const std::vector<int64_t>& widths, int64_t tokens, std::vector<int64_t>& starts) {
  const T* const value = values.const_data_ptr<T>();
  const int32_t* const latent = latents.const_data_ptr<int32_t>();
  const auto active = [&](int64_t p) { return value[p] != 0 || (extra && extra[p] != 0); };
  for (int64_t p = 0; p < values.numel(); ++p) {
    starts[latent[p] + 1] += active(p);
  }
  for (size_t i = 1; i < starts.size(); ++i) {
    starts[i] += starts[i - 1];
  }
  std::vector<Pair<T>> pairs(starts.back());
  std::vector<int64_t> next(starts.begin(), starts.end() - 1);
  int64_t p = 0;
  for (size_t group = 0; group < widths.size(); ++group) {
    for (int64_t token = 0; token < tokens; ++token) {
      for (int64_t j = 0; j < widths[group]; ++j, ++p) {
        if (active(p)) {
          pairs[next[latent[p]]++] = {int32_t(token), int32_t(group), value[p], extra ? extra[p] : T(0)};
        }
      }
    }
  }
  return pairs;
}

// Rows of a matrix in the type computed in: where they lie, or widened into memory of its own.
template <typename T>
class WideRows {
 public:
  WideRows(const Tensor& matrix, int64_t most)
      : data_(static_cast<const char*>(matrix.const_data_ptr())),
        storage_(storage_of(matrix)),
        d_(matrix.size(1)),
        own_(lies_wide() ? 0 : most * d_) {}

  // Row i if it need not be widened, else null.
  const T* lies(int64_t i) const { return lies_wide() ? reinterpret_cast<const T*>(data_) + i * d_ : nullptr; }

  const T* operator()(int64_t first, int64_t count) const {
    const char* const rows = data_ + first * d_ * size_of(storage_);
    if (lies_wide()) {
      return reinterpret_cast<const T*>(rows);
    }
    kernels<T>().gradients.widen(own_.get(), rows, storage_, count * d_);
    return own_.get();
  }

 private:
  bool lies_wide() const { return storage_ == (sizeof(T) == 8 ? Storage::Float64 : Storage::Float32); }

  const char* data_;
  Storage storage_;
  int64_t d_;
  Buffer<T> own_;
};

// Fetches what a latent needs: its rows, and those of its first pairs.
template <typename T>
void prefetch(const LatentJob<T>& job, int64_t latent, const T* direction) {
  constexpr int64_t kPairs = 4, kLine = 64 / sizeof(T);
  const int64_t d = job.rows.d, first = job.starts[latent], last = std::min(job.starts[latent + 1], first + kPairs);
  const auto fetch = [&](const T* row) {
    for (int64_t c = 0; row && c < d; c += kLine) {
      __builtin_prefetch(row + c, 0, 2);
    }
  };
  fetch(direction);
  for (int64_t q = first; q < last; ++q) {
    const Pair<T>& pair = job.pairs[q];
    fetch(job.rows.grads[pair.group] + pair.token * d);
    fetch(job.rows.x ? job.rows.x + pair.token * d : nullptr);
  }
  fetch(job.out(latent).dW_enc);
  fetch(job.out(latent).dW_dec);
}

// W_dec is absent where `d_value` is to be left as it is.
template <typename T>
void sum_latents(const LatentJob<T>& job, int64_t num_latents, const std::optional<Tensor>& W_dec) {
  const GradientKernels<T>& kernel = kernels<T>().gradients;
  const int64_t d = job.rows.d, strips = (d + kernel.strip - 1) / kernel.strip;
  const auto count = [&](int64_t i) { return job.starts[i + 1] - job.starts[i]; };
  // A thread's share is so many pairs and latents together.
  const auto weight = [&](int64_t i) { return job.starts[i] + i; };
  const auto latent_at = [&](int64_t share) {
    int64_t low = 0, high = num_latents;
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      weight(middle) < share ? low = middle + 1 : high = middle;
    }
    return low;
  };
  const auto add_slopes = [&](int64_t latent, int64_t first, int64_t last, const std::optional<WideRows<T>>& rows) {
    if (rows && first < last) {
      kernel.add_slopes(job, (*rows)(latent, 1), first, last);
    }
  };
  const auto directions = [&] { return W_dec ? std::optional<WideRows<T>>(std::in_place, *W_dec, 1) : std::nullopt; };
  torch::stable::parallel_for(0, weight(num_latents), grain(2 * d), [&](int64_t begin, int64_t end) {
    const auto rows = directions();
    int64_t ahead = latent_at(begin);
    for (int64_t i = ahead, last = latent_at(end); i < last; ++i) {
      for (; ahead < last && ahead <= i + kAhead; ++ahead) {
        if (count(ahead)) {
          prefetch(job, ahead, rows ? rows->lies(ahead) : nullptr);
        }
      }
      if (count(i) <= kShared) {
        add_slopes(i, job.starts[i], job.starts[i + 1], rows);
        if (count(i) || !job.accumulate) {
          kernel.sum_strips(job, i, 0, d);
        } else if (job.db_enc) {
          job.db_enc[i] = 0;
        }
      }
    }
  });
  for (int64_t i = 0; i < num_latents; ++i) {
    if (count(i) > kShared) {
      torch::stable::parallel_for(job.starts[i], job.starts[i + 1], grain(d), [&](int64_t begin, int64_t end) {
        add_slopes(i, begin, end, directions());
      });
      torch::stable::parallel_for(0, strips, 1, [&](int64_t begin, int64_t end) {
        kernel.sum_strips(job, i, begin * kernel.strip, std::min(end * kernel.strip, d));
      });
    }
  }
}

// Large pages for memory that is written for the first time: faults would take longer than the sums.
void advise(const std::optional<Tensor>& tensor) {
#if defined(__linux__)
  constexpr uintptr_t kPage = 1 << 21;
  if (tensor) {
    const uintptr_t begin = reinterpret_cast<uintptr_t>(tensor->mutable_data_ptr());
    const uintptr_t end = begin + tensor->numel() * tensor->element_size();
    const uintptr_t first = (begin + kPage - 1) / kPage * kPage, last = end / kPage * kPage;
    if (first < last) {
      madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
    }
  }
#endif
}

template <typename T>
void compute(const Tensor& values, const Tensor& latents, const std::optional<Tensor>& extra,
             const std::vector<Tensor>& grads, const std::vector<int64_t>& widths, const std::optional<Tensor>& x,
             const std::optional<Tensor>& W_dec, const std::optional<Tensor>& b_dec,
             const std::optional<Tensor>& dW_enc, const std::optional<Tensor>& db_enc,
             const std::optional<Tensor>& dW_dec, bool accumulate) {
  const Tensor& out = dW_enc ? *dW_enc : *dW_dec;
  if (!accumulate) {
    advise(dW_enc);
    advise(dW_dec);
  }
  const int64_t num_latents = out.size(0), d = out.size(1);
  std::vector<int64_t> starts(num_latents + 1);
  std::vector<Pair<T>> pairs =
      sort_pairs<T>(values, latents, data_or_null<T>(extra), widths, grads[0].size(0), starts);
  std::vector<const T*> gradients;
  for (const Tensor& grad : grads) {
    gradients.push_back(grad.const_data_ptr<T>());
  }
  const LatentJob<T> job = {pairs.data(),
                            starts.data(),
                            {gradients.data(), data_or_null<T>(x), data_or_null<T>(b_dec), d},
                            output_or_null<T>(dW_enc),
                            output_or_null<T>(db_enc),
                            output_or_null<T>(dW_dec),
                            accumulate};
  sum_latents(job, num_latents, dW_enc ? W_dec : std::nullopt);
}

// grads and x, too, are of the type computed in.
void latent_gradients(const Tensor& values, const Tensor& latents, const std::optional<Tensor>& extra,
                      const std::vector<Tensor>& grads, const std::vector<int64_t>& widths,
                      const std::optional<Tensor>& x, const std::optional<Tensor>& W_dec,
                      const std::optional<Tensor>& b_dec, const std::optional<Tensor>& dW_enc,
                      const std::optional<Tensor>& db_enc, const std::optional<Tensor>& dW_dec, bool accumulate) {
  if (is_double(values)) {
    compute<double>(values, latents, extra, grads, widths, x, W_dec, b_dec, dW_enc, db_enc, dW_dec, accumulate);
  } else {
    compute<float>(values, latents, extra, grads, widths, x, W_dec, b_dec, dW_enc, db_enc, dW_dec, accumulate);
  }
}

template <typename T>
void sum_some_rows(const Tensor& rows, const T* weights, const Tensor& out) {
  const int64_t count = rows.size(0), d = rows.size(1), parts = (count + kRows - 1) / kRows;
  const Tensor sums = parts <= 1 ? out : torch::stable::new_empty(out, {parts, d});
  torch::stable::parallel_for(0, std::max<int64_t>(parts, 1), grain(kRows * d), [&](int64_t begin, int64_t end) {
    const WideRows<T> wide(rows, kRows);
    for (int64_t part = begin; part < end; ++part) {
      const int64_t first = part * kRows, some = std::min(kRows, count - first);
      kernels<T>().gradients.sum_rows(sums.mutable_data_ptr<T>() + part * d, wide(first, some),
                                      weights ? weights + first : nullptr, some, d);
    }
  });
  if (parts > 1) {
    sum_some_rows<T>(sums, nullptr, out);
  }
}

Tensor sum_rows(const Tensor& rows, const std::optional<Tensor>& weights, const Tensor& like) {
  const Tensor out = torch::stable::new_empty(like, {rows.size(1)});
  if (is_double(like)) {
    sum_some_rows<double>(rows, data_or_null<double>(weights), out);
  } else {
    sum_some_rows<float>(rows, data_or_null<float>(weights), out);
  }
  return out;
}

template <typename T>
void dots(const Tensor& latents, const Tensor& W, const Tensor& grad, const Tensor& out) {
  const int64_t k = latents.size(1), d = W.size(1);
  torch::stable::parallel_for(0, latents.size(0), grain(k * d), [&](int64_t begin, int64_t end) {
    const WideRows<T> rows(W, 1);
    const int32_t* const latent = latents.const_data_ptr<int32_t>();
    for (int64_t p = begin * k; p < end * k; ++p) {
      out.mutable_data_ptr<T>()[p] =
          kernels<T>().gradients.dot(grad.const_data_ptr<T>() + p / k * d, rows(latent[p], 1), d);
    }
  });
}

Tensor gather_dot(const Tensor& latents, const Tensor& W, const Tensor& grad) {
  const Tensor out = torch::stable::new_empty(grad, {latents.size(0), latents.size(1)});
  is_double(grad) ? dots<double>(latents, W, grad, out) : dots<float>(latents, W, grad, out);
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(saemnesia_fast_cpu, m) {
  define_gradient_ops(m);
}

STABLE_TORCH_LIBRARY_IMPL(saemnesia_fast_cpu, CPU, m) {
  m.impl("latent_gradients", TORCH_BOX(&latent_gradients));
  m.impl("sum_rows", TORCH_BOX(&sum_rows));
  m.impl("gather_dot", TORCH_BOX(&gather_dot));
}

}  // namespace saemnesia_fast
