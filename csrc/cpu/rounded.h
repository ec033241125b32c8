// Tokens and latents rounded to 16 bits, and the latents whose pre-activations may exceed a token's floor (screen.h).
#pragma once

#include "products.h"

namespace saemnesia_fast {

// A latent and certified bounds on its pre-activation.
struct Bounded {
  float lower;
  float upper;
  int32_t index;
};

// Starts reading W[begin], ..., W[end - 1].
inline void fetch_rows(const Matrix& W, int64_t begin, int64_t end) {
  const int64_t bytes = W.d * size_of(W.storage);
  const char* const rows = static_cast<const char*>(W.data());
  for (int64_t byte = begin * bytes; byte < end * bytes; byte += 64) {
    __builtin_prefetch(rows + byte);
  }
}

// Tokens of x less b_dec, side by side in panels of pairs.
class RoundedPanels {
 public:
  // For tokens that `token(i)` names for i < count.
  template <typename Which>
  RoundedPanels(const Encoder<float>& encoder, const Rows& x, int64_t tokens, const Which& token)
      : size_((x.d + 1) / 2 * kPanel),
        count_((tokens + kPanel - 1) / kPanel),
        pairs_(size_ * count_),
        scale_(count_ * kPanel),
        factor_(count_ * kPanel),
        exceeds_(count_ * kPanel) {
    torch::stable::parallel_for(0, count_, grain(size_), [&](int64_t begin, int64_t end) {
      Buffer<float> panel(x.d * kPanel);
      for (int64_t p = begin; p < end; ++p) {
        const int64_t first = p * kPanel;
        pack_tokens(encoder, x, panel.get(), std::min(kPanel, tokens - first),
                    [&](int64_t l) { return token(first + l); });
        kernels<float>().check(panel.get(), x.d, kScreenedMost, &exceeds_[first]);
        screen_kernels()->round_panel(pairs(p), scales(p), panel.get(), x.d);
      }
    });
  }

  int64_t count() const { return count_; }
  int32_t* pairs(int64_t p) const { return pairs_.get() + p * size_; }
  Scales scales(int64_t p) const { return {scale_.get() + p * kPanel, factor_.get() + p * kPanel}; }
  bool exceeds(int64_t i) const { return exceeds_[i]; }

 private:
  int64_t size_;
  int64_t count_;
  Buffer<int32_t> pairs_;
  Buffer<float> scale_;
  Buffer<float> factor_;
  Buffer<uint8_t> exceeds_;
};

// Latents in 16 bits, and the screen of a panel for them.
class Screen {
 public:
  static constexpr int64_t kTiles = 4;

  explicit Screen(const Encoder<float>& encoder)
      : encoder_(encoder),
        capacity_(kTiles * screen_kernels()->tile),
        rows_(((encoder.W.d + 1) / 2 + kBlock - 1) / kBlock * capacity_ * kBlockStride),
        row_(encoder.W.d + 32),
        scale_(capacity_),
        factor_(capacity_),
        bias_(capacity_),
        sums_(capacity_ * kPanel),
        where_((capacity_ + 1) * kPanel),
        upper_((capacity_ + 1) * kPanel) {}

  static int64_t capacity() { return kTiles * screen_kernels()->tile; }

  // The latents first, ..., first + count - 1; false if one has NaN or very large numbers.
  bool load(int64_t first, int64_t count) {
    const int64_t tile = screen_kernels()->tile;
    first_ = first;
    tiles_ = (count + tile - 1) / tile;
    bool ordinary = true;
    for (int64_t r = 0; r < tiles_ * tile; ++r) {
      scale_[r] = factor_[r] = 0;
      bias_[r] = -std::numeric_limits<float>::infinity();
      if (r < count) {
        const float bias = encoder_.bias[first + r];
        bias_[r] = bias + std::abs(bias) * kBiasSlack;
        ordinary = ordinary && std::abs(bias) <= kScreenedBias;
      }
    }
    return ordinary && screen_kernels()->round_rows(rows_.get(), {scale_.get(), factor_.get()}, row_.get(),
                                                    encoder_.W.data(), encoder_.W.storage, first, count,
                                                    tiles_ * tile, encoder_.W.d);
  }

  // found(l, latent) for those whose upper bound exceeds floors[l].
  template <typename Found>
  void search(const RoundedPanels& panels, int64_t p, const float* floors, const Found& found) {
    const Scales tokens = panels.scales(p);
    const int64_t count = screen_kernels()->screen(where_.get(), upper_.get(), sums_.get(), rows_.get(),
                                                   panels.pairs(p), {scale_.get(), factor_.get()}, tokens, bias_.get(),
                                                   floors, tiles_, encoder_.W.d);
    for (int64_t i = 0; i < count; ++i) {
      const int64_t r = where_[i] / kPanel, l = where_[i] % kPanel;
      const double upper = upper_[i];
      // Twice the bound and the bias's slack lie between, and a part of each number for its rounding.
      const double between = 2.01 * double(tokens.factor[l]) * factor_[r] +
                             4 * double(kBiasSlack) * std::abs(encoder_.bias[first_ + r]) + 0x1p-22 * std::abs(upper);
      found(l, Bounded{float(upper - between), upper_[i], int32_t(first_ + r)});
    }
  }

 private:
  const Encoder<float>& encoder_;
  int64_t capacity_;
  Buffer<int32_t> rows_;
  Buffer<float> row_;
  Buffer<float> scale_;
  Buffer<float> factor_;
  Buffer<float> bias_;
  Buffer<int32_t> sums_;
  Buffer<int32_t> where_;
  Buffer<float> upper_;
  int64_t first_ = 0;
  int64_t tiles_ = 0;
};

}  // namespace saemnesia_fast
