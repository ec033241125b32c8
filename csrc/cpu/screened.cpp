// Latents whose bounds reach among a token's k largest are few; only these are multiplied in float32, and decide.
#include "screened.h"

#include <atomic>
#include <functional>
#include <mutex>

#include "rounded.h"

namespace saemnesia_fast {
namespace {

// The latents that may be among a token's k largest above `floor`. k of them are at least the k-th largest lower bound,
// so one whose upper bound is below that is not among the k largest.
struct Shortlist {
  void push(Bounded latent, int64_t k) {
    kept.push_back(latent);
    if (int64_t(kept.size()) >= 4 * k + 256) {
      shrink(k);
    }
  }

  void shrink(int64_t k) {
    if (int64_t(kept.size()) >= k) {
      const auto larger = [](const Bounded& a, const Bounded& b) { return a.lower > b.lower; };
      std::nth_element(kept.begin(), kept.begin() + (k - 1), kept.end(), larger);
      floor = std::max(floor, std::nextafter(kept[k - 1].lower, -1.0f));
      const auto lost = [&](const Bounded& latent) { return latent.upper <= floor; };
      kept.erase(std::remove_if(kept.begin(), kept.end(), lost), kept.end());
    }
    if (int64_t(kept.size()) > 2 * k + 128) {
      give_up();
    }
  }

  void give_up() {
    undecided = true;
    floor = std::numeric_limits<float>::infinity();
    kept.clear();
  }

  float floor = 0;
  bool undecided = false;
  std::vector<Bounded> kept;
};

struct Screened {
  Search<float>* search;
  Shortlist list;

  bool closed() const { return list.undecided || list.floor > search->ceiling; }
};

// Adds the latents [from, to) to the shortlists of the tokens in `panels`; false if one of them cannot be screened.
bool scan(const Encoder<float>& encoder, const RoundedPanels& panels, std::vector<Screened>& tokens, int64_t k,
          int64_t from, int64_t to) {
  const int64_t capacity = Screen::capacity();
  const int64_t chunks = (to - from + capacity - 1) / capacity;
  const int64_t work = capacity * encoder.W.d * kPanel * panels.count();
  std::atomic<bool> ordinary{true};
  std::mutex merging;
  torch::stable::parallel_for(0, chunks, grain(work), [&](int64_t begin, int64_t end) {
    Screen screen(encoder);
    std::vector<Shortlist> lists(tokens.size());
    Buffer<float> floors(panels.count() * kPanel);
    std::fill_n(floors.get(), panels.count() * kPanel, std::numeric_limits<float>::infinity());
    for (size_t i = 0; i < tokens.size(); ++i) {
      floors[int64_t(i)] = lists[i].floor = tokens[i].list.floor;
      lists[i].kept.reserve(k);
    }
    for (int64_t chunk = begin; chunk < end && ordinary; ++chunk) {
      const int64_t first = from + chunk * capacity;
      const int64_t next = first + capacity, share = (capacity + panels.count() - 1) / panels.count();
      if (!screen.load(first, std::min(capacity, to - first))) {
        ordinary = false;
      }
      for (int64_t p = 0; p < panels.count() && ordinary; ++p) {
        if (chunk + 1 < end) {
          fetch_rows(encoder.W, next + p * share, std::min(to, next + (p + 1) * share));
        }
        screen.search(panels, p, &floors[p * kPanel], [&](int64_t l, Bounded latent) {
          Shortlist& mine = lists[p * kPanel + l];
          if (latent.upper > mine.floor) {
            mine.push(latent, k);
            floors[p * kPanel + l] = mine.floor;
          }
        });
      }
    }
    const std::lock_guard<std::mutex> lock(merging);
    for (size_t i = 0; i < tokens.size(); ++i) {
      Shortlist& list = tokens[i].list;
      if (lists[i].undecided) {
        list.give_up();
      } else if (!list.undecided) {
        list.kept.insert(list.kept.end(), lists[i].kept.begin(), lists[i].kept.end());
      }
    }
  });
  torch::stable::parallel_for(0, int64_t(tokens.size()), grain(16 * k), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      tokens[i].list.shrink(k);
    }
  });
  return ordinary;
}

