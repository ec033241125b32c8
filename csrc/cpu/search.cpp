// Products in register tiles, selected as they come: no pre-activation outlives its tile.
#include "search.h"

#include <functional>
#include <mutex>

#include "products.h"
#include "screened.h"

namespace saemnesia_fast {
namespace {

// Adds the latents [from, to) to the searches, whose tokens lie in `panels` in this order.
template <typename T>
void scan(const Encoder<T>& encoder, const Panels<T>& panels, const std::vector<Search<T>*>& searches, int64_t k,
          int64_t from, int64_t to) {
  const int64_t lanes = kernels<T>().lanes, tile = kernels<T>().tile, capacity = Products<T>::capacity();
  const int64_t chunks = (to - from + capacity - 1) / capacity;
  const int64_t work = capacity * encoder.W.d * lanes * panels.count();
  std::mutex merging;
  torch::stable::parallel_for(0, chunks, grain(work), [&](int64_t begin, int64_t end) {
    Products<T> products(encoder);
    Buffer<T> poison(panels.count() * lanes);
    std::fill_n(poison.get(), panels.count() * lanes, T(0));
    std::vector<Best<T>> best(searches.size());
    for (size_t i = 0; i < searches.size(); ++i) {
      best[i].floor = searches[i]->best.floor;
    }
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      const int64_t first = from + chunk * capacity, count = std::min(capacity, to - first);
      products.load(count, [&](int64_t r) { return first + r; });
      for (int64_t p = 0; p < panels.count(); ++p) {
        products.multiply(panels.panel(p), &poison[p * lanes]);
        const int64_t used = std::min(lanes, int64_t(searches.size()) - p * lanes);
        for (int64_t t = 0; t < products.tiles(); ++t) {
          for (int64_t l = 0; l < used; ++l) {
            Best<T>& mine = best[p * lanes + l];
            if (products.largest(t, l) > mine.floor) {
              for (int64_t r = t * tile; r < std::min(count, (t + 1) * tile); ++r) {
                if (products.value(r, l) > mine.floor) {
                  mine.push({products.value(r, l), int32_t(first + r)}, k);
                }
              }
            }
          }
        }
      }
    }
    const std::lock_guard<std::mutex> lock(merging);
    for (size_t i = 0; i < searches.size(); ++i) {
      std::vector<Latent<T>>& kept = searches[i]->best.kept;
      kept.insert(kept.end(), best[i].kept.begin(), best[i].kept.end());
      searches[i]->finite = searches[i]->finite && poison[int64_t(i)] == 0;
    }
  });
}

// As `complete`, for so few tokens that their panels stay in a cache.
template <typename T>
void complete_some(const Encoder<T>& encoder, const Rows& x, std::vector<Search<T>*> searches, int64_t k) {
  constexpr int64_t kRounds = 4;
  const int64_t N = encoder.W.rows, lanes = kernels<T>().lanes, capacity = Products<T>::capacity();
  const auto decided = [](const Search<T>* search) { return search->best.floor > search->ceiling; };
  const auto pack = [&] {
    const auto token = [&](int64_t i) { return searches[i]->token; };
    return std::make_unique<Panels<T>>(encoder, x, int64_t(searches.size()), token);
  };
  auto panels = pack();
  for (size_t i = 0; i < searches.size(); ++i) {
    if (panels->exceeds(int64_t(i))) {
      searches[i]->ceiling = std::numeric_limits<T>::infinity();
      searches[i]->finite = x.finite(searches[i]->token);
    }
  }
  int64_t from = 0;
  int64_t to = std::min(N, ((N >> kRounds) / capacity + 1) * capacity);
  while (from < N && !searches.empty()) {
    scan(encoder, *panels, searches, k, from, to);
    for (Search<T>* search : searches) {
      search->best.shrink(k);
    }
    const int64_t open = std::count_if(searches.begin(), searches.end(), std::not_fn(decided));
    if ((open + lanes - 1) / lanes < panels->count()) {
      searches.erase(std::remove_if(searches.begin(), searches.end(), decided), searches.end());
      panels = pack();
    }
    from = to;
    to = std::min(N, 2 * to);
  }
}

template <typename Item>
std::vector<Item> slice(const std::vector<Item>& items, size_t begin, size_t count) {
  return {items.begin() + begin, items.begin() + std::min(begin + count, items.size())};
}

}  // namespace

template <typename T>
void complete(const Encoder<T>& encoder, const Rows& x, std::vector<Search<T>>& searches, int64_t k) {
  constexpr size_t kTokens = 512, kScreened = 1024;
  std::vector<Search<T>*> left;
  for (Search<T>& search : searches) {
    left.push_back(&search);
  }
  if constexpr (std::is_same_v<T, float>) {
    std::vector<Search<T>*> undecided;
    for (size_t begin = 0; begin < left.size(); begin += kScreened) {
      auto some = slice(left, begin, kScreened);
      if (screen_pays(encoder, int64_t(some.size()), k)) {
        some = complete_screened(encoder, x, some, k);
      }
      undecided.insert(undecided.end(), some.begin(), some.end());
    }
    left.swap(undecided);
  }
  for (size_t begin = 0; begin < left.size(); begin += kTokens) {
    complete_some(encoder, x, slice(left, begin, kTokens), k);
  }
}

template void complete(const Encoder<float>&, const Rows&, std::vector<Search<float>>&, int64_t);
template void complete(const Encoder<double>&, const Rows&, std::vector<Search<double>>&, int64_t);

}  // namespace saemnesia_fast
