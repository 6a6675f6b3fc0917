#include <algorithm>
#include <memory>

#include "format.h"
#include "mlx/ops.h"
#include "ops.h"
#include "primitive.h"

namespace mlxarch {

namespace {

constexpr int FEW = 17;               // from so many rows on, a panel of the matrix is dequantized
constexpr int64_t INLINE = 64 << 10;  // bytes of a matrix that is not worth other threads
constexpr int PIECES = 4;             // for each thread

// Divide `rows` of a matrix into pieces of whole panels, and run them
void run_row_ranges(const Matrix& m, int panel,
                    const std::function<void(int, int)>& task) {
  const int64_t bytes = int64_t(m.rows) * m.row_words() * 4;
  const int panels = (m.rows + panel - 1) / panel;
  const int pieces = bytes < INLINE ? 1 : std::min(panels, threads() * PIECES);
  run_pieces(pieces, [&](int piece) {
    const int first = int(int64_t(panels) * piece / pieces) * panel;
    const int last = std::min(m.rows, int(int64_t(panels) * (piece + 1) / pieces) * panel);
    task(first, last);
  });
}

// Buffer of the calling thread that begins at a cache line
float* prepared_rows(int64_t floats) {
  constexpr int64_t line = 16;
  thread_local std::vector<float> buffer;
  if (int64_t(buffer.size()) < floats + line) {
    buffer.resize(floats + line);
  }
  const auto start = reinterpret_cast<uintptr_t>(buffer.data());
  return buffer.data() + (64 - start % 64) % 64 / sizeof(float);
}

// y (count, rows) = x (count, columns) . W^T. The result of a row does not depend on the others, up
// to FEW of them and beyond; the two differ by rounding.
void multiply_many(const Kernels& k, const Matrix& m, const float* x, int64_t x_stride,
                   int count, float* y) {
  run_row_ranges(m, k.panel, [&](int first, int last) {
    k.multiply_many(m, x, x_stride, count, first, last, y, m.rows, scratch(k.panel_floats()));
  });
}

void multiply_few(const Kernels& k, const Matrix& m, const float* x, int64_t x_stride,
                  int count, float* y) {
  const int64_t size = k.prepared_floats(m);
  float* prepared = prepared_rows(size * count);
  for (int r = 0; r < count; r++) {
    k.prepare(m, x + r * x_stride, 1, prepared + r * size);
  }
  run_row_ranges(m, k.panel, [&](int first, int last) {
    for (int r = 0; r < count; r += MOST_ROWS) {
      k.multiply_few(m, prepared + r * size, std::min(MOST_ROWS, count - r), first, last,
                     y + int64_t(r) * m.rows, m.rows);
    }
  });
}

std::vector<mx::array> without_first(const std::vector<mx::array>& arrays, int count) {
  return {arrays.begin() + count, arrays.end()};
}

class Matmul : public CpuPrimitive {
 public:
  Matmul(mx::Stream stream, Format format)
      : CpuPrimitive(stream,
                     [format](const std::vector<mx::array>& in) {
                       return format.reference(in[0], without_first(in, 1), std::nullopt);
                     }),
        format_(format) {}

  const char* name() const override { return "CpuMatmul"; }

  void eval_cpu(const std::vector<mx::array>& in, mx::array& out) override {
    dispatch([x = Rows(in[0]), &k = active_kernels(), m = format_.matrix(in, 1),
              y = allocate(out)] {
      std::vector<float> copy;
      auto [data, stride] = x.resolve(copy);
      multiply(k, m, data, stride, int(x.count()), y);
    });
  }

 private:
  Format format_;
};

class ExpertMatmul : public CpuPrimitive {
 public:
  ExpertMatmul(mx::Stream stream, Format format, int repeats)
      : CpuPrimitive(stream,
                     [format, repeats](const std::vector<mx::array>& in) {
                       const mx::array x = mx::expand_dims(mx::repeat(in[0], repeats, 0), 1);
                       return mx::squeeze(format.reference(x, without_first(in, 2), in[1]), 1);
                     }),
        format_(format),
        repeats_(repeats) {}

  const char* name() const override { return "CpuExpertMatmul"; }

  void eval_cpu(const std::vector<mx::array>& in, mx::array& out) override {
    const int64_t count = in[1].size();
    const int experts = in[2].shape(0);
    std::vector<Matrix> stack;
    for (int e = 0; e < experts; e++) {
      stack.push_back(format_.matrix(in, 2, e));
    }
    dispatch([stack = std::move(stack), experts, repeats = repeats_, x = Rows(in[0]),
              &k = active_kernels(), chosen = in[1].data<int32_t>(), count, y = allocate(out)] {
      std::vector<float> copy;
      auto [data, stride] = x.resolve(copy);
      // Rows by expert: `order` lists them, those of expert e from begin[e] on
      std::vector<int64_t> begin(experts + 1), order(count);
      for (int64_t i = 0; i < count; i++) {
        begin[chosen[i] + 1]++;
      }
      for (int e = 0; e < experts; e++) {
        begin[e + 1] += begin[e];
      }
      std::vector<int64_t> next(begin.begin(), begin.end() - 1);
      for (int64_t i = 0; i < count; i++) {
        order[next[chosen[i]]++] = i;
      }
      std::vector<float> rows, products;
      for (int e = 0; e < experts; e++) {
        const int64_t n = begin[e + 1] - begin[e];
        if (n == 0) {
          continue;
        }
        const Matrix& m = stack[e];
        rows.resize(n * m.columns);
        products.resize(n * m.rows);
        for (int64_t i = 0; i < n; i++) {
          const float* from = data + order[begin[e] + i] / repeats * stride;
          std::copy(from, from + m.columns, rows.data() + i * m.columns);
        }
        // One kernel for any number of rows: the result of a row is the same however the rows of
        // a prompt are divided among calls
        multiply_few(k, m, rows.data(), m.columns, int(n), products.data());
        for (int64_t i = 0; i < n; i++) {
          const float* from = products.data() + i * m.rows;
          std::copy(from, from + m.rows, y + order[begin[e] + i] * m.rows);
        }
      }
    });
  }

