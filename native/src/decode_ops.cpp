// Operations that take the place of several small ones in each layer, where a token costs more in
// MLX's graph than in sums.

#include <algorithm>
#include <cmath>
#include <memory>

#include "format.h"
#include "mlx/fast.h"
#include "ops.h"
#include "primitive.h"

namespace mlxarch {

namespace {

// Norm (if it has a weight) and RoPE (if dims > 0) of single heads at consecutive positions
struct Turn {
  Positions at;
  const float* weight;
  const float* periods;
  int size;
  std::vector<float> cosines, sines;

  Turn(const Positions& at, const float* weight, const float* periods, int size)
      : at(at), weight(weight), periods(periods), size(size) {}

  void prepare(int length) {
    const int half = at.dims / 2;
    cosines.resize(int64_t(length) * half);
    sines.resize(cosines.size());
    for (int p = 0; p < length; p++) {
      for (int i = 0; i < half; i++) {
        const float angle = float(at.first + p) * (1.0f / periods[i]);
        cosines[p * half + i] = std::cos(angle);
        sines[p * half + i] = std::sin(angle);
      }
    }
  }

  void operator()(const Kernels& k, const float* from, int position, float* to) const {
    if (weight != nullptr) {
      k.rms_norm(from, weight, size, at.eps, to);
      from = to;
    }
    const int half = at.dims / 2;
    const float* c = cosines.data() + int64_t(position) * half;
    const float* s = sines.data() + int64_t(position) * half;
    const int step = at.interleaved ? 2 : 1, apart = at.interleaved ? 1 : half;
    for (int i = 0; i < half; i++) {
      const float a = from[i * step], b = from[i * step + apart];
      to[i * step] = a * c[i] - b * s[i];
      to[i * step + apart] = a * s[i] + b * c[i];
    }
    if (from != to) {
      std::copy(from + 2 * half, from + size, to + 2 * half);
    }
  }
};

// MLX's own operations: features `start` to `start + heads * size` of x as heads (B, H, L, D)
mx::array reference_heads(const mx::array& x, const Positions& at, int heads, int size,
                          const std::optional<mx::array>& weight,
                          const std::optional<mx::array>& periods) {
  const int batch = x.shape(0), length = x.shape(1);
  mx::array y = mx::slice(x, {0, 0, at.start}, {batch, length, at.start + heads * size});
  y = mx::reshape(y, {batch, length, heads, size});
  if (weight) {
    y = mx::fast::rms_norm(y, *weight, at.eps);
  }
  y = mx::swapaxes(y, 1, 2);
  return at.dims == 0 ? y
                      : mx::fast::rope(y, at.dims, at.interleaved, std::nullopt, 1.0f, at.first,
                                       periods);
}

// Further inputs of both operations: the weight of the norm and the periods, if there are such
struct Extra {
  bool normed, turned;

  std::optional<mx::array> weight(const std::vector<mx::array>& in, size_t first) const {
    return normed ? std::optional(in[first]) : std::nullopt;
  }

  std::optional<mx::array> periods(const std::vector<mx::array>& in, size_t first) const {
    return turned ? std::optional(in[first + normed]) : std::nullopt;
  }

  Turn turn(const Positions& at, const std::vector<mx::array>& in, size_t first, int size) const {
    return Turn(at, normed ? in[first].data<float>() : nullptr,
                turned ? in[first + normed].data<float>() : nullptr, size);
  }
};

class Store : public CpuPrimitive {
 public:
  Store(mx::Stream stream, Positions at, int slot, Extra extra)
      : CpuPrimitive(stream,
                     [at, slot, extra](const std::vector<mx::array>& in) {
                       const mx::array& buffer = in[0];
                       mx::array heads =
                           reference_heads(in[1], at, buffer.shape(1), buffer.shape(3),
                                           extra.weight(in, 2), extra.periods(in, 2));
                       mx::Shape stop = buffer.shape();
                       stop[2] = slot + in[1].shape(1);
                       return mx::slice_update(buffer, heads, {0, 0, slot, 0}, stop);
                     }),
        at_(at),
        slot_(slot),
        extra_(extra) {}

  const char* name() const override { return "CpuStore"; }

  void eval_cpu(const std::vector<mx::array>& in, mx::array& out) override {
    const mx::array& buffer = in[0];
    const bool in_place = buffer.is_donatable() && buffer.flags().row_contiguous;
    if (in_place) {
      out.copy_shared_buffer(buffer);
    } else {
      allocate(out);
    }
    const int heads = buffer.shape(1), capacity = buffer.shape(2), size = buffer.shape(3);
    dispatch([old = Rows(buffer), in_place, x = BatchedHeads(in[1]), slot = slot_, start = at_.start,
              turn = extra_.turn(at_, in, 2, size), heads, capacity, size, &k = active_kernels(),
              y = out.data<float>()]() mutable {
      if (!in_place) {
        old.copy_to(y);
      }
      std::vector<float> copy;
      x.resolve(copy);
      turn.prepare(x.size(2));
      for (int row = 0; row < x.size(0); row++) {
        const Heads features = x.at(row, 0);
        for (int p = 0; p < x.size(2); p++) {
          const float* from = features.data + p * features.token_stride + start;
          for (int h = 0; h < heads; h++, from += size) {
            turn(k, from, p, y + ((int64_t(row) * heads + h) * capacity + slot + p) * size);
          }
        }
      }
    });
  }

