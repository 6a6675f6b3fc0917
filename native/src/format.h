// Formats of the arrays of a matrix, and products with it, for the operations that have some.

#pragma once

#include <optional>
#include <string>
#include <vector>

#include "kernels.h"
#include "mlx/array.h"

namespace mlxarch {

namespace mx = mlx::core;

// Arrays of a matrix or of a stack: weight; scales and biases in affine mode; scales in mxfp4
struct Format {
  Mode mode;
  int bits;
  int group;

  // Matrix of evaluated arrays that begin at `first`; of a stack the one with this index
  Matrix matrix(const std::vector<mx::array>& arrays, size_t first, int64_t index = 0) const;

  // MLX's own product; with `chosen`, of each row of x (N, 1, columns) with one matrix of a stack
  mx::array reference(const mx::array& x, const std::vector<mx::array>& arrays,
                      std::optional<mx::array> chosen) const;

  size_t arrays() const { return mode == Mode::affine ? 3 : mode == Mode::mxfp4 ? 2 : 1; }
};

Format format_of(const std::string& mode, int bits, int group_size);

// Check the arrays of a product of rows of `columns`, and return those of the matrix in row-major
// order
std::vector<mx::array> checked(int columns, const std::vector<mx::array>& arrays, const Format& f,
                               size_t dimensions, mx::Stream stream);

// y (count, rows) = x (count, columns) . W^T
void multiply(const Kernels& k, const Matrix& m, const float* x, int64_t x_stride, int count,
              float* y);

inline std::vector<mx::array> part(const std::vector<mx::array>& arrays, size_t first,
                                   size_t count) {
  return {arrays.begin() + first, arrays.begin() + first + count};
}

} // namespace mlxarch
