// Base class of the operations, and access to strided inputs.

#pragma once

#include <functional>
#include <stdexcept>
#include <vector>

#include "kernels.h"
#include "mlx/allocator.h"
#include "mlx/backend/cpu/encoder.h"
#include "mlx/ops.h"
#include "mlx/primitives.h"
#include "mlx/transforms.h"
#include "pool.h"

namespace mlxarch {

namespace mx = mlx::core;

const Kernels& active_kernels();

using Reference = std::function<mx::array(const std::vector<mx::array>&)>;

class CpuPrimitive : public mx::UnaryPrimitive {
 public:
  CpuPrimitive(mx::Stream stream, Reference reference)
      : mx::UnaryPrimitive(stream), reference_(std::move(reference)) {}

  void eval_gpu(const std::vector<mx::array>&, mx::array&) override {
    throw std::runtime_error(std::string(name()) + " runs on a CPU only");
  }

  std::vector<mx::array> vjp(const std::vector<mx::array>& primals,
                             const std::vector<mx::array>& cotangents,
                             const std::vector<int>& argnums,
                             const std::vector<mx::array>&) override {
    std::vector<mx::array> changed;
    for (int index : argnums) {
      changed.push_back(primals[index]);
    }
    auto of_changed = [&](const std::vector<mx::array>& values) {
      std::vector<mx::array> inputs = primals;
      for (size_t i = 0; i < argnums.size(); i++) {
        inputs[argnums[i]] = values[i];
      }
      return std::vector<mx::array>{reference_(inputs)};
    };
    return mx::vjp(of_changed, changed, cotangents).second;
  }

 protected:
  static float* allocate(mx::array& out) {
    out.set_data(mx::allocator::malloc(out.nbytes()));
    return out.data<float>();
  }

  // Run the task when the inputs are ready. It may use their data and that of the output, which
  // MLX keeps until it has run.
  template <class Task>
  void dispatch(Task task) {
    mx::cpu::get_command_encoder(stream()).dispatch(std::move(task));
  }

 private:
  Reference reference_;
};

inline void require(bool condition, const char* what) {
  if (!condition) {
    throw std::invalid_argument(what);
  }
}

// The array in row-major order; weights, which are evaluated, have it already. An array that was
// evaluated beside others becomes available only when it is asked.
inline mx::array packed(const mx::array& x, mx::Stream stream) {
  const bool known = x.is_available() && x.flags().row_contiguous;
  return known ? x : mx::contiguous(x, false, stream);
}

// Rows of an array: element (row, i) is at data[row * stride + i], after `resolve`.
class Rows {
 public:
  explicit Rows(const mx::array& x)
      : data_(x.data<float>()), shape_(x.shape()), strides_(x.strides()) {}

  int64_t width() const { return shape_.back(); }

  int64_t count() const {
    int64_t result = 1;
    for (size_t i = 0; i + 1 < shape_.size(); i++) {
      result *= shape_[i];
    }
    return result;
  }

  void copy_to(float* to) const { copy(0, data_, to); }

  // Return the data and the distance of rows; rows that are not at equal distances, or not
  // contiguous, are copied to the buffer.
  std::pair<const float*, int64_t> resolve(std::vector<float>& buffer) const {
    const int last = int(shape_.size()) - 1;
    bool uniform = strides_[last] == 1 || shape_[last] == 1;
    int64_t stride = 0, covered = 1;
    for (int i = last - 1; i >= 0 && uniform; i--) {
      if (shape_[i] == 1) {
        continue;
      }
      if (stride == 0) {
        stride = strides_[i];
      }
      uniform = strides_[i] == stride * covered;
      covered *= shape_[i];
    }
    if (uniform) {
      return {data_, stride};
    }
    buffer.resize(count() * width());
    copy(0, data_, buffer.data());
    return {buffer.data(), width()};
  }

 private:
  float* copy(size_t axis, const float* from, float* to) const {
    if (axis + 1 == shape_.size()) {
      for (int64_t i = 0; i < shape_[axis]; i++) {
        *to++ = from[i * strides_[axis]];
      }
      return to;
    }
    for (int64_t i = 0; i < shape_[axis]; i++) {
      to = copy(axis + 1, from + i * strides_[axis], to);
    }
    return to;
  }

  const float* data_;
  mx::Shape shape_;
  mx::Strides strides_;
};

// Heads of one row of a batch, (H, L, D) with contiguous features; others are copied. Three
// dimensions (B, L, D) are those of one head.
class BatchedHeads {
 public:
  explicit BatchedHeads(const mx::array& x)
      : rows_(x), data_(x.data<float>()), shape_(x.shape()), strides_(x.strides()) {
    if (x.ndim() == 3) {
      shape_.insert(shape_.begin() + 1, 1);
      strides_.insert(strides_.begin() + 1, 0);
    }
  }

  int size(int axis) const { return shape_[axis]; }

  void resolve(std::vector<float>& buffer) {
    if (strides_[3] != 1 && shape_[3] != 1) {
      buffer.resize(rows_.count() * rows_.width());
      rows_.copy_to(buffer.data());
      data_ = buffer.data();
      strides_ = {int64_t(shape_[1]) * shape_[2] * shape_[3], int64_t(shape_[2]) * shape_[3],
                  int64_t(shape_[3]), 1};
    }
  }

  Heads at(int row, int head) const {
    return {data_ + row * strides_[0] + head * strides_[1], strides_[1], strides_[2]};
  }

 private:
  Rows rows_;
  const float* data_;
  mx::Shape shape_;
  mx::Strides strides_;
};

// Buffer of this thread that keeps its memory from call to call
inline float* scratch(int64_t floats) {
  thread_local std::vector<float> buffer;
  if (int64_t(buffer.size()) < floats) {
    buffer.resize(floats);
  }
  return buffer.data();
}

} // namespace mlxarch