// The searches' results, from the shortlisted latents' pre-activations in float32.
void settle(const Encoder<float>& encoder, const Rows& x, const std::vector<Screened>& tokens, int64_t k) {
  const int64_t d = x.d, blocks = (d + kBlock - 1) / kBlock;
  const int64_t panels = (int64_t(tokens.size()) + kPanel - 1) / kPanel;
  torch::stable::parallel_for(0, panels, grain(k * d * kPanel), [&](int64_t begin, int64_t end) {
    Buffer<float> panel(d * kPanel), row(d + kBlock);
    Buffer<float> token((blocks + 15) / 16 * kBlock * 16);
    std::fill_n(token.get(), (blocks + 15) / 16 * kBlock * 16, 0.0f);
    for (int64_t p = begin; p < end; ++p) {
      const int64_t first = p * kPanel, used = std::min(kPanel, int64_t(tokens.size()) - first);
      pack_tokens(encoder, x, panel.get(), used, [&](int64_t l) { return tokens[first + l].search->token; });
      for (int64_t l = 0; l < used; ++l) {
        for (int64_t c = 0; c < d; ++c) {
          const int64_t b = c / kBlock;
          token[(b / 16 * kBlock + c % kBlock) * 16 + b % 16] = panel[c * kPanel + l];
        }
        const std::vector<Bounded>& shortlist = tokens[first + l].list.kept;
        Best<float>& best = tokens[first + l].search->best;
        for (size_t i = 0; i < shortlist.size(); ++i) {
          if (i + 1 < shortlist.size()) {
            fetch_rows(encoder.W, shortlist[i + 1].index, shortlist[i + 1].index + 1);
          }
          const int32_t index = shortlist[i].index;
          const float value = screen_kernels()->product(token.get(), row.get(), encoder.W.data(), encoder.W.storage,
                                                        index, d) +
                              encoder.bias[index];
          if (value > best.floor) {
            best.kept.push_back({value, index});
          }
        }
        best.shrink(k);
      }
    }
  });
}

}  // namespace

bool screen_pays(const Encoder<float>& encoder, int64_t tokens, int64_t k) {
  constexpr int64_t kLeastTokens = 96, kLeastProducts = 1 << 18;
  const Matrix& W = encoder.W;
  return screen_kernels() && tokens >= kLeastTokens && W.d >= 64 && W.d <= kScreenedChannels &&
         W.rows * W.d >= kLeastProducts * k;
}

std::vector<Search<float>*> complete_screened(const Encoder<float>& encoder, const Rows& x,
                                              const std::vector<Search<float>*>& searches, int64_t k) {
  constexpr int64_t kRounds = 6;
  const int64_t N = encoder.W.rows, capacity = Screen::capacity();
  std::vector<Screened> tokens(searches.size());
  for (size_t i = 0; i < searches.size(); ++i) {
    tokens[i].search = searches[i];
    tokens[i].list.floor = searches[i]->best.floor;
  }
  std::vector<Search<float>*> left;
  const auto drop_closed = [&] {
    for (const Screened& token : tokens) {
      if (token.list.undecided) {
        left.push_back(token.search);
      }
    }
    tokens.erase(std::remove_if(tokens.begin(), tokens.end(), std::mem_fn(&Screened::closed)), tokens.end());
  };
  const auto pack = [&] {
    const auto token = [&](int64_t i) { return tokens[i].search->token; };
    auto panels = std::make_unique<RoundedPanels>(encoder, x, int64_t(tokens.size()), token);
    for (size_t i = 0; i < tokens.size(); ++i) {
      if (panels->exceeds(int64_t(i))) {
        tokens[i].list.give_up();
      }
    }
    return panels;
  };
  auto panels = pack();
  int64_t from = 0;
  int64_t to = std::min(N, ((N >> kRounds) / capacity + 1) * capacity);
  while (from < N && !tokens.empty()) {
    if (!scan(encoder, *panels, tokens, k, from, to)) {
      return searches;
    }
    const int64_t open = std::count_if(tokens.begin(), tokens.end(), std::not_fn(std::mem_fn(&Screened::closed)));
    if ((open + kPanel - 1) / kPanel < panels->count()) {
      drop_closed();
      panels = pack();
    }
    from = to;
    to = std::min(N, 2 * to);
  }
  drop_closed();
  settle(encoder, x, tokens, k);
  return left;
}

}  // namespace saemnesia_fast
