// Kernels for AVX2 with FMA and F16C.
// All headers come before the target region: the linker could pick code of a standard header that was compiled inside
// it for every caller, and that code would fault on older machines.
#include <immintrin.h>
#include <math.h>

#include "cpu/isa/attention_kernels.h"
#include "cpu/generated/iq_codebooks.h"
#include "cpu/isa/kernels.h"
#include "cpu/quant/layout.h"

#define AI inline __attribute__((always_inline))
#define KTX_TILE_TOKENS 2
#define KTX_GEMV_TOKENS 2
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")

namespace ktx {
namespace avx2 {
namespace {
#include "cpu/isa/simd_avx2.inl"
#include "cpu/isa/kernels.inl"
#include "cpu/isa/attention.inl"
}  // namespace
}  // namespace avx2

constinit const Kernels AVX2_KERNELS = avx2::kernel_table(0, false);
constinit const AttentionKernels AVX2_ATTENTION = avx2::attention_table(nullptr);
}  // namespace ktx
#pragma GCC pop_options
