// Sums over the pairs of each latent in torch's threads. latent_gradients and adam_latents differ in what becomes of
// them.
#pragma once

#include <algorithm>

#include "../gradient_ops.h"
#include "tensors.h"

namespace saemnesia_fast {

// A latent with more pairs is shared by the threads; the sums are the same.
constexpr int64_t kShared = 1024;
// Latents and pairs for which memory is asked ahead of time.
constexpr int64_t kAhead = 2;
constexpr int64_t kPairsAhead = 4;

// The pairs as an op is given them: widths[g] of each token in group g, one group after another.
template <typename T>
struct GivenPairs {
  const T* values;
  const int32_t* latents;
  const T* extra;
  const std::vector<int64_t>& widths;
  int64_t tokens;
  int64_t size;

  GivenPairs(const Tensor& values, const Tensor& latents, const std::optional<Tensor>& extra,
             const std::vector<int64_t>& widths, int64_t tokens)
      : values(values.const_data_ptr<T>()),
        latents(latents.const_data_ptr<int32_t>()),
        extra(data_or_null<T>(extra)),
        widths(widths),
        tokens(tokens),
        size(values.numel()) {}

  // A pair without value and extra term is left out.
  bool active(int64_t p) const { return values[p] != 0 || (extra && extra[p] != 0); }

  // starts [num_latents + 1]: where each latent's pairs begin once sorted.
  void count(int64_t* starts, int64_t num_latents) const {
    std::fill_n(starts, num_latents + 1, 0);
    for (int64_t p = 0; p < size; ++p) {
      starts[latents[p] + 1] += active(p);
    }
    for (int64_t i = 0; i < num_latents; ++i) {
      starts[i + 1] += starts[i];
    }
  }

  // By latent and else as they came.
  void sort(const int64_t* starts, int64_t num_latents, Pair<T>* pairs) const {
    std::vector<int64_t> next(starts, starts + num_latents);
    int64_t p = 0;
    for (size_t group = 0; group < widths.size(); ++group) {
      for (int64_t token = 0; token < tokens; ++token) {
        for (int64_t j = 0; j < widths[group]; ++j, ++p) {
          if (active(p)) {
            pairs[next[latents[p]]++] = {int32_t(token), int32_t(group), values[p], extra ? extra[p] : T(0)};
          }
        }
      }
    }
  }
};

template <typename T>
std::vector<const T*> addresses(const std::vector<Tensor>& tensors) {
  std::vector<const T*> data;
  for (const Tensor& tensor : tensors) {
    data.push_back(tensor.const_data_ptr<T>());
  }
  return data;
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

template <typename T>
void prefetch(const T* row, int64_t d) {
  constexpr int64_t kLine = 64 / sizeof(T);
  for (int64_t c = 0; row && c < d; c += kLine) {
    __builtin_prefetch(row + c, 0, 2);
  }
}

// For every latent i: the slopes of its pairs, if there is W_dec; its sums; and what `target` makes of them. That has
//   kWork           how many pairs a latent's own work is worth
//   idle(i)         whether it needs no sums of latent i, and is done with it
//   from(i)         what the sums are added to
//   out(i, enc, dec)  where they go; enc and dec are memory of the thread for a row each
//   done(i, out)
//   prefetch(i)     fetches what it reads of latent i
template <typename T, typename Target>
void sum_latents(const SortedPairs<T>& sorted, const std::optional<Tensor>& W_dec, const Target& target) {
  const GradientKernels<T>& kernel = kernels<T>().gradients;
  const PairRows<T, T>& of = sorted.rows;
  const int64_t* const starts = sorted.starts;
  const int64_t d = of.d, strips = (d + kernel.strip - 1) / kernel.strip, pitch = strips * kernel.strip;
  const auto weight = [&](int64_t i) { return starts[i] + Target::kWork * i; };
  const auto latent_at = [&](int64_t share) {
    int64_t low = 0, high = sorted.num_latents;
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      weight(middle) < share ? low = middle + 1 : high = middle;
    }
    return low;
  };
  // use(first, last, from) for each segment of latent i, and once if it has no pairs
  const auto segments = [&](int64_t i, const GradientRows<T>& out, const auto& use) {
    GradientRows<const T> from = target.from(i);
    for (int64_t first = starts[i]; first == starts[i] || first < starts[i + 1]; first += kSegment) {
      use(first, std::min(first + kSegment, starts[i + 1]), from);
      from = {out.dW_enc, out.db_enc, out.dW_dec};
    }
  };
  const auto directions = [&] { return W_dec ? std::optional<WideRows<T>>(std::in_place, *W_dec, 1) : std::nullopt; };
  torch::stable::parallel_for(0, weight(sorted.num_latents), grain(2 * d), [&](int64_t begin, int64_t end) {
    const auto rows = directions();
    const Buffer<T> own(2 * pitch);
    const int64_t last_latent = latent_at(end);
    int64_t ahead = latent_at(begin), fetched = starts[ahead];
    for (int64_t i = ahead; i < last_latent; ++i) {
      for (; ahead < last_latent && ahead <= i + kAhead; ++ahead) {
        prefetch(rows && sorted.count(ahead) ? rows->lies(ahead) : nullptr, d);
        target.prefetch(ahead);
      }
      if (sorted.count(i) > kShared || target.idle(i)) {
        continue;
      }
      const T* const direction = rows && sorted.count(i) ? (*rows)(i, 1) : nullptr;
      const GradientRows<T> out = target.out(i, own.get(), own.get() + pitch);
      segments(i, out, [&](int64_t first, int64_t last, const GradientRows<const T>& from) {
        fetched = std::max(fetched, first);
        for (; fetched < std::min(last + kPairsAhead, starts[last_latent]); ++fetched) {
          const Pair<T>& pair = sorted.pairs[fetched];
          prefetch(of.grads[pair.group] + pair.token * d, d);
          prefetch(of.x ? of.x + pair.token * d : nullptr, d);
        }
        if (direction) {
          kernel.add_slopes(sorted, direction, first, last);
        }
        kernel.add_segment(sorted, first, last, from, out, 0, d);
      });
      target.done(i, out);
    }
  });
  const Buffer<T> own(2 * pitch);
  for (int64_t i = 0; i < sorted.num_latents; ++i) {
    if (sorted.count(i) > kShared && !target.idle(i)) {
      if (W_dec) {
        torch::stable::parallel_for(starts[i], starts[i + 1], grain(d), [&](int64_t begin, int64_t end) {
          kernel.add_slopes(sorted, (*directions())(i, 1), begin, end);
        });
      }
      const GradientRows<T> out = target.out(i, own.get(), own.get() + pitch);
      torch::stable::parallel_for(0, strips, 1, [&](int64_t begin, int64_t end) {
        segments(i, out, [&](int64_t first, int64_t last, const GradientRows<const T>& from) {
          kernel.add_segment(sorted, first, last, from, out, begin * kernel.strip, std::min(end * kernel.strip, d));
        });
      });
      target.done(i, out);
    }
  }
}

}  // namespace saemnesia_fast
