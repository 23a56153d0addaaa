// Kernels for AVX-512 with VBMI: byte permutations serve the code books of the IQ types. Everything else is
// AVX512VNNI_KERNELS'. All headers come before the target region: the linker could pick code of a standard header that
// was compiled inside it for every caller, and that code would fault on older machines.
#include <immintrin.h>
#include <math.h>

#include "cpu/generated/iq_codebooks.h"
#include "cpu/isa/kernels.h"
#include "cpu/quant/layout.h"
#include "cpu/quant/dtype.h"

#define AI inline __attribute__((always_inline))
#define KTX_VBMI
#define KTX_TILE_TOKENS 6
#define KTX_GEMV_TOKENS 8
#define KTX_BASE_KERNELS AVX512VNNI_KERNELS
#define KTX_INT_TYPES(X) X(IQ2_XXS) X(IQ2_XS) X(IQ2_S) X(IQ3_XXS) X(IQ3_S) X(IQ1_S) X(IQ1_M)
#define KTX_FLOAT_TYPES(X)
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512vbmi")

namespace ktx {
namespace vbmi {
namespace {
#include "cpu/isa/simd_avx512.inl"
#include "cpu/isa/kernels.inl"
}  // namespace
}  // namespace vbmi

constinit const Kernels AVX512VBMI_KERNELS = vbmi::kernel_table(0, false);
}  // namespace ktx
#pragma GCC pop_options
