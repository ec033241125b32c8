// probe: activations of the selected latents, and which of them erase would steer (SPEC 3.1).
#include "probe.h"

#include "ops.h"

namespace saemnesia_fast {
namespace {

template <typename T>
void probe_all(const Rows& x, const Encoder<T>& encoder, int64_t k, const Lines<T>& lines, const Rows& activations,
               bool* steered) {
  const int64_t S = lines.entries;
  std::vector<T> seen(x.count() * S);
  const auto all = [](int64_t) { return true; };
  const auto note = [&](int64_t m, int64_t entry, T value) { seen[m * S + entry] = value; };
  for (const Probed<T>& token : probe_tokens(encoder, x, lines, k, all, note)) {
    const int64_t m = token.search.token;
    if (!token.search.finite) {
      std::fill_n(seen.begin() + m * S, S, std::numeric_limits<T>::quiet_NaN());
    }
    for (const Candidate<T>& candidate : token.candidates) {
      steered[m * S + candidate.position % S] = token.kept(candidate);
    }
  }
  for (int64_t m = 0; m < x.count(); ++m) {
    activations.assign(m, [&](int64_t s) { return seen[m * S + s]; });
  }
}

}  // namespace

std::tuple<Tensor, Tensor> probe(const Tensor& x, const Tensor& W_enc, const Tensor& b_enc, const Tensor& b_dec,
                                 int64_t k, const Tensor& latents, const Tensor& thresholds) {
  std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end());
  shape.back() = latents.size(1);
  const Tensor activations = torch::stable::new_empty(x, shape);
  const Tensor steered = torch::stable::new_zeros(x, shape, ScalarType::Bool);
  bool* const flags = static_cast<bool*>(steered.mutable_data_ptr());
  if (is_double(x)) {
    probe_all<double>(Rows(x), {W_enc, b_enc, b_dec}, k, {latents, thresholds}, Rows(activations), flags);
  } else {
    probe_all<float>(Rows(x), {W_enc, b_enc, b_dec}, k, {latents, thresholds}, Rows(activations), flags);
  }
  return {activations, steered};
}

}  // namespace saemnesia_fast
