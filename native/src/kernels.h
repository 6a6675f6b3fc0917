// Kernels of one instruction set, and the choice of the set at run time.

#pragma once

#include <cstdint>

namespace mlxarch {

enum class Mode { affine, mxfp4, dense };

// A matrix (rows, columns): scale * code + bias in groups of columns (affine), 4-bit floats with a
// power of two for each group of 32 (mxfp4), or float32.
struct Matrix {
  Mode mode;
  const void* data;          // codes, (rows, columns * bits / 32) words of 32 bits
  const float* scales;       // (rows, columns / group), affine
  const float* biases;       // the same
  const uint8_t* exponents;  // the same, mxfp4; 127 stands for 1
  int rows;
  int columns;
  int bits;  // 2, 3, 4, 5, 6, 8, or 32 for dense
  int group;

  int row_words() const { return int(int64_t(columns) * bits / 32); }
  int row_groups() const { return mode == Mode::dense ? 0 : columns / group; }
  const uint32_t* codes(int64_t row) const {
    return static_cast<const uint32_t*>(data) + row * row_words();
  }
  // Whether codes stay within words, so that they can be masked in place
  bool in_planes() const { return mode == Mode::affine && 32 % bits == 0; }
};

// Which keys each query may attend to: (length, tokens) with rows `stride` apart; null for all
struct Visible {
  const bool* data;
  int64_t stride;
};

// Heads of queries, keys or values: element (head, token, feature) is at
// data[head * head_stride + token * token_stride + feature].
struct Heads {
  const float* data;
  int64_t head_stride;
  int64_t token_stride;
};

constexpr int MOST_ROWS = 8;  // of x that multiply_few takes

enum class Gate { silu, gelu };

struct Kernels {
  const char* name;
  int panel;  // output rows that multiply_many computes together

  // Floats of the buffer for prepare, for each row of x
  int64_t (*prepared_floats)(const Matrix& matrix);
  // Rearrange rows of x (count, columns) for multiply_few
  void (*prepare)(const Matrix& matrix, const float* x, int count, float* prepared);
  // y[r, first..last) = x[r] . W[first..last) for up to MOST_ROWS prepared rows, which begin at a
  // cache line
  void (*multiply_few)(const Matrix& matrix, const float* prepared, int count,
                       int first, int last, float* y, int64_t y_stride);
  // y[:, first..last) = x . W[first..last)^T for any number of rows; scratch: panel_floats()
  void (*multiply_many)(const Matrix& matrix, const float* x, int64_t x_stride, int count,
                        int first, int last, float* y, int64_t y_stride, float* scratch);
  int64_t (*panel_floats)();

  // Attention of `group` query heads that share one key head, for `length` queries that follow
  // all but the last `length` keys; causal, or every key is visible. scratch: attention_floats
  void (*attend)(Heads queries, int group, int length, Heads keys, Heads values, int tokens,
                 int features, int value_features, float scale, bool causal, Visible visible,
                 const float* sinks, float* out, int64_t out_head_stride, int64_t out_token_stride, float* scratch);
  int64_t (*attention_floats)(int group, int length, int tokens, int features);

  // out = gate(a) * b, elementwise
  void (*gated)(Gate gate, const float* a, const float* b, int64_t count, float* out);
  // out = x / rms(x) * weight
  void (*rms_norm)(const float* x, const float* weight, int width, float eps, float* out);
  // Index of the largest element; -1 if one is NaN or infinite (-inf excepted), or all are -inf
  int64_t (*argmax)(const float* x, int64_t count);
};

// Kernels of the named set (avx512, avx2, baseline), or the best of this machine for null.
// Null if the machine or the build does not have it.
const Kernels* find_kernels(const char* name);

namespace avx512 { const Kernels& kernels(); }
namespace avx2 { const Kernels& kernels(); }
namespace baseline { const Kernels& kernels(); }

} // namespace mlxarch
