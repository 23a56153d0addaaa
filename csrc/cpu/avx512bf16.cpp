// Products of bf16 serve weights and attention in half precision; what else there is, is as without them. All headers come before the target region: code of a standard header compiled inside it
// could be picked by the linker for every caller, and would then fault on lesser machines.
#include <immintrin.h>
#include <math.h>

#include "attention_kernels.h"
#include "grids.h"
#include "kernels.h"
#include "layout.h"

#define AI inline __attribute__((always_inline))
#define KTX_VBMI
#define KTX_BF16
#define KTX_TILE 6
#define KTX_FEW 8
#define KTX_FAST
#define KTX_BASE AVX512VBMI_KERNELS
#define KTX_INTS(X)
#define KTX_FLOATS(X) X(BF16, LBF16) X(F8_E4M3, LF8)
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512vbmi,avx512bf16")

namespace ktx {
namespace bf16 {
namespace {
#include "verbs_avx512.inl"
#include "formats.inl"
#include "generic.inl"
#include "attention.inl"
#include "attention_bf16.inl"
}  // namespace
}  // namespace bf16

const Kernels AVX512BF16_KERNELS = {2, false, KTX_TILE, KTX_FEW, bf16::quantise, bf16::place, bf16::place_floats, bf16::multiply, bf16::unpack, bf16::write, bf16::add_weighted, bf16::gate, bf16::quantise_block};
const PairKernels BF16_PAIRS = {bf16::pair_queries, bf16::to_bf16, bf16::score_pairs, bf16::score_latent, bf16::soften_pairs, bf16::gather_pairs, bf16::COLUMN_ORDER};
const AttentionKernels AVX512BF16_ATTENTION = {bf16::convert, bf16::score, bf16::soften, bf16::gather_values, &BF16_PAIRS};
}  // namespace ktx
#pragma GCC pop_options
