// Kernels for AVX-512 with VNNI.
// All headers come before the target region: the linker could pick code of a standard header that was compiled inside
// it for every caller, and that code would fault on older machines.
#include <immintrin.h>
#include <math.h>

#include "cpu/isa/attention_kernels.h"
#include "cpu/generated/iq_codebooks.h"
#include "cpu/isa/kernels.h"
#include "cpu/quant/layout.h"

#define AI inline __attribute__((always_inline))
#define KTX_TILE_TOKENS 6
#define KTX_GEMV_TOKENS 8
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")

namespace ktx {
namespace avx512 {
namespace {
#include "cpu/isa/simd_avx512.inl"
#include "cpu/isa/kernels.inl"
#include "cpu/isa/attention.inl"
}  // namespace
}  // namespace avx512

constinit const Kernels AVX512VNNI_KERNELS = avx512::kernel_table(0, false);
constinit const AttentionKernels AVX512VNNI_ATTENTION = avx512::attention_table(nullptr);
}  // namespace ktx
#pragma GCC pop_options