 private:
  Format format_;
  int repeats_;
};

} // namespace

Matrix Format::matrix(const std::vector<mx::array>& arrays, size_t from, int64_t index) const {
  const mx::array& weight = arrays[from];
  const int rows = weight.shape(-2), words = weight.shape(-1);
  Matrix m = {mode, weight.data<uint32_t>() + index * rows * words, nullptr, nullptr, nullptr,
              rows, int(int64_t(words) * 32 / bits), bits, group};
  const int64_t first = index * rows * m.row_groups();
  if (mode == Mode::affine) {
    m.scales = arrays[from + 1].data<float>() + first;
    m.biases = arrays[from + 2].data<float>() + first;
  } else if (mode == Mode::mxfp4) {
    m.exponents = arrays[from + 1].data<uint8_t>() + first;
  }
  return m;
}

mx::array Format::reference(const mx::array& x, const std::vector<mx::array>& arrays,
                            std::optional<mx::array> chosen) const {
  if (mode == Mode::dense) {
    const mx::array transposed = mx::swapaxes(arrays[0], -1, -2);
    return chosen ? mx::gather_mm(x, transposed, std::nullopt, chosen)
                  : mx::matmul(x, transposed);
  }
  std::optional<mx::array> biases;
  if (mode == Mode::affine) {
    biases = arrays[2];
  }
  const std::string name = mode == Mode::affine ? "affine" : "mxfp4";
  return chosen ? mx::gather_qmm(x, arrays[0], arrays[1], biases, std::nullopt, chosen, true,
                                 group, bits, name)
                : mx::quantized_matmul(x, arrays[0], arrays[1], biases, true, group, bits, name);
}

void multiply(const Kernels& k, const Matrix& m, const float* x, int64_t x_stride, int count,
              float* y) {
  (count < FEW ? multiply_few : multiply_many)(k, m, x, x_stride, count, y);
}

std::vector<mx::array> checked(int columns, const std::vector<mx::array>& arrays, const Format& f,
                               size_t dimensions, mx::Stream stream) {
  const mx::array& weight = arrays.at(0);
  bool sound = weight.ndim() == dimensions;
  sound = sound && columns == int64_t(weight.shape(-1)) * 32 / f.bits;
  if (f.mode == Mode::dense) {
    sound = sound && arrays.size() == 1 && weight.dtype() == mx::float32 && f.bits == 32;
  } else {
    const bool affine = f.mode == Mode::affine;
    sound = sound && arrays.size() == (affine ? 3 : 2) && weight.dtype() == mx::uint32;
    sound = sound && (affine ? f.bits >= 2 && f.bits <= 8 && f.bits != 7
                             : f.bits == 4 && f.group == 32);
    sound = sound && (f.group == 32 || f.group == 64 || f.group == 128);
    for (size_t i = 1; i < arrays.size() && sound; i++) {
      mx::Shape wanted = weight.shape();
      wanted.back() = columns / f.group;
      sound = arrays[i].shape() == wanted && columns % f.group == 0 &&
              arrays[i].dtype() == (affine ? mx::float32 : mx::uint8);
    }
  }
  require(sound, "the arrays are not those of a product in float32");
  std::vector<mx::array> result;
  for (const mx::array& array : arrays) {
    result.push_back(packed(array, stream));
  }
  return result;
}

Format format_of(const std::string& mode, int bits, int group_size) {
  if (mode == "affine") {
    return {Mode::affine, bits, group_size};
  }
  if (mode == "mxfp4") {
    return {Mode::mxfp4, bits, group_size};
  }
  if (mode == "dense") {
    return {Mode::dense, 32, 1};
  }
  throw std::invalid_argument("no kernel for mode " + mode);
}

mx::array matmul(const mx::array& x, const std::vector<mx::array>& arrays, const std::string& mode,
                 int bits, int group_size, mx::StreamOrDevice stream) {
  const mx::Stream s = mx::to_stream(stream, mx::Device::cpu);
  const Format format = format_of(mode, bits, group_size);
  require(x.dtype() == mx::float32 && x.ndim() > 0, "a product takes x in float32");
  std::vector<mx::array> inputs = checked(x.shape(-1), arrays, format, 2, s);
  mx::Shape shape = x.shape();
  shape.back() = inputs[0].shape(0);
  inputs.insert(inputs.begin(), x);
  return mx::array(shape, mx::float32, std::make_shared<Matmul>(s, format), std::move(inputs));
}

mx::array expert_matmul(const mx::array& x, const std::vector<mx::array>& arrays,
                        const mx::array& experts, int repeats, const std::string& mode, int bits,
                        int group_size, mx::StreamOrDevice stream) {
  const mx::Stream s = mx::to_stream(stream, mx::Device::cpu);
  const Format format = format_of(mode, bits, group_size);
  require(x.dtype() == mx::float32 && x.ndim() > 0, "a product takes x in float32");
  std::vector<mx::array> inputs = checked(x.shape(-1), arrays, format, 3, s);
  const mx::Shape shape = {int(experts.size()), inputs[0].shape(1)};
  const mx::array chosen = packed(mx::astype(experts, mx::int32, s), s);
  inputs.insert(inputs.begin(), {x, chosen});
  return mx::array(shape, mx::float32, std::make_shared<ExpertMatmul>(s, format, repeats),
                   std::move(inputs));
}

} // namespace mlxarch