 private:
  Positions at_;
  int slot_;
  Extra extra_;
};

class CachedAttention : public CpuPrimitive {
 public:
  CachedAttention(mx::Stream stream, Positions at, int heads, int tokens, float scale, Extra extra)
      : CpuPrimitive(stream,
                     [at, heads, tokens, scale, extra](const std::vector<mx::array>& in) {
                       const int size = in[1].shape(3);
                       mx::array q = reference_heads(in[0], at, heads, size, extra.weight(in, 3),
                                                     extra.periods(in, 3));
                       mx::Shape stop = in[1].shape();
                       stop[2] = tokens;
                       const mx::array k = mx::slice(in[1], {0, 0, 0, 0}, stop);
                       const mx::array v = mx::slice(in[2], {0, 0, 0, 0}, stop);
                       const std::string mask = q.shape(2) > 1 ? "causal" : "";
                       const mx::array y =
                           mx::fast::scaled_dot_product_attention(q, k, v, scale, mask);
                       return mx::flatten(mx::swapaxes(y, 1, 2), 2, 3);
                     }),
        at_(at),
        heads_(heads),
        tokens_(tokens),
        scale_(scale),
        extra_(extra) {}

  const char* name() const override { return "CpuCachedAttention"; }

  void eval_cpu(const std::vector<mx::array>& in, mx::array& out) override {
    const int size = in[1].shape(3);
    dispatch([x = BatchedHeads(in[0]), keys = BatchedHeads(in[1]), values = BatchedHeads(in[2]),
              size, heads = heads_, tokens = tokens_, scale = scale_, start = at_.start,
              turn = extra_.turn(at_, in, 3, size), &k = active_kernels(),
              y = allocate(out)]() mutable {
      std::vector<float> copies[3];
      x.resolve(copies[0]);
      keys.resolve(copies[1]);
      values.resolve(copies[2]);
      const int length = x.size(2), key_heads = keys.size(1);
      turn.prepare(length);
      const int group = heads / key_heads;
      // A piece is a key head, and for long prompts a block of its queries
      const int block = length <= 64 ? length : 32;
      const int blocks = (length + block - 1) / block;
      const int pieces = x.size(0) * key_heads * blocks;
      auto piece = [&](int index) {
        const int first = index % blocks * block, key = index / blocks % key_heads;
        const int64_t row = index / blocks / key_heads;
        const int count = std::min(block, length - first);
        const int visible = tokens - length + first + count;
        const int64_t needed = k.attention_floats(group, count, visible, size);
        float* turned = scratch(needed + int64_t(group) * count * size) + needed;
        for (int h = 0; h < group; h++) {
          for (int p = 0; p < count; p++) {
            const Heads features = x.at(int(row), 0);
            const float* from = features.data + (first + p) * features.token_stride + start +
                                (key * group + h) * int64_t(size);
            turn(k, from, first + p, turned + (int64_t(h) * count + p) * size);
          }
        }
        const int64_t to = ((row * length + first) * heads + key * group) * size;
        k.attend({turned, int64_t(count) * size, size}, group, count,
                 keys.at(int(row), key), values.at(int(row), key), visible, size, size, scale, true, {nullptr, 0}, nullptr, y + to, size, int64_t(heads) * size,
                 turned - needed);
      };
      if (int64_t(length) * heads * tokens * size < SMALL_ATTENTION) {
        for (int index = 0; index < pieces; index++) {
          piece(index);
        }
      } else {
        run_pieces(pieces, piece);
      }
    });
  }

 private:
  static constexpr int64_t SMALL_ATTENTION = 256 << 10;  // products not worth other threads

  Positions at_;
  int heads_, tokens_;
  float scale_;
  Extra extra_;
};

class FeedForward : public CpuPrimitive {
 public:
  FeedForward(mx::Stream stream, Format gate_up, Format down, Gate gate)
      : CpuPrimitive(stream,
                     [=](const std::vector<mx::array>& in) {
                       const mx::array joined = gate_up.reference(
                           in[0], part(in, 1, gate_up.arrays()), std::nullopt);
                       const std::vector<mx::array> halves = mx::split(joined, 2, -1);
                       const mx::array hidden =
                           gated(halves[0], halves[1], gate == Gate::gelu, stream);
                       return down.reference(hidden,
                                             part(in, 1 + gate_up.arrays(), down.arrays()),
                                             std::nullopt);
                     }),
        gate_up_(gate_up),
        down_(down),
        gate_(gate) {}

  const char* name() const override { return "CpuFeedForward"; }

