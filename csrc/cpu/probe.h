// Which selected latents of a token could be steered, and which of those are among its k largest (SPEC 3.1, 3.3).
#pragma once

#include "products.h"
#include "search.h"

namespace saemnesia_fast {

// G lines of S selected latents, each line for an equal share of consecutive tokens.
template <typename T>
struct Lines {
  Lines(const Tensor& latents, const Tensor& thresholds)
      : groups(latents.size(0)),
        entries(latents.size(1)),
        latents(integers(latents)),
        thresholds(numbers<T>(thresholds)) {}

  int64_t groups;
  int64_t entries;
  std::vector<int64_t> latents;
  std::vector<T> thresholds;
};

// A latent of a token that is above max(threshold, 0), and where its line has it: line * S + entry.
template <typename T>
struct Candidate {
  Latent<T> latent;
  int64_t position;
};

template <typename T>
struct Probed {
  Search<T> search;
  std::vector<Candidate<T>> candidates;

  bool kept(const Candidate<T>& candidate) const {
    const auto same = [&](const Latent<T>& latent) { return latent.index == candidate.latent.index; };
    return search.finite && std::any_of(search.best.kept.begin(), search.best.kept.end(), same);
  }
};

// The candidates of all tokens among the entries for which `wanted(position)`; `seen(token, entry, value)` is told each
// of their pre-activations.
template <typename T, typename Wanted, typename Seen>
std::vector<std::vector<Candidate<T>>> find_candidates(const Encoder<T>& encoder, const Rows& x, const Lines<T>& lines,
                                                       std::vector<uint8_t>& exceeds, const Wanted& wanted,
                                                       const Seen& seen) {
  constexpr int64_t kTokens = 512;
  std::vector<std::vector<Candidate<T>>> candidates(x.count());
  const int64_t share = x.count() / lines.groups, lanes = kernels<T>().lanes, capacity = Products<T>::capacity();
  for (int64_t begin = 0, end; begin < x.count(); begin = end) {
    const int64_t group = begin / share;
    end = std::min(begin + kTokens, (group + 1) * share);
    std::vector<int64_t> positions;
    for (int64_t s = group * lines.entries; s < (group + 1) * lines.entries; ++s) {
      if (wanted(s)) {
        positions.push_back(s);
      }
    }
    const int64_t entries = int64_t(positions.size());
    const Panels<T> panels(encoder, x, end - begin, [&](int64_t i) { return begin + i; });
    for (int64_t m = begin; m < end; ++m) {
      exceeds[m] = panels.exceeds(m - begin);
    }
    const int64_t work = entries * encoder.W.d * lanes;
    torch::stable::parallel_for(0, entries ? panels.count() : 0, grain(work), [&](int64_t from, int64_t to) {
      Products<T> products(encoder);
      Buffer<T> poison(lanes);
      std::fill_n(poison.get(), lanes, T(0));
      for (int64_t first = 0; first < entries; first += capacity) {
        const int64_t count = std::min(capacity, entries - first);
        products.load(count, [&](int64_t r) { return lines.latents[positions[first + r]]; });
        for (int64_t p = from; p < to; ++p) {
          products.multiply(panels.panel(p), poison.get());
          for (int64_t m = begin + p * lanes; m < std::min(end, begin + (p + 1) * lanes); ++m) {
            for (int64_t r = 0; r < count; ++r) {
              const T value = products.value(r, (m - begin) % lanes);
              const int64_t position = positions[first + r];
              seen(m, position - group * lines.entries, value);
              if (value > 0 && value > lines.thresholds[position]) {
                candidates[m].push_back({{value, int32_t(lines.latents[position])}, position});
              }
            }
          }
        }
      }
    });
  }
  return candidates;
}

// The tokens with a candidate, or with NaN or numbers so large that their pre-activations must be looked at: only these
// need the encoder, and only as long as a candidate may still be among the k largest.
template <typename T, typename Wanted, typename Seen>
std::vector<Probed<T>> probe_tokens(const Encoder<T>& encoder, const Rows& x, const Lines<T>& lines, int64_t k,
                                    const Wanted& wanted, const Seen& seen) {
  std::vector<uint8_t> exceeds(x.count());
  auto candidates = find_candidates(encoder, x, lines, exceeds, wanted, seen);
  std::vector<Search<T>> searches;
  for (int64_t m = 0; m < x.count(); ++m) {
    if (candidates[m].empty() && !exceeds[m]) {
      continue;
    }
    T least = std::numeric_limits<T>::max(), most = 0;
    for (const Candidate<T>& candidate : candidates[m]) {
      least = std::min(least, candidate.latent.value);
      most = std::max(most, candidate.latent.value);
    }
    Search<T> search;
    search.token = m;
    search.ceiling = most;
    search.best.floor = std::nextafter(least, T(0));
    searches.push_back(std::move(search));
  }
  complete(encoder, x, searches, k);
  std::vector<Probed<T>> probed;
  for (Search<T>& search : searches) {
    std::vector<Candidate<T>>& its = candidates[search.token];
    probed.push_back({std::move(search), std::move(its)});
  }
  return probed;
}

}  // namespace saemnesia_fast
