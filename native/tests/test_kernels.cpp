// Every kernel of every instruction set of this machine against the same sum in float64.
// Prints a line for each failure, and exits with 1 if there is one.

#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <vector>

#include "../src/kernels.h"

using namespace mlxarch;

namespace {

int failures = 0;
int checks = 0;

void check(const char* set, const char* what, double found, double wanted, double tolerance) {
  checks++;
  if (!(std::abs(found - wanted) <= tolerance)) {
    failures++;
    std::printf("%s: %s is %.9g, not %.9g\n", set, what, found, wanted);
  }
}

std::mt19937 generator(7);

std::vector<float> normal(size_t count) {
  std::normal_distribution<float> distribution;
  std::vector<float> values(count);
  for (float& value : values) {
    value = distribution(generator);
  }
  return values;
}

const double FP4[16] = {0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6};

struct Random {
  std::vector<uint32_t> codes;
  std::vector<float> scales, biases;
  std::vector<uint8_t> exponents;
  Matrix view;

  Random(Mode mode, int rows, int columns, int bits, int group) {
    codes.resize(size_t(rows) * columns * bits / 32);
    const size_t groups = size_t(rows) * columns / group;
    for (uint32_t& word : codes) {
      word = generator();
    }
    if (mode == Mode::dense) {
      const std::vector<float> values = normal(codes.size());
      std::memcpy(codes.data(), values.data(), values.size() * sizeof(float));
    }
    if (mode == Mode::affine) {
      scales = normal(groups);
      biases = normal(groups);
    }
    for (size_t i = 0; i < groups; i++) {
      exponents.push_back(uint8_t(120 + generator() % 14));
    }
    view = {mode, codes.data(), scales.data(), mode == Mode::affine ? biases.data() : nullptr,
            exponents.data(), rows, columns, bits, group};
  }

