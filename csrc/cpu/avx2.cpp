// The kernels for one instruction set. All headers come before the target region: code of a standard header compiled inside it
// could be picked by the linker for every caller, and would then fault on lesser machines.
#include <immintrin.h>
#include <math.h>

#include "attention_kernels.h"
#include "grids.h"
#include "kernels.h"
#include "layout.h"

#define AI inline __attribute__((always_inline))
#define KTX_TILE 2
#define KTX_FEW 2
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")

namespace ktx {
namespace avx2 {
namespace {
#include "verbs_avx2.inl"
#include "formats.inl"
#include "generic.inl"
#include "attention.inl"
}  // namespace
}  // namespace avx2

const Kernels AVX2_KERNELS = {0, false, KTX_TILE, KTX_FEW, avx2::quantise, avx2::place, avx2::place_floats, avx2::multiply, avx2::unpack, avx2::write, avx2::add_weighted, avx2::gate, avx2::quantise_block};
const AttentionKernels AVX2_ATTENTION = {avx2::convert, avx2::score, avx2::soften, avx2::gather_values, nullptr};
}  // namespace ktx
#pragma GCC pop_options
