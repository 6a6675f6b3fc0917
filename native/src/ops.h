// Operations for MLX's graph on CPU streams, in float32. Each has a reference made of MLX's own
// operations, by which gradients are computed.

#pragma once

#include <optional>
#include <string>
#include <vector>

#include "mlx/array.h"
#include "mlx/utils.h"

namespace mlxarch {

namespace mx = mlx::core;

// Instruction set of the kernels: its name, or null for the best. False if there is no such set.
bool use_instruction_set(const char* name);
const char* instruction_set();

// x (..., columns) -> (..., rows): x W^T. Arrays and modes: weight, scales and biases ("affine", 2
// to 6 or 8 bits), weight and scales ("mxfp4"), or weight alone ("dense").
mx::array matmul(const mx::array& x, const std::vector<mx::array>& arrays, const std::string& mode,
                 int bits, int group_size, mx::StreamOrDevice stream);

// x (N, columns), experts (N * repeats,) -> (N * repeats, rows): output i is the product of row
// i / repeats of x with matrix experts[i] of a stack (E, rows, columns)
mx::array expert_matmul(const mx::array& x, const std::vector<mx::array>& arrays,
                        const mx::array& experts, int repeats, const std::string& mode, int bits,
                        int group_size, mx::StreamOrDevice stream);

// q (B, H, L, D), k (B, K, S, D), v (B, K, S, E) -> (B, H, L, E); mask: bool (L, S) or
// (B or 1, 1, L, S), which keys a query may attend to
mx::array attention(const mx::array& q, const mx::array& k, const mx::array& v, float scale,
                    bool causal, const std::optional<mx::array>& mask,
                    const std::optional<mx::array>& sinks, mx::StreamOrDevice stream);

// gate(a) * b; "silu" or "gelu"
mx::array gated(const mx::array& a, const mx::array& b, bool gelu, mx::StreamOrDevice stream);

// x / rms(x) * weight over the last axis
mx::array rms_norm(const mx::array& x, const mx::array& weight, float eps,
                   mx::StreamOrDevice stream);

// Rotate the first dims features of x (B, H, L, D); periods (dims / 2,) as mlx.fast.rope's freqs
mx::array rope(const mx::array& x, int dims, bool interleaved, int offset, const mx::array& periods,
               mx::StreamOrDevice stream);

// Heads that start at feature `start` of each token, the first token at position `first`: RMS norm
// with `eps`, if there is a weight, then RoPE of the first `dims` features, if there are any.
struct Positions {
  int start;
  int first;
  int dims;
  bool interleaved;
  float eps;
};

// Buffer (B, K, C, D) with the heads of x (B, L, features) from slot `slot` on; written in place if
// nothing else uses the buffer. weight (D,), periods (dims / 2,)
mx::array store(const mx::array& buffer, const mx::array& x, int slot, const Positions& at,
                const std::optional<mx::array>& weight, const std::optional<mx::array>& periods,
                mx::StreamOrDevice stream);

// Causal attention of the heads of x (B, L, features) over the first `tokens` keys and values
// (B, K, C, D), the last of which are those of x: (B, L, heads * D)
mx::array cached_attention(const mx::array& x, const mx::array& keys, const mx::array& values,
                           int heads, int tokens, float scale, const Positions& at,
                           const std::optional<mx::array>& weight,
                           const std::optional<mx::array>& periods, mx::StreamOrDevice stream);

// down(gate(g) * u) of the halves g and u of gate_up(x)
mx::array feed_forward(const mx::array& x, const std::vector<mx::array>& gate_up,
                       const std::string& gate_up_mode, int gate_up_bits, int gate_up_group,
                       const std::vector<mx::array>& down, const std::string& down_mode,
                       int down_bits, int down_group, bool gelu, mx::StreamOrDevice stream);

} // namespace mlxarch