  void eval_cpu(const std::vector<mx::array>& in, mx::array& out) override {
    dispatch([x = Rows(in[0]), gate_up = gate_up_.matrix(in, 1),
              down = down_.matrix(in, 1 + gate_up_.arrays()), gate = gate_, &k = active_kernels(),
              y = allocate(out)] {
      std::vector<float> copy;
      auto [data, stride] = x.resolve(copy);
      const int count = int(x.count()), width = down.columns;
      std::vector<float> joined(int64_t(count) * 2 * width);
      multiply(k, gate_up, data, stride, count, joined.data());
      for (int r = 0; r < count; r++) {
        float* row = joined.data() + int64_t(r) * 2 * width;
        k.gated(gate, row, row + width, width, row);
      }
      multiply(k, down, joined.data(), 2 * width, count, y);
    });
  }

 private:
  Format gate_up_, down_;
  Gate gate_;
};

std::vector<mx::array> with_extra(std::vector<mx::array> inputs, const Positions& at, int size,
                                  const std::optional<mx::array>& weight,
                                  const std::optional<mx::array>& periods, mx::Stream s) {
  require(at.dims >= 0 && at.dims <= size && at.dims % 2 == 0 && (at.dims > 0) == periods.has_value(),
          "RoPE needs periods and an even number of features of a head");
  if (weight) {
    require(weight->shape() == mx::Shape{size} && weight->dtype() == mx::float32,
            "the weight of a norm is float32 (D,)");
    inputs.push_back(packed(*weight, s));
  }
  if (periods) {
    require(periods->shape() == mx::Shape{at.dims / 2} && periods->dtype() == mx::float32,
            "periods are float32 (dims / 2,)");
    inputs.push_back(packed(*periods, s));
  }
  return inputs;
}

} // namespace

mx::array store(const mx::array& buffer, const mx::array& x, int slot, const Positions& at,
                const std::optional<mx::array>& weight, const std::optional<mx::array>& periods,
                mx::StreamOrDevice stream) {
  const mx::Stream s = mx::to_stream(stream, mx::Device::cpu);
  require(buffer.ndim() == 4 && x.ndim() == 3 && buffer.dtype() == mx::float32 &&
              x.dtype() == mx::float32 && buffer.shape(0) == x.shape(0) && slot >= 0 &&
              slot + x.shape(1) <= buffer.shape(2) && at.start >= 0 &&
              at.start + buffer.shape(1) * buffer.shape(3) <= x.shape(2),
          "store takes a buffer (B, K, C, D) and x (B, L, features) in float32");
  const Extra extra = {weight.has_value(), periods.has_value()};
  return mx::array(buffer.shape(), mx::float32, std::make_shared<Store>(s, at, slot, extra),
                   with_extra({buffer, x}, at, buffer.shape(3), weight, periods, s));
}

mx::array cached_attention(const mx::array& x, const mx::array& keys, const mx::array& values,
                           int heads, int tokens, float scale, const Positions& at,
                           const std::optional<mx::array>& weight,
                           const std::optional<mx::array>& periods, mx::StreamOrDevice stream) {
  const mx::Stream s = mx::to_stream(stream, mx::Device::cpu);
  require(keys.ndim() == 4 && keys.shape() == values.shape() && x.ndim() == 3 &&
              x.dtype() == mx::float32 && keys.dtype() == mx::float32 &&
              values.dtype() == mx::float32 && keys.shape(0) == x.shape(0) &&
              heads % keys.shape(1) == 0 && heads / keys.shape(1) <= 64 &&
              tokens <= keys.shape(2) && tokens >= x.shape(1) && at.start >= 0 &&
              at.start + heads * keys.shape(3) <= x.shape(2),
          "cached attention takes x (B, L, features), keys and values (B, K, C, D) in float32");
  const Extra extra = {weight.has_value(), periods.has_value()};
  return mx::array(mx::Shape{x.shape(0), x.shape(1), heads * keys.shape(3)}, mx::float32,
                   std::make_shared<CachedAttention>(s, at, heads, tokens, scale, extra),
                   with_extra({x, keys, values}, at,
                              keys.shape(3), weight, periods, s));
}

mx::array feed_forward(const mx::array& x, const std::vector<mx::array>& gate_up,
                       const std::string& gate_up_mode, int gate_up_bits, int gate_up_group,
                       const std::vector<mx::array>& down, const std::string& down_mode,
                       int down_bits, int down_group, bool gelu, mx::StreamOrDevice stream) {
  const mx::Stream s = mx::to_stream(stream, mx::Device::cpu);
  const Format first = format_of(gate_up_mode, gate_up_bits, gate_up_group);
  const Format second = format_of(down_mode, down_bits, down_group);
  require(x.dtype() == mx::float32 && x.ndim() > 0 && gate_up.at(0).ndim() == 2,
          "a feed-forward takes x in float32");
  std::vector<mx::array> inputs = checked(x.shape(-1), gate_up, first, 2, s);
  for (const mx::array& array : checked(gate_up[0].shape(0) / 2, down, second, 2, s)) {
    inputs.push_back(array);
  }
  inputs.insert(inputs.begin(), x);
  mx::Shape shape = x.shape();
  shape.back() = down[0].shape(0);
  return mx::array(shape, mx::float32,
                   std::make_shared<FeedForward>(s, first, second, gelu ? Gate::gelu : Gate::silu),
                   std::move(inputs));
}

} // namespace mlxarch
