// Kernels for AVX-512 with BF16: products of bf16 serve half-precision weights and attention. Everything else is
// AVX512VBMI_KERNELS'. All headers come before the target region: the linker could pick code of a standard header that
// was compiled inside it for every caller, and that code would fault on older machines.
#include <immintrin.h>
#include <math.h>

#include "cpu/isa/attention_kernels.h"
#include "cpu/generated/iq_codebooks.h"
#include "cpu/isa/kernels.h"
#include "cpu/quant/layout.h"

#define AI inline __attribute__((always_inline))
#define KTX_VBMI
#define KTX_BF16
#define KTX_TILE_TOKENS 6
#define KTX_GEMV_TOKENS 8
#define KTX_BASE_KERNELS AVX512VBMI_KERNELS
#define KTX_INT_TYPES(X)
#define KTX_FLOAT_TYPES(X) X(BF16, LoadBF16) X(F8_E4M3, LoadF8)
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512vbmi,avx512bf16")

namespace ktx {
namespace bf16 {
namespace {
#include "cpu/isa/simd_avx512.inl"
#include "cpu/isa/kernels.inl"
#include "cpu/isa/attention.inl"
#include "cpu/isa/attention_bf16.inl"
}  // namespace
}  // namespace bf16

constinit const Kernels AVX512BF16_KERNELS = bf16::kernel_table(2, false);
constinit const Bf16Kernels BF16_ATTENTION = {
    .pack_queries = bf16::pack_queries_bf16,
    .convert_row = bf16::row_to_bf16,
    .score = bf16::score_bf16,
    .score_latent = bf16::score_latent,
    .online_softmax = bf16::online_softmax_bf16,
    .accumulate_pv = bf16::accumulate_pv_bf16,
    .column_order = bf16::COLUMN_ORDER,
};
constinit const AttentionKernels AVX512BF16_ATTENTION = bf16::attention_table(&BF16_ATTENTION);
}  // namespace ktx
#pragma GCC pop_options
