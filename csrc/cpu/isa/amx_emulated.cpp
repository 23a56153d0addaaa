// The AMX kernels on emulated tile registers, to test them on any machine. Results equal those of amx.cpp bit for bit.
#include <immintrin.h>
#include <math.h>

#include "cpu/generated/iq_codebooks.h"
#include "cpu/isa/kernels.h"
#include "cpu/quant/layout.h"
#include "cpu/isa/scalar_lanes.h"
#include "cpu/quant/dtype.h"

#define KTX_AMX
#define KTX_BF16
#define KTX_TILE_TOKENS 16
#define KTX_GEMV_TOKENS 2

namespace ktx {
namespace amxmodel {
namespace {
#include "cpu/isa/simd_scalar.inl"
#include "cpu/isa/amx_tiles_emulated.inl"
#include "cpu/isa/kernels.inl"
}  // namespace
}  // namespace amxmodel

constinit const Kernels AMXMODEL_KERNELS = amxmodel::kernel_table(32, true);
void tile_dot_model(TileKind kind, int rows, int bytes, const void* a, const void* b, void* c) {
  amxmodel::tile_product(kind, rows, bytes, a, b, c);
}
}  // namespace ktx
