// Sums of decoder rows.
#pragma once

#include "tensors.h"

namespace saemnesia_fast {

// sum_j weight_j * W[index_j], in the order in which the terms are added. A weight of 0 costs nothing.
template <typename T>
class GatherSum {
 public:
  explicit GatherSum(const Matrix& W)
      : W_(W), first_(static_cast<const char*>(W.data())), bytes_(W.d * size_of(W.storage)), sum_(W.d) {}

  void add(T weight, int64_t index) {
    if (weight != 0) {
      weights_.push_back(weight);
      rows_.push_back(first_ + index * bytes_);
    }
  }

  // The sum [d] of what was added since the last.
  const T* sum() {
    kernels<T>().sum_rows(sum_.get(), weights_.data(), rows_.data(), int64_t(rows_.size()), W_.storage, W_.d);
    weights_.clear();
    rows_.clear();
    return sum_.get();
  }

 private:
  const Matrix& W_;
  const char* first_;
  int64_t bytes_;
  Buffer<T> sum_;
  std::vector<T> weights_;
  std::vector<const void*> rows_;
};

}  // namespace saemnesia_fast
