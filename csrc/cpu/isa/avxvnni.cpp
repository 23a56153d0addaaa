// Kernels for 256-bit VNNI, in the VEX encoding (AVX-VNNI) and in the EVEX encoding (AVX512-VNNI with short vectors).
// All headers come before the target region: the linker could pick code of a standard header that was compiled inside
// it for every caller, and that code would fault on older machines.
#include <immintrin.h>
#include <math.h>

#include "cpu/generated/iq_codebooks.h"
#include "cpu/isa/kernels.h"
#include "cpu/quant/layout.h"
#include "cpu/quant/dtype.h"

#define AI inline __attribute__((always_inline))
#define KTX_TILE_TOKENS 2
#define KTX_GEMV_TOKENS 2
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")

namespace ktx {
#define KTX_VNNI "%{vex%}"
namespace avxvnni {
namespace {
#include "cpu/isa/simd_avx2.inl"
#include "cpu/isa/kernels.inl"
}  // namespace
}  // namespace avxvnni
#undef KTX_VNNI

// The same instruction as AVX512-VNNI with short vectors encodes it, to test these kernels on machines without
// AVX-VNNI.
#define KTX_VNNI "%{evex%}"
namespace avx512vl {
namespace {
#include "cpu/isa/simd_avx2.inl"
#include "cpu/isa/kernels.inl"
}  // namespace
}  // namespace avx512vl

constinit const Kernels AVXVNNI_KERNELS = avxvnni::kernel_table(0, false);
constinit const Kernels AVX512VL_KERNELS = avx512vl::kernel_table(0, false);
}  // namespace ktx
#pragma GCC pop_options
