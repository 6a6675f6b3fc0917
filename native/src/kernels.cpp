// The kernels of one instruction set. setup.py compiles this file once for each, with ISA defined
// as its name.

#include "kernels.h"
#include "simd.h"

#include "product.inc"
#include "attention.inc"
#include "elementwise.inc"

#define NAME_OF(set) #set
#define NAME(set) NAME_OF(set)

namespace mlxarch {
namespace ISA {

const Kernels& kernels() {
  static const Kernels table = {
      NAME(ISA),    PANEL,  prepared_floats,  prepare, multiply_few, multiply_many,
      panel_floats, attend, attention_floats, gated,   rms_norm,     argmax,
  };
  return table;
}

} // namespace ISA
} // namespace mlxarch