  double value(int row, int column) const {
    if (view.mode == Mode::dense) {
      return reinterpret_cast<const float*>(view.codes(row))[column];
    }
    uint32_t code = 0;
    for (int bit = 0; bit < view.bits; bit++) {
      const int place = column * view.bits + bit;
      code |= (view.codes(row)[place / 32] >> (place % 32) & 1) << bit;
    }
    const size_t group = size_t(row) * view.row_groups() + column / view.group;
    if (view.mode == Mode::mxfp4) {
      return FP4[code] * std::ldexp(1.0, exponents[group] - 127);
    }
    return double(scales[group]) * code + double(biases[group]);
  }
};

void test_products(const Kernels& k, Mode mode, int rows, int columns, int bits, int group, int count) {
  Random m(mode, rows, columns, bits, group);
  std::vector<float> x = normal(size_t(count) * columns);
  std::vector<float> few(size_t(count) * rows, NAN), many(size_t(count) * rows, NAN);
  std::vector<float> prepared(k.prepared_floats(m.view) * MOST_ROWS), scratch(k.panel_floats());
  for (int start = 0; start < count; start += MOST_ROWS) {
    const int part = count - start < MOST_ROWS ? count - start : MOST_ROWS;
    k.prepare(m.view, x.data() + size_t(start) * columns, part, prepared.data());
    k.multiply_few(m.view, prepared.data(), part, 0, rows, few.data() + size_t(start) * rows, rows);
  }
  k.multiply_many(m.view, x.data(), columns, count, 0, rows, many.data(), rows, scratch.data());
  for (int r = 0; r < count; r++) {
    for (int row = 0; row < rows; row++) {
      double wanted = 0, size = 0;
      for (int c = 0; c < columns; c++) {
        const double term = x[size_t(r) * columns + c] * m.value(row, c);
        wanted += term;
        size += std::abs(term);
      }
      check(k.name, "a product of few rows", few[size_t(r) * rows + row], wanted, 1e-6 * size);
      check(k.name, "a product of many rows", many[size_t(r) * rows + row], wanted, 1e-6 * size);
    }
  }
}

void test_attention(const Kernels& k, int group, int length, int tokens, int features, bool causal,
                    bool with_sinks, bool masked = false) {
  std::vector<float> q = normal(size_t(group) * length * features);
  std::vector<float> keys = normal(size_t(tokens) * features);
  std::vector<float> values = normal(size_t(tokens) * features);
  std::vector<float> sinks = normal(group);
  std::vector<float> out(q.size(), NAN);
  std::vector<float> scratch(k.attention_floats(group, length, tokens, features));
  const float scale = 0.3f;
  std::vector<char> mask(size_t(length) * tokens);
  for (char& value : mask) {
    value = generator() % 3 != 0;
  }
  for (int p = 0; p < length; p++) {
    mask[size_t(p) * tokens] = 1;
  }
  const Visible visible_keys = {masked ? reinterpret_cast<bool*>(mask.data()) : nullptr, tokens};
  k.attend({q.data(), int64_t(length) * features, features}, group, length,
           {keys.data(), 0, features}, {values.data(), 0, features}, tokens, features, features,
           scale, causal, visible_keys, with_sinks ? sinks.data() : nullptr, out.data(),
           int64_t(length) * features, features, scratch.data());
  for (int h = 0; h < group; h++) {
    for (int p = 0; p < length; p++) {
      const float* query = q.data() + (size_t(h) * length + p) * features;
      const int visible = causal ? tokens - length + p + 1 : tokens;
      std::vector<double> weights(visible);
      double total = with_sinks ? std::exp(double(sinks[h])) : 0;
      for (int t = 0; t < visible; t++) {
        if (masked && !mask[size_t(p) * tokens + t]) {
          continue;
        }
        double score = 0;
        for (int f = 0; f < features; f++) {
          score += double(query[f]) * keys[size_t(t) * features + f];
        }
        total += weights[t] = std::exp(scale * score);
      }
      for (int f = 0; f < features; f++) {
        double wanted = 0;
        for (int t = 0; t < visible; t++) {
          wanted += weights[t] / total * values[size_t(t) * features + f];
        }
        check(k.name, "attention", out[(size_t(h) * length + p) * features + f], wanted, 1e-5);
      }
    }
  }
}

void test_elementwise(const Kernels& k) {
  for (int count : {1, 7, 16, 37, 1000}) {
    std::vector<float> a = normal(count), b = normal(count), out(count, NAN);
    for (int i = 0; i < count; i++) {
      a[i] *= 20;
    }
    k.gated(Gate::silu, a.data(), b.data(), count, out.data());
    for (int i = 0; i < count; i++) {
      const double wanted = double(a[i]) / (1 + std::exp(-double(a[i]))) * b[i];
      check(k.name, "silu", out[i], wanted, 1e-6 * std::abs(wanted) + 1e-37);
    }
    k.gated(Gate::gelu, a.data(), b.data(), count, out.data());
    for (int i = 0; i < count; i++) {
      const double inner = 0.7978845608028654 * (a[i] + 0.044715 * std::pow(double(a[i]), 3));
      const double wanted = 0.5 * a[i] * (1 + std::tanh(inner)) * b[i];
      check(k.name, "gelu", out[i], wanted, 2e-6 * std::abs(double(a[i]) * b[i]) + 1e-37);
    }
    k.rms_norm(a.data(), b.data(), count, 1e-5f, out.data());
    double squares = 0;
    for (float value : a) {
      squares += double(value) * value;
    }
    for (int i = 0; i < count; i++) {
      const double wanted = a[i] / std::sqrt(squares / count + 1e-5) * b[i];
      check(k.name, "rms_norm", out[i], wanted, 1e-6 * std::abs(wanted));
    }
    std::vector<float> logits = normal(count);
    logits[count / 2] = 9;
    check(k.name, "argmax", k.argmax(logits.data(), count), count / 2, 0);
    if (count > 1) {
      logits[0] = -INFINITY;
      check(k.name, "argmax beside -inf", k.argmax(logits.data(), count), count / 2, 0);
      for (float bad : {float(NAN), float(INFINITY)}) {
        logits[count - 1] = bad;
        check(k.name, "argmax beside NaN or infinity", k.argmax(logits.data(), count), -1, 0);
      }
    }
    std::vector<float> none(count, -INFINITY);
    check(k.name, "argmax of -inf", k.argmax(none.data(), count), -1, 0);
  }
}

} // namespace

int main() {
  for (const char* name : {"baseline", "avx2", "avx512"}) {
    const Kernels* k = find_kernels(name);
    if (k == nullptr) {
      std::printf("%s: this machine does not have it\n", name);
      continue;
    }
    for (int count : {1, 2, 3, 5, 8, 13}) {
      test_products(*k, Mode::mxfp4, 37, 384, 4, 32, count);
      test_products(*k, Mode::dense, 37, 333, 32, 333, count);
    }
    for (int bits : {2, 3, 4, 5, 6, 8}) {
      for (int group : {32, 64, 128}) {
        for (int columns : {128, 384, 640}) {
          for (int count : {1, 2, 3, 5, 8, 13}) {
            test_products(*k, Mode::affine, 37, columns, bits, group, count);
          }
        }
        test_products(*k, Mode::affine, 16, group, bits, group, 1);
      }
    }
    for (int features : {16, 64, 80}) {
      for (bool causal : {true, false}) {
        for (bool sinks : {true, false}) {
          test_attention(*k, 3, 1, 33, features, causal, sinks);
          test_attention(*k, 1, 5, 5, features, causal, sinks);
          test_attention(*k, 4, 45, 100, features, causal, sinks);
          test_attention(*k, 2, 9, 40, features, causal, sinks, true);
        }
      }
    }
    test_elementwise(*k);
  }
  std::printf("%d checks, %d failures\n", checks, failures);
  return failures > 0;
}
