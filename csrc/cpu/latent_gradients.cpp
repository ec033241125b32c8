// latent_gradients (SPEC 4.3) and what it consists of, in torch's threads.
#include <torch/csrc/stable/library.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "pairs.h"

namespace saemnesia_fast {
namespace {

// Rows that are summed one after another.
constexpr int64_t kRows = 128;

// The gradients as matrices; null where not wanted. db_enc is never added to: the gradient of b_dec needs it by itself.
template <typename T>
struct Matrices {
  static constexpr int64_t kWork = 1;
  const SortedPairs<T>& sorted;
  T* dW_enc;
  T* db_enc;
  T* dW_dec;
  bool accumulate;

  int64_t count(int64_t i) const { return sorted.count(i); }
  int64_t d() const { return sorted.rows.d; }

  GradientRows<T> out(int64_t i, T* = nullptr, T* = nullptr) const {
    return {dW_enc ? dW_enc + i * d() : nullptr, db_enc ? db_enc + i : nullptr,
            dW_dec ? dW_dec + i * d() : nullptr};
  }

  GradientRows<const T> from(int64_t i) const {
    return accumulate ? GradientRows<const T>{out(i).dW_enc, nullptr, out(i).dW_dec} : GradientRows<const T>{};
  }

  bool idle(int64_t i) const {
    const bool unchanged = accumulate && count(i) == 0;
    if (unchanged && db_enc) {
      db_enc[i] = 0;
    }
    return unchanged;
  }

  void done(int64_t, const GradientRows<T>&) const {}

  void prefetch(int64_t i) const {
    saemnesia_fast::prefetch(from(i).dW_enc, d());
    saemnesia_fast::prefetch(from(i).dW_dec, d());
  }
};

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
  const GivenPairs<T> given(values, latents, extra, widths, grads[0].size(0));
  std::vector<int64_t> starts(num_latents + 1);
  given.count(starts.data(), num_latents);
  std::vector<Pair<T>> pairs(starts.back());
  given.sort(starts.data(), num_latents, pairs.data());
  const std::vector<const T*> gradients = addresses<T>(grads);
  const SortedPairs<T> sorted = {pairs.data(), starts.data(), num_latents,
                                 {gradients.data(), data_or_null<T>(x), data_or_null<T>(b_dec), d}};
  sum_latents(sorted, dW_enc ? W_dec : std::nullopt,
              Matrices<T>{sorted, output_or_null<T>(dW_enc), output_or_null<T>(db_enc), output_or_null<T>(dW_dec),
                          accumulate});
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

STABLE_TORCH_LIBRARY_FRAGMENT(saemnesia_fast_cpu, m) { define_gradient_ops(m); }

STABLE_TORCH_LIBRARY_IMPL(saemnesia_fast_cpu, CPU, m) {
  m.impl("latent_gradients", TORCH_BOX(&latent_gradients));
  m.impl("sum_rows", TORCH_BOX(&sum_rows));
  m.impl("gather_dot", TORCH_BOX(&gather_dot));
}

}  // namespace saemnesia_fast
