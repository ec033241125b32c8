// erase, mode "exact": x' = x + sum over steered i of (factor_i - 1) z_i W_dec[i] (SPEC 3.1, 3.2).
#include "decode.h"
#include "ops.h"
#include "probe.h"

namespace saemnesia_fast {
namespace {

// `out` is x or a copy of it.
template <typename T>
void erase_rows(const Rows& x, const Encoder<T>& encoder, const Matrix& W_dec, int64_t k, const Lines<T>& lines,
                const std::vector<T>& factors, const Rows& out) {
  const auto steers = [&](int64_t s) {
    return lines.thresholds[s] < std::numeric_limits<T>::infinity() && factors[s] != 1;
  };
  std::vector<Probed<T>> tokens = probe_tokens(encoder, x, lines, k, steers, [](int64_t, int64_t, T) {});
  torch::stable::parallel_for(0, int64_t(tokens.size()), grain(x.d), [&](int64_t begin, int64_t end) {
    GatherSum<T> gather(W_dec);
    for (int64_t i = begin; i < end; ++i) {
      Probed<T>& token = tokens[i];
      const int64_t m = token.search.token;
      if (!token.search.finite) {
        out.assign(m, [](int64_t) { return std::numeric_limits<T>::quiet_NaN(); });
        continue;
      }
      auto& steered = token.candidates;
      const auto lost = [&](const Candidate<T>& candidate) { return !token.kept(candidate); };
      steered.erase(std::remove_if(steered.begin(), steered.end(), lost), steered.end());
      if (steered.empty()) {
        continue;
      }
      std::sort(steered.begin(), steered.end(),
                [](const Candidate<T>& a, const Candidate<T>& b) { return a.latent < b.latent; });
      for (const Candidate<T>& candidate : steered) {
        gather.add((factors[candidate.position] - 1) * candidate.latent.value, candidate.latent.index);
      }
      const T* delta = gather.sum();
      out.assign(m, [&](int64_t c) { return x.at<T>(m, c) + delta[c]; });
    }
  });
}

}  // namespace

void erase(const Tensor& x, const Tensor& W_enc, const Tensor& b_enc, const Tensor& b_dec, const Tensor& W_dec,
           int64_t k, const Tensor& latents, const Tensor& thresholds, const Tensor& factors, Tensor& out) {
  if (is_double(x)) {
    erase_rows<double>(Rows(x), {W_enc, b_enc, b_dec}, Matrix(W_dec), k, {latents, thresholds},
                       numbers<double>(factors), Rows(out));
  } else {
    erase_rows<float>(Rows(x), {W_enc, b_enc, b_dec}, Matrix(W_dec), k, {latents, thresholds}, numbers<float>(factors),
                      Rows(out));
  }
}

}  // namespace saemnesia_fast
