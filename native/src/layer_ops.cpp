#include <algorithm>
#include <cmath>
#include <memory>

#include "mlx/fast.h"
#include "ops.h"
#include "primitive.h"

namespace mlxarch {

namespace {

constexpr int PIECES = 4;             // for each thread
constexpr int64_t INLINE = 16 << 10;  // elements that are not worth other threads

class Attention : public CpuPrimitive {
 public:
  Attention(mx::Stream stream, float scale, bool causal, bool masked)
      : CpuPrimitive(stream,
                     [scale, causal, masked](const std::vector<mx::array>& in) {
                       std::optional<mx::array> mask, sinks;
                       if (masked) {
                         mask = in[3];
                       }
                       if (in.size() > (masked ? 4 : 3)) {
                         sinks = in.back();
                       }
                       return mx::fast::scaled_dot_product_attention(
                           in[0], in[1], in[2], scale, causal ? "causal" : "", mask, sinks);
                     }),
        scale_(scale),
        causal_(causal),
        masked_(masked) {}

  const char* name() const override { return "CpuAttention"; }

  void eval_cpu(const std::vector<mx::array>& in, mx::array& out) override {
    const float* sinks = in.size() > (masked_ ? 4 : 3) ? in.back().data<float>() : nullptr;
    // A mask has one row of a batch or all of them
    const bool* mask = masked_ ? in[3].data<bool>() : nullptr;
    const int64_t mask_row = masked_ && in[3].ndim() == 4 && in[3].shape(0) > 1
                                 ? int64_t(in[3].shape(2)) * in[3].shape(3)
                                 : 0;
    dispatch([q = BatchedHeads(in[0]), k = BatchedHeads(in[1]), v = BatchedHeads(in[2]), sinks,
              mask, mask_row,
              scale = scale_, causal = causal_, &kernels = active_kernels(),
              y = allocate(out)]() mutable {
      std::vector<float> copies[3];
      q.resolve(copies[0]);
      k.resolve(copies[1]);
      v.resolve(copies[2]);
      const int heads = q.size(1), length = q.size(2), features = q.size(3);
      const int key_heads = k.size(1), tokens = k.size(2), value_features = v.size(3);
      const int group = heads / key_heads;
      const int64_t work = int64_t(length) * group * tokens * features;
      // A piece is a key head, and for long prompts a block of its queries
      const int block = length <= 64 ? length : 32;
      const int blocks = (length + block - 1) / block;
      const int pieces = q.size(0) * key_heads * blocks;
      auto piece = [&](int index) {
        const int start = index % blocks * block, head = index / blocks % key_heads;
        const int row = index / blocks / key_heads;
        const int count = std::min(block, length - start);
        const int visible = causal ? tokens - length + start + count : tokens;
        Heads queries = q.at(row, head * group);
        queries.data += start * queries.token_stride;
        float* to = y + ((int64_t(row) * heads + head * group) * length + start) * value_features;
        kernels.attend(queries, group, count, k.at(row, head), v.at(row, head), visible, features,
                       value_features, scale, causal,
                       {mask == nullptr ? nullptr : mask + row * mask_row + int64_t(start) * tokens,
                        tokens},
                       sinks ? sinks + head * group : nullptr, to,
                       int64_t(length) * value_features, value_features,
                       scratch(kernels.attention_floats(group, count, visible, features)));
      };
      if (work < INLINE * 4) {
        for (int index = 0; index < pieces; index++) {
          piece(index);
        }
      } else {
        run_pieces(pieces, piece);
      }
    });
  }

 private:
  float scale_;
  bool causal_;
  bool masked_;
};

class Gated : public CpuPrimitive {
 public:
  Gated(mx::Stream stream, Gate gate)
      : CpuPrimitive(stream,
                     [gate](const std::vector<mx::array>& in) {
                       const mx::array& x = in[0];
                       if (gate == Gate::silu) {
                         return mx::multiply(mx::multiply(x, mx::sigmoid(x)), in[1]);
                       }
                       const mx::array cube = mx::multiply(mx::multiply(x, x), x);
                       const mx::array inner = mx::multiply(
                           mx::add(x, mx::multiply(cube, mx::array(0.044715f))),
                           mx::array(1.5957691216f));
                       return mx::multiply(mx::multiply(x, mx::sigmoid(inner)), in[1]);
                     }),
        gate_(gate) {}

