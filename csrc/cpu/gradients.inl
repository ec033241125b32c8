// The loops of gradients.h in the vectors of one instruction set; included by kernels.inl.

template <typename T, int Count>
struct VectorStrip {
  static constexpr int kCount = Count;
  Vector<T> at[Count];
};

// One thread that holds all channels of a strip.
template <typename T>
struct HostLanes {
  static constexpr int kStripVectors = VECTOR_BYTES == 64 ? 8 : 4;
  static constexpr int64_t kStrip = kStripVectors * kWidth<T>;
  using Strip = VectorStrip<T, kStripVectors>;
  using DotStrip = VectorStrip<T, kDotLanes / kWidth<T>>;

  template <typename S>
  inline __attribute__((always_inline)) S load(const T* row, int64_t c, int64_t d) const {
    constexpr int64_t kChannels = sizeof(S) / sizeof(T);
    S strip;
    if (c + kChannels <= d) {
      SAEMNESIA_UNROLL
      for (int v = 0; v < S::kCount; ++v) {
        __builtin_memcpy(&strip.at[v], row + c + v * kWidth<T>, sizeof strip.at[v]);
      }
      return strip;
    }
    T wide[kChannels] = {};
    for (int64_t i = c; i < d; ++i) {
      wide[i - c] = row[i];
    }
    __builtin_memcpy(&strip, wide, sizeof strip);
    return strip;
  }

  template <typename S>
  inline __attribute__((always_inline)) void store(T* row, int64_t c, int64_t d, const S& strip) const {
    constexpr int64_t kChannels = sizeof(S) / sizeof(T);
    if (c + kChannels <= d) {
      __builtin_memcpy(row + c, &strip, sizeof strip);
      return;
    }
    T wide[kChannels];
    __builtin_memcpy(wide, &strip, sizeof strip);
    for (int64_t i = c; i < d; ++i) {
      row[i] = wide[i - c];
    }
  }

  // In the order of a warp: four neighbours in a thread, then the threads by halves.
  T total(const DotStrip& strip) const {
    constexpr int kThreads = kDotLanes / 4;
    T lanes[kDotLanes], sums[kThreads];
    __builtin_memcpy(lanes, &strip, sizeof lanes);
    for (int t = 0; t < kThreads; ++t) {
      sums[t] = (lanes[4 * t] + lanes[4 * t + 1]) + (lanes[4 * t + 2] + lanes[4 * t + 3]);
    }
    for (int half = kThreads / 2; half > 0; half /= 2) {
      for (int t = 0; t < half; ++t) {
        sums[t] += sums[t + half];
      }
    }
    return sums[0];
  }

  template <typename Use>
  inline __attribute__((always_inline)) void each(int64_t d, const Use& use) const {
#pragma GCC ivdep
    for (int64_t c = 0; c < d; ++c) {
      use(c);
    }
  }

  static constexpr int kHeldOfBlock = kMostBlock;

  template <typename Use>
  inline __attribute__((always_inline)) void each_held(int64_t count, const Use& use) const {
    each(count, [&](int64_t c) { use(c, c); });
  }

  uint32_t largest(uint32_t number) const { return number; }
  void sync() const {}
};

template <typename T>
void widen_all(T* wide, const void* narrow, Storage storage, int64_t count) {
  with_elements(narrow, storage, [&](auto elements) {
    for (int64_t i = 0; i < count; ++i) {
      wide[i] = T(widen(elements[i]));
    }
  });
}

template <typename T>
void add_slopes(const SortedPairs<T>& sorted, const T* direction, int64_t first, int64_t last) {
  for (int64_t q = first; q < last; ++q) {
    add_slope(HostLanes<T>(), sorted.pairs[q], sorted.rows.grads, direction, sorted.rows.d);
  }
}

template <typename T>
void add_one_segment(const SortedPairs<T>& sorted, int64_t first, int64_t last, const GradientRows<const T>& from,
                     const GradientRows<T>& out, int64_t begin, int64_t end) {
  const HostLanes<T> lanes;
  for (int64_t c = begin; c < end; c += lanes.kStrip) {
    add_segment(lanes, sorted.pairs + first, last - first, sorted.rows, from, out, c);
  }
}

template <typename T>
void sum_all_rows(T* out, const T* rows, const T* weights, int64_t count, int64_t d) {
  using S = typename HostLanes<T>::Strip;
  constexpr int64_t kAtOnce = 8;
  const HostLanes<T> lanes;
  __builtin_memset(out, 0, d * sizeof(T));
  for (int64_t r = 0; r < count; r += kAtOnce) {
    const int64_t some = count - r < kAtOnce ? count - r : kAtOnce;
    for (int64_t c = 0; c < d; c += lanes.kStrip) {
      S sum = lanes.template load<S>(out, c, d);
      add_rows(lanes, sum, rows + r * d, weights ? weights + r : weights, some, c, d);
      lanes.store(out, c, d, sum);
    }
  }
}

template <typename T>
T dot_rows(const T* a, const T* b, int64_t d) {
  return dot(HostLanes<T>(), a, b, d);
}

template <typename T>
void adam_one_row(const AdamJob<T>& job, const T* grad, int64_t row) {
  adam_row(HostLanes<T>(), job, grad, row);
}

template <typename T>
constexpr GradientKernels<T> kGradientKernels = {HostLanes<T>::kStrip, widen_all<T>, add_slopes<T>,  add_one_segment<T>,
                                                 sum_all_rows<T>,      dot_rows<T>,  adam_one_row<T>};
