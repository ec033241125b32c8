// encode_topk: z = TopK(relu((x - b_dec) @ W_enc.T + b_enc), k) per token (SPEC 1.1, 1.2).
#include "ops.h"
#include "search.h"

namespace saemnesia_fast {
namespace {

// Fills up to k with zeros of the lowest latents that are not there yet.
template <typename T>
void pad(std::vector<Latent<T>>& kept, int64_t k) {
  std::sort(kept.begin(), kept.end(), [](const Latent<T>& a, const Latent<T>& b) { return a.index < b.index; });
  const size_t positive = kept.size();
  size_t next = 0;
  for (int32_t index = 0; int64_t(kept.size()) < k; ++index) {
    if (next < positive && kept[next].index == index) {
      ++next;
    } else {
      kept.push_back({T(0), index});
    }
  }
}

template <typename T>
void write(std::vector<Latent<T>> kept, int64_t k, bool finite, const Rows& values, int32_t* indices, int64_t token) {
  if (int64_t(kept.size()) < k) {
    pad(kept, k);
  }
  std::sort(kept.begin(), kept.end());
  values.assign(token, [&](int64_t j) { return finite ? kept[j].value : std::numeric_limits<T>::quiet_NaN(); });
  for (int64_t j = 0; j < k; ++j) {
    indices[token * k + j] = kept[j].index;
  }
}

template <typename T>
void encode(const Rows& x, const Encoder<T>& encoder, int64_t k, const Rows& values, int32_t* indices) {
  std::vector<Search<T>> searches(x.count());
  for (int64_t m = 0; m < x.count(); ++m) {
    searches[m].token = m;
  }
  complete(encoder, x, searches, k);
  torch::stable::parallel_for(0, x.count(), grain(16 * k), [&](int64_t begin, int64_t end) {
    for (int64_t m = begin; m < end; ++m) {
      write(std::move(searches[m].best.kept), k, searches[m].finite, values, indices, m);
    }
  });
}

// The k largest of a row by group maxima: k numbers are at least the k-th largest maximum, and whatever exceeds it lies
// in fewer than k groups. Returns how many columns were taken: whole groups, if there are k of them.
template <typename T>
int64_t select_groups(Best<T>& best, const T* row, int64_t N, int64_t k, bool& finite, std::vector<T>& maxima) {
  const int64_t width = kernels<T>().lanes / 2, groups = N / (kGroup * width) * width;
  if (groups < k) {
    return 0;
  }
  maxima.resize(2 * groups);
  finite = kernels<T>().group_maxima(maxima.data(), row, groups);
  T* const ranked = maxima.data() + groups;
  std::copy_n(maxima.data(), groups, ranked);
  int64_t ranks = groups;
  while (ranks % 2 == 0 && ranks >= 8 * k) {
    ranks /= 2;
    for (int64_t i = 0; i < ranks; ++i) {
      ranked[i] = std::max(ranked[i], ranked[i + ranks]);
    }
  }
  std::nth_element(ranked, ranked + (k - 1), ranked + ranks, std::greater<T>());
  best.floor = std::max(T(0), std::nextafter(ranked[k - 1], T(-1)));
  for (int64_t g = 0; g < groups; ++g) {
    if (maxima[g] > best.floor) {
      for (int64_t j = 0; j < kGroup; ++j) {
        const int64_t column = kernels<T>().column(g, j);
        if (row[column] > best.floor) {
          best.kept.push_back({row[column], int32_t(column)});
        }
      }
    }
  }
  best.shrink(k);
  return groups * kGroup;
}

template <typename T>
void select(const Tensor& pre, int64_t k, const Rows& values, int32_t* indices) {
  const int64_t N = pre.size(1);
  const T* all = pre.const_data_ptr<T>();
  torch::stable::parallel_for(0, pre.size(0), grain(N), [&](int64_t begin, int64_t end) {
    std::vector<T> maxima;
    for (int64_t m = begin; m < end; ++m) {
      const T* row = all + m * N;
      Best<T> best;
      bool finite = true;
      for (int64_t i = select_groups(best, row, N, k, finite, maxima); i < N; ++i) {
        finite = finite && std::isfinite(row[i]);
        if (row[i] > best.floor) {
          best.push({row[i], int32_t(i)}, k);
        }
      }
      best.shrink(k);
      write(std::move(best.kept), k, finite, values, indices, m);
    }
  });
}

std::tuple<Tensor, Tensor> results(const Tensor& x, int64_t k) {
  std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end());
  shape.back() = k;
  return {torch::stable::new_empty(x, shape), torch::stable::new_empty(x, shape, ScalarType::Int)};
}

}  // namespace

std::tuple<Tensor, Tensor> encode_topk(const Tensor& x, const Tensor& W_enc, const Tensor& b_enc, const Tensor& b_dec,
                                       int64_t k) {
  const auto [values, indices] = results(x, k);
  int32_t* const columns = indices.mutable_data_ptr<int32_t>();
  if (is_double(x)) {
    encode<double>(Rows(x), {W_enc, b_enc, b_dec}, k, Rows(values), columns);
  } else {
    encode<float>(Rows(x), {W_enc, b_enc, b_dec}, k, Rows(values), columns);
  }
  return {values, indices};
}

std::tuple<Tensor, Tensor> select_topk(const Tensor& pre, int64_t k) {
  const Tensor rows = torch::stable::contiguous(pre);
  const auto [values, indices] = results(rows, k);
  int32_t* const columns = indices.mutable_data_ptr<int32_t>();
  if (is_double(rows)) {
    select<double>(rows, k, Rows(values), columns);
  } else {
    select<float>(rows, k, Rows(values), columns);
  }
  return {values, indices};
}

}  // namespace saemnesia_fast
