// Kernels for AMX: products over tile registers in int8 and bf16.
// All headers come before the target region: the linker could pick code of a standard header that was compiled inside
// it for every caller, and that code would fault on older machines.
#include <immintrin.h>
#include <math.h>

#include "cpu/generated/iq_codebooks.h"
#include "cpu/isa/kernels.h"
#include "cpu/quant/layout.h"
#include "cpu/quant/dtype.h"

#define AI inline __attribute__((always_inline))
#define KTX_VBMI
#define KTX_BF16
#define KTX_AMX
#define KTX_TILE_TOKENS 16
#define KTX_GEMV_TOKENS 8
#pragma GCC push_options
#pragma GCC target( \
    "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512vbmi,avx512bf16,amx-tile,amx-int8,amx-bf16")

namespace ktx {
namespace amx {
namespace {
#include "cpu/isa/simd_avx512.inl"
#include "cpu/isa/amx_tiles.inl"
#include "cpu/isa/kernels.inl"
}  // namespace
}  // namespace amx

constinit const Kernels AMX_KERNELS = amx::kernel_table(32, true);
void tile_dot_amx(TileKind kind, int rows, int bytes, const void* a, const void* b, void* c) {
  amx::tile_product(kind, rows, bytes, a, b, c);
}
}  // namespace ktx
#pragma GCC pop_options
