// The k largest pre-activations of given tokens.
#pragma once

#include <algorithm>

#include "tensors.h"

namespace saemnesia_fast {

template <typename T>
struct Latent {
  T value;
  int32_t index;

  // The order of SPEC 1.2: larger values first, equal ones by ascending index.
  friend bool operator<(const Latent& a, const Latent& b) {
    return a.value > b.value || (a.value == b.value && a.index < b.index);
  }
};

// The k first latents above `floor`, of those pushed so far; pushed by ascending index within a thread.
template <typename T>
struct Best {
  void push(Latent<T> latent, int64_t k) {
    kept.push_back(latent);
    if (int64_t(kept.size()) >= 2 * k + 64) {
      shrink(k);
    }
  }

  void shrink(int64_t k) {
    if (int64_t(kept.size()) >= k) {
      std::nth_element(kept.begin(), kept.begin() + (k - 1), kept.end());
      kept.resize(k);
      floor = std::max(floor, kept.back().value);
    }
  }

  T floor = 0;
  std::vector<Latent<T>> kept;
};

// A token whose k largest are wanted as far as they exceed `best.floor`; given up once the k-th is above `ceiling`.
template <typename T>
struct Search {
  int64_t token;
  T ceiling = std::numeric_limits<T>::infinity();
  Best<T> best;
  bool finite = true;
};

// Completes searches for tokens of x: `best.kept` are the first of the token's k largest above the floor that it had,
// `finite` says whether the token and its pre-activations are. A token's products do not depend on its neighbours.
// Latents are taken in rounds that double, so that a token whose ceiling is soon reached costs little; what is found
// depends neither on the rounds nor on the threads.
template <typename T>
void complete(const Encoder<T>& encoder, const Rows& x, std::vector<Search<T>>& searches, int64_t k);

}  // namespace saemnesia_fast
