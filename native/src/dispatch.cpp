// Choice of the instruction set.

#include <cstring>
#include <initializer_list>

#include "kernels.h"

namespace mlxarch {

namespace {

const Kernels* available(const char* name) {
#if defined(__x86_64__)
  if (std::strcmp(name, "avx512") == 0 && __builtin_cpu_supports("avx512f") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq")) {
    return &avx512::kernels();
  }
  if (std::strcmp(name, "avx2") == 0 && __builtin_cpu_supports("avx2") &&
      __builtin_cpu_supports("fma")) {
    return &avx2::kernels();
  }
#endif
  return std::strcmp(name, "baseline") == 0 ? &baseline::kernels() : nullptr;
}

} // namespace

const Kernels* find_kernels(const char* name) {
  if (name != nullptr) {
    return available(name);
  }
  for (const char* each : {"avx512", "avx2"}) {
    if (const Kernels* found = available(each)) {
      return found;
    }
  }
  return available("baseline");
}

} // namespace mlxarch
