// Pre-activations of chosen latents for chosen tokens, tile by tile.
#pragma once

#include <algorithm>

#include "tensors.h"

namespace saemnesia_fast {

// Beyond this magnitude products may overflow where those of ordinary tokens cannot.
template <typename T>
constexpr T kOrdinary = T(0x1p96);

// The panel [d, lanes] of x less b_dec for tokens that `token(l)` names for l < count.
template <typename T, typename Which>
void pack_tokens(const Encoder<T>& encoder, const Rows& x, T* panel, int64_t count, const Which& token) {
  std::vector<int64_t> offsets(count);
  for (int64_t l = 0; l < count; ++l) {
    offsets[l] = x.offsets[token(l)];
  }
  kernels<T>().pack(panel, x.data, x.storage, offsets.data(), count, x.stride, encoder.shift.data(), x.d);
}

// Tokens of x less b_dec, side by side in panels.
template <typename T>
class Panels {
 public:
  // For tokens that `token(i)` names for i < count.
  template <typename Which>
  Panels(const Encoder<T>& encoder, const Rows& x, int64_t tokens, const Which& token)
      : kernels_(kernels<T>()),
        size_(encoder.W.d * kernels_.lanes),
        count_((tokens + kernels_.lanes - 1) / kernels_.lanes),
        data_(size_ * count_),
        exceeds_(count_ * kernels_.lanes) {
    torch::stable::parallel_for(0, count_, grain(size_), [&](int64_t begin, int64_t end) {
      for (int64_t p = begin; p < end; ++p) {
        const int64_t first = p * kernels_.lanes, lanes = std::min(kernels_.lanes, tokens - first);
        pack_tokens(encoder, x, panel(p), lanes, [&](int64_t l) { return token(first + l); });
        kernels_.check(panel(p), x.d, kOrdinary<T>, &exceeds_[first]);
      }
    });
  }

  int64_t count() const { return count_; }
  T* panel(int64_t p) const { return data_.get() + p * size_; }
  bool exceeds(int64_t i) const { return exceeds_[i]; }

 private:
  const Kernels<T>& kernels_;
  int64_t size_;
  int64_t count_;
  Buffer<T> data_;
  Buffer<uint8_t> exceeds_;
};

// Pre-activations of some latents for the tokens of a panel: value(r, l), and the largest of a register tile's.
template <typename T>
class Products {
 public:
  static constexpr int64_t kTiles = 4;

  explicit Products(const Encoder<T>& encoder)
      : kernels_(kernels<T>()),
        encoder_(encoder),
        rows_((encoder.W.d + kBlock - 1) / kBlock * kTiles * kernels_.tile * kBlockStride),
        bias_(kTiles * kernels_.tile),
        values_(kTiles * kernels_.tile * kernels_.lanes),
        maxima_(kTiles * kernels_.lanes) {}

  // Latents at a time.
  static int64_t capacity() { return kTiles * kernels<T>().tile; }

  // The latents that `latent(r)` names for r < count.
  template <typename Which>
  void load(int64_t count, const Which& latent) {
    tiles_ = (count + kernels_.tile - 1) / kernels_.tile;
    which_.resize(tiles_ * kernels_.tile);
    for (int64_t r = 0; r < int64_t(which_.size()); ++r) {
      which_[r] = latent(std::min(r, count - 1));
      bias_[r] = encoder_.bias[which_[r]];
    }
    kernels_.load_rows(rows_.get(), encoder_.W.data(), encoder_.W.storage, which_.data(), int64_t(which_.size()),
                       encoder_.W.d);
  }

  void multiply(const T* panel, T* poison) {
    kernels_.multiply(values_.get(), maxima_.get(), poison, rows_.get(), panel, bias_.get(), tiles_, encoder_.W.d);
  }

  T value(int64_t r, int64_t l) const { return values_[r * kernels_.lanes + l]; }
  T largest(int64_t tile, int64_t l) const { return maxima_[tile * kernels_.lanes + l]; }
  int64_t tiles() const { return tiles_; }

 private:
  const Kernels<T>& kernels_;
  const Encoder<T>& encoder_;
  Buffer<T> rows_;
  Buffer<T> bias_;
  Buffer<T> values_;
  Buffer<T> maxima_;
  std::vector<int64_t> which_;
  int64_t tiles_ = 0;
};

}  // namespace saemnesia_fast
