// Python module mlxarch_cpu._kernels, in MLX's nanobind domain: its functions take and return
// mlx.core.array.

#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/variant.h>
#include <nanobind/stl/vector.h>

#include "kernels.h"
#include "mlx/version.h"
#include "ops.h"
#include "pool.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace mlxarch {

namespace {

const Kernels* chosen = find_kernels(nullptr);

} // namespace

const Kernels& active_kernels();  // declared in primitive.h, which the binding does not need

const Kernels& active_kernels() {
  return *chosen;
}

bool use_instruction_set(const char* name) {
  const Kernels* found = find_kernels(name);
  if (found != nullptr) {
    chosen = found;
  }
  return found != nullptr;
}

const char* instruction_set() {
  return chosen->name;
}

} // namespace mlxarch

NB_MODULE(_kernels, m) {
  using namespace mlxarch;
  m.attr("MLX_VERSION") = std::to_string(MLX_VERSION_MAJOR) + "." +
                          std::to_string(MLX_VERSION_MINOR) + "." +
                          std::to_string(MLX_VERSION_PATCH);
  m.def("use_instruction_set", [](const std::string& name) {
    return use_instruction_set(name.empty() ? nullptr : name.c_str());
  }, "name"_a);
  m.def("instruction_set", [] { return std::string(instruction_set()); });
  m.def("set_threads", &set_threads, "count"_a);
  m.def("threads", &threads);
  m.def("matmul", &matmul, "x"_a, "arrays"_a, "mode"_a, "bits"_a, "group_size"_a,
        "stream"_a = nb::none());
  m.def("expert_matmul", &expert_matmul, "x"_a, "arrays"_a, "experts"_a, "repeats"_a, "mode"_a,
        "bits"_a, "group_size"_a, "stream"_a = nb::none());
  m.def("attention", &attention, "q"_a, "k"_a, "v"_a, "scale"_a, "causal"_a,
        "mask"_a = nb::none(), "sinks"_a = nb::none(), "stream"_a = nb::none());
  m.def("gated", &gated, "a"_a, "b"_a, "gelu"_a, "stream"_a = nb::none());
  m.def("rms_norm", &rms_norm, "x"_a, "weight"_a, "eps"_a, "stream"_a = nb::none());
  m.def("store", [](const mx::array& buffer, const mx::array& x, int slot, int start, int first,
                    int dims, bool interleaved, float eps, std::optional<mx::array> weight,
                    std::optional<mx::array> periods) {
    return store(buffer, x, slot, {start, first, dims, interleaved, eps}, weight, periods, {});
  }, "buffer"_a, "x"_a, "slot"_a, "start"_a, "first"_a, "dims"_a, "interleaved"_a, "eps"_a,
     "weight"_a = nb::none(), "periods"_a = nb::none());
  m.def("cached_attention", [](const mx::array& x, const mx::array& keys, const mx::array& values,
                               int heads, int tokens, float scale, int start, int first, int dims,
                               bool interleaved, float eps, std::optional<mx::array> weight,
                               std::optional<mx::array> periods) {
    return cached_attention(x, keys, values, heads, tokens, scale,
                            {start, first, dims, interleaved, eps}, weight, periods, {});
  }, "x"_a, "keys"_a, "values"_a, "heads"_a, "tokens"_a, "scale"_a, "start"_a, "first"_a, "dims"_a,
     "interleaved"_a, "eps"_a, "weight"_a = nb::none(), "periods"_a = nb::none());
  m.def("feed_forward", &feed_forward, "x"_a, "gate_up"_a, "gate_up_mode"_a, "gate_up_bits"_a,
        "gate_up_group"_a, "down"_a, "down_mode"_a, "down_bits"_a, "down_group"_a, "gelu"_a,
        "stream"_a = nb::none());
  m.def("rope", &rope, "x"_a, "dims"_a, "interleaved"_a, "offset"_a, "periods"_a,
        "stream"_a = nb::none());
}
