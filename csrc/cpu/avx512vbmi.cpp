// Byte permutations (VBMI) serve code books; what else there is, is as without them. All headers come before the target region: code of a standard header compiled inside it
// could be picked by the linker for every caller, and would then fault on lesser machines.
#include <immintrin.h>
#include <math.h>

#include "grids.h"
#include "kernels.h"
#include "layout.h"
#include "numbers.h"

#define AI inline __attribute__((always_inline))
#define KTX_VBMI
#define KTX_TILE 6
#define KTX_FEW 8
#define KTX_FAST
#define KTX_BASE AVX512VNNI_KERNELS
#define KTX_INTS(X) X(IQ2_XXS) X(IQ2_XS) X(IQ2_S) X(IQ3_XXS) X(IQ3_S) X(IQ1_S) X(IQ1_M)
#define KTX_FLOATS(X)
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512vbmi")

namespace ktx {
namespace vbmi {
namespace {
#include "verbs_avx512.inl"
#include "formats.inl"
#include "generic.inl"
}  // namespace
}  // namespace vbmi

const Kernels AVX512VBMI_KERNELS = {0, false, KTX_TILE, KTX_FEW, vbmi::quantise, vbmi::place, vbmi::place_floats, vbmi::multiply, vbmi::unpack, vbmi::write, vbmi::add_weighted, vbmi::gate, vbmi::quantise_block};
}  // namespace ktx
#pragma GCC pop_options
