// The kernels for one instruction set. All headers come before the target region: code of a standard header compiled inside it
// could be picked by the linker for every caller, and would then fault on lesser machines.
#include <immintrin.h>
#include <math.h>

#include "attention_kernels.h"
#include "grids.h"
#include "kernels.h"
#include "layout.h"

#define AI inline __attribute__((always_inline))
#define KTX_TILE 6
#define KTX_FEW 8
#define KTX_FAST
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")

namespace ktx {
namespace avx512 {
namespace {
#include "verbs_avx512.inl"
#include "formats.inl"
#include "generic.inl"
#include "attention.inl"
}  // namespace
}  // namespace avx512

const Kernels AVX512VNNI_KERNELS = {0, false, KTX_TILE, KTX_FEW, avx512::quantise, avx512::place, avx512::place_floats, avx512::multiply, avx512::unpack, avx512::write, avx512::add_weighted, avx512::gate, avx512::quantise_block};
const AttentionKernels AVX512VNNI_ATTENTION = {avx512::convert, avx512::score, avx512::soften, avx512::gather_values, nullptr};
}  // namespace ktx
#pragma GCC pop_options
