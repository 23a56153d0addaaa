// The kernels for one instruction set. All headers come before the target region: code of a standard header compiled inside it
// could be picked by the linker for every caller, and would then fault on lesser machines.
#include <immintrin.h>
#include <math.h>

#include "attention_kernels.h"
#include "grids.h"
#include "kernels.h"
#include "layout.h"
#include "looped.h"

#define KTX_TILE 2
#define KTX_FEW 2

namespace ktx {
namespace scalar {
namespace {
#include "verbs_scalar.inl"
#include "formats.inl"
#include "generic.inl"
#include "attention.inl"
}  // namespace
}  // namespace scalar

const Kernels SCALAR_KERNELS = {0, false, KTX_TILE, KTX_FEW, scalar::quantise, scalar::place, scalar::place_floats, scalar::multiply, scalar::unpack, scalar::write, scalar::add_weighted, scalar::gate, scalar::quantise_block};
const AttentionKernels SCALAR_ATTENTION = {scalar::convert, scalar::score, scalar::soften, scalar::gather_values, nullptr};
}  // namespace ktx
