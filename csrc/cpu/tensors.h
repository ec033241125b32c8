// Tensors as the kernels read and write them.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cmath>
#include <limits>
#include <memory>
#include <new>
#include <type_traits>
#include <vector>

#include "kernels.h"

namespace saemnesia_fast {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline Storage storage_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return Storage::Float32;
    case ScalarType::Double:
      return Storage::Float64;
    case ScalarType::Half:
      return Storage::Float16;
    case ScalarType::BFloat16:
      return Storage::BFloat16;
    default:
      STD_TORCH_CHECK(false, "expected float64, float32, float16 or bfloat16, got ", tensor.scalar_type());
  }
}

inline int64_t size_of(Storage storage) {
  return storage == Storage::Float64 ? 8 : storage == Storage::Float32 ? 4 : 2;
}

inline bool is_double(const Tensor& x) { return x.scalar_type() == ScalarType::Double; }

template <typename T>
T load(const void* data, Storage storage, int64_t offset) {
  T value = 0;
  with_elements(data, storage, [&](auto elements) { value = T(widen(elements[offset])); });
  return value;
}

// Memory for whole vectors of any instruction set, not initialised.
template <typename T>
class Buffer {
 public:
  explicit Buffer(int64_t size) : data_(static_cast<T*>(::operator new(size * sizeof(T), kAlignment))) {}
  T* get() const { return data_.get(); }
  T& operator[](int64_t i) const { return data_.get()[i]; }

 private:
  static constexpr std::align_val_t kAlignment{64};
  struct Delete {
    void operator()(T* data) const { ::operator delete(data, kAlignment); }
  };
  std::unique_ptr<T, Delete> data_;
};

// The rows [M, d] of a tensor [..., d] of any strides, where they lie.
struct Rows {
  explicit Rows(const Tensor& tensor)
      : data(const_cast<void*>(tensor.const_data_ptr())),
        storage(storage_of(tensor)),
        stride(tensor.stride(tensor.dim() - 1)) {
    const int64_t leading = tensor.dim() - 1;
    d = tensor.size(leading);
    offsets.assign(1, 0);
    for (int64_t dim = 0; dim < leading; ++dim) {
      std::vector<int64_t> inner;
      inner.reserve(offsets.size() * tensor.size(dim));
      for (int64_t offset : offsets) {
        for (int64_t i = 0; i < tensor.size(dim); ++i) {
          inner.push_back(offset + i * tensor.stride(dim));
        }
      }
      offsets.swap(inner);
    }
  }

  int64_t count() const { return int64_t(offsets.size()); }

  template <typename T>
  T at(int64_t row, int64_t column) const {
    return load<T>(data, storage, offsets[row] + column * stride);
  }

  // Calls use(column, number) with the numbers of a row, widened.
  template <typename Use>
  void read(int64_t row, const Use& use) const {
    with_elements(data, storage, [&](auto elements) {
      const auto* const first = elements + offsets[row];
      if (stride == 1) {
        for (int64_t c = 0; c < d; ++c) {
          use(c, widen(first[c]));
        }
        return;
      }
      for (int64_t c = 0; c < d; ++c) {
        use(c, widen(first[c * stride]));
      }
    });
  }

  // Sets the numbers of a row to value(column).
  template <typename Value>
  void assign(int64_t row, const Value& value) const {
    switch (storage) {
      case Storage::Float32:
        return assign_as<float, float>(row, value);
      case Storage::Float64:
        return assign_as<double, double>(row, value);
      case Storage::Float16:
        return assign_as<torch::headeronly::Half, float>(row, value);
      case Storage::BFloat16:
        return assign_as<torch::headeronly::BFloat16, float>(row, value);
    }
  }

  bool finite(int64_t row) const {
    for (int64_t c = 0; c < d; ++c) {
      if (!std::isfinite(at<double>(row, c))) {
        return false;
      }
    }
    return true;
  }

  void* data;
  Storage storage;
  int64_t stride;
  int64_t d;
  std::vector<int64_t> offsets;

 private:
  template <typename Element, typename Wide, typename Value>
  void assign_as(int64_t row, const Value& value) const {
    Element* const elements = static_cast<Element*>(data) + offsets[row];
    if (stride == 1) {
      for (int64_t c = 0; c < d; ++c) {
        elements[c] = Element(Wide(value(c)));
      }
      return;
    }
    for (int64_t c = 0; c < d; ++c) {
      elements[c * stride] = Element(Wide(value(c)));
    }
  }
};

// All numbers of a tensor, in row-major order.
template <typename T>
std::vector<T> numbers(const Tensor& tensor) {
  const Tensor dense = torch::stable::contiguous(tensor);
  std::vector<T> values(dense.numel());
  with_elements(dense.const_data_ptr(), storage_of(dense), [&](auto elements) {
    for (size_t i = 0; i < values.size(); ++i) {
      values[i] = T(widen(elements[i]));
    }
  });
  return values;
}

inline std::vector<int64_t> integers(const Tensor& tensor) {
  const Tensor dense = torch::stable::contiguous(tensor);
  if (dense.scalar_type() == ScalarType::Long) {
    const int64_t* values = dense.const_data_ptr<int64_t>();
    return {values, values + dense.numel()};
  }
  const int32_t* values = dense.const_data_ptr<int32_t>();
  return {values, values + dense.numel()};
}

// W [N, d], rows one after another.
struct Matrix {
  explicit Matrix(const Tensor& tensor)
      : tensor(tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor)),
        storage(storage_of(tensor)),
        rows(tensor.size(0)),
        d(tensor.size(1)) {}

  const void* data() const { return tensor.const_data_ptr(); }

  Tensor tensor;
  Storage storage;
  int64_t rows;
  int64_t d;
};

template <typename T>
struct Encoder {
  Encoder(const Tensor& W_enc, const Tensor& b_enc, const Tensor& b_dec)
      : W(W_enc), bias(numbers<T>(b_enc)), shift(numbers<T>(b_dec)) {}

  Matrix W;
  std::vector<T> bias;
  std::vector<T> shift;
};

// A grain for parallel_for: so many items of `work` multiplications each are worth a thread.
inline int64_t grain(int64_t work) { return 1 + (int64_t(1) << 17) / (work + 1); }

}  // namespace saemnesia_fast