  const char* name() const override { return "CpuGated"; }

  void eval_cpu(const std::vector<mx::array>& in, mx::array& out) override {
    dispatch([a = Rows(in[0]), b = Rows(in[1]), gate = gate_, &k = active_kernels(),
              y = allocate(out)] {
      std::vector<float> copies[2];
      auto [left, left_stride] = a.resolve(copies[0]);
      auto [right, right_stride] = b.resolve(copies[1]);
      const int64_t rows = a.count(), width = a.width();
      auto piece = [&, left = left, right = right, left_stride = left_stride,
                    right_stride = right_stride](int64_t first, int64_t last) {
        for (int64_t r = first; r < last; r++) {
          k.gated(gate, left + r * left_stride, right + r * right_stride, width, y + r * width);
        }
      };
      if (rows * width < INLINE || rows == 1) {
        return piece(0, rows);
      }
      const int pieces = int(std::min<int64_t>(rows, threads() * PIECES));
      run_pieces(pieces, [&](int i) { piece(rows * i / pieces, rows * (i + 1) / pieces); });
    });
  }

 private:
  Gate gate_;
};

class RmsNorm : public CpuPrimitive {
 public:
  RmsNorm(mx::Stream stream, float eps)
      : CpuPrimitive(stream,
                     [eps](const std::vector<mx::array>& in) {
                       return mx::fast::rms_norm(in[0], in[1], eps);
                     }),
        eps_(eps) {}

  const char* name() const override { return "CpuRmsNorm"; }

  void eval_cpu(const std::vector<mx::array>& in, mx::array& out) override {
    dispatch([x = Rows(in[0]), weight = in[1].data<float>(), eps = eps_, &k = active_kernels(),
              y = allocate(out)] {
      std::vector<float> copy;
      auto [data, stride] = x.resolve(copy);
      for (int64_t r = 0; r < x.count(); r++) {
        k.rms_norm(data + r * stride, weight, int(x.width()), eps, y + r * x.width());
      }
    });
  }

 private:
  float eps_;
};

class Rope : public CpuPrimitive {
 public:
  Rope(mx::Stream stream, int dims, bool interleaved, int offset)
      : CpuPrimitive(stream,
                     [dims, interleaved, offset](const std::vector<mx::array>& in) {
                       return mx::fast::rope(in[0], dims, interleaved, std::nullopt, 1.0f, offset,
                                             in[1]);
                     }),
        dims_(dims),
        interleaved_(interleaved),
        offset_(offset) {}

  const char* name() const override { return "CpuRope"; }

  void eval_cpu(const std::vector<mx::array>& in, mx::array& out) override {
    dispatch([x = BatchedHeads(in[0]), periods = in[1].data<float>(), half = dims_ / 2,
              interleaved = interleaved_, offset = offset_, y = allocate(out)]() mutable {
      std::vector<float> copy;
      x.resolve(copy);
      const int length = x.size(2), width = x.size(3);
      std::vector<float> cosines(int64_t(length) * half), sines(cosines.size());
      for (int p = 0; p < length; p++) {
        for (int i = 0; i < half; i++) {
          const float angle = float(offset + p) * (1.0f / periods[i]);
          cosines[p * half + i] = std::cos(angle);
          sines[p * half + i] = std::sin(angle);
        }
      }
      float* to = y;
      for (int row = 0; row < x.size(0); row++) {
        for (int head = 0; head < x.size(1); head++) {
          const Heads from = x.at(row, head);
          for (int p = 0; p < length; p++, to += width) {
            const float* values = from.data + p * from.token_stride;
            const float* c = cosines.data() + int64_t(p) * half;
            const float* s = sines.data() + int64_t(p) * half;
            const int step = interleaved ? 2 : 1, apart = interleaved ? 1 : half;
            for (int i = 0; i < half; i++) {
              const float a = values[i * step], b = values[i * step + apart];
              to[i * step] = a * c[i] - b * s[i];
              to[i * step + apart] = a * s[i] + b * c[i];
            }
            std::copy(values + 2 * half, values + width, to + 2 * half);
          }
        }
      }
    });
  }

