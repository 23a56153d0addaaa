// The kernels for one instruction set. All headers come before the target region: code of a standard header compiled inside it
// could be picked by the linker for every caller, and would then fault on lesser machines.
#include <immintrin.h>
#include <math.h>

#include "grids.h"
#include "kernels.h"
#include "layout.h"
#include "numbers.h"

#define AI inline __attribute__((always_inline))
#define KTX_VBMI
#define KTX_BF16
#define KTX_TILES
#define KTX_UNROLL _Pragma("GCC unroll 16")
#define KTX_TILE 16
#define KTX_FEW 8
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512vbmi,avx512bf16,amx-tile,amx-int8,amx-bf16")

namespace ktx {
namespace amx {
namespace {
#include "verbs_avx512.inl"
#include "formats.inl"
#include "tiles_amx.inl"
#include "generic.inl"
}  // namespace
}  // namespace amx

const Kernels AMX_KERNELS = {32, true, KTX_TILE, KTX_FEW, amx::quantise, amx::place, amx::place_floats, amx::multiply, amx::unpack, amx::write, amx::add_weighted, amx::gate, amx::quantise_block};
void tile_dot_amx(TileKind kind, int rows, int bytes, const void* a, const void* b, void* c) { amx::one_product(kind, rows, bytes, a, b, c); }
}  // namespace ktx
#pragma GCC pop_options