 private:
  int dims_;
  bool interleaved_;
  int offset_;
};

} // namespace

mx::array attention(const mx::array& q, const mx::array& k, const mx::array& v, float scale,
                    bool causal, const std::optional<mx::array>& mask,
                    const std::optional<mx::array>& sinks, mx::StreamOrDevice stream) {
  require(q.ndim() == 4 && k.ndim() == 4 && v.ndim() == 4 && q.dtype() == mx::float32 &&
              k.dtype() == mx::float32 && v.dtype() == mx::float32 && q.shape(1) % k.shape(1) == 0 &&
              q.shape(3) == k.shape(3) && k.shape(2) == v.shape(2) && k.shape(1) == v.shape(1) &&
              q.shape(1) / k.shape(1) <= 64 && (!causal || q.shape(2) <= k.shape(2)),
          "attention takes q (B, H, L, D), k (B, K, S, D) and v (B, K, S, E) in float32");
  const mx::Stream s = mx::to_stream(stream, mx::Device::cpu);
  std::vector<mx::array> inputs = {q, k, v};
  if (mask) {
    const int length = q.shape(2), tokens = k.shape(2);
    require(mask->dtype() == mx::bool_ &&
                (mask->shape() == mx::Shape{length, tokens} ||
                 mask->shape() == mx::Shape{1, 1, length, tokens} ||
                 mask->shape() == mx::Shape{q.shape(0), 1, length, tokens}),
            "an attention mask is bool (L, S) or (B or 1, 1, L, S)");
    inputs.push_back(mx::contiguous(*mask, false, s));
  }
  if (sinks) {
    inputs.push_back(packed(mx::astype(*sinks, mx::float32, s), s));
  }
  return mx::array(mx::Shape{q.shape(0), q.shape(1), q.shape(2), v.shape(3)}, mx::float32,
                   std::make_shared<Attention>(s, scale, causal, mask.has_value()), std::move(inputs));
}

mx::array gated(const mx::array& a, const mx::array& b, bool gelu, mx::StreamOrDevice stream) {
  require(a.shape() == b.shape() && a.ndim() > 0 && a.dtype() == mx::float32 &&
              b.dtype() == mx::float32,
          "gated takes two arrays of one shape in float32");
  const mx::Stream s = mx::to_stream(stream, mx::Device::cpu);
  return mx::array(a.shape(), mx::float32,
                   std::make_shared<Gated>(s, gelu ? Gate::gelu : Gate::silu), {a, b});
}

mx::array rms_norm(const mx::array& x, const mx::array& weight, float eps,
                   mx::StreamOrDevice stream) {
  require(x.ndim() > 0 && weight.ndim() == 1 && x.shape(-1) == weight.shape(0) &&
              x.dtype() == mx::float32 && weight.dtype() == mx::float32,
          "rms_norm takes x (..., D) and weight (D,) in float32");
  const mx::Stream s = mx::to_stream(stream, mx::Device::cpu);
  return mx::array(x.shape(), mx::float32, std::make_shared<RmsNorm>(s, eps), {x, packed(weight, s)});
}

mx::array rope(const mx::array& x, int dims, bool interleaved, int offset, const mx::array& periods,
               mx::StreamOrDevice stream) {
  require(x.ndim() == 4 && x.dtype() == mx::float32 && dims <= x.shape(3) && dims % 2 == 0 &&
              periods.dtype() == mx::float32 && periods.ndim() == 1 && periods.shape(0) == dims / 2,
          "rope takes x (B, H, L, D) and periods (dims / 2,) in float32");
  const mx::Stream s = mx::to_stream(stream, mx::Device::cpu);
  return mx::array(x.shape(), mx::float32, std::make_shared<Rope>(s, dims, interleaved, offset),
                   {x, packed(periods, s)});
}

} // namespace mlxarch
