// The kernels for one instruction set. All headers come before the target region: code of a standard header compiled inside it
// could be picked by the linker for every caller, and would then fault on lesser machines.
#include <immintrin.h>
#include <math.h>

#include "grids.h"
#include "kernels.h"
#include "layout.h"
#include "looped.h"
#include "numbers.h"

#define KTX_TILES
#define KTX_UNROLL  // a lane of the model is a loop: sixteen vectors of them side by side take the compiler minutes
#define KTX_BF16
#define KTX_TILE 16
#define KTX_FEW 2

namespace ktx {
namespace amxmodel {
namespace {
#include "verbs_scalar.inl"
#include "formats.inl"
#include "tiles_model.inl"
#include "generic.inl"
}  // namespace
}  // namespace amxmodel

const Kernels AMXMODEL_KERNELS = {32, true, KTX_TILE, KTX_FEW, amxmodel::quantise, amxmodel::place, amxmodel::place_floats, amxmodel::multiply, amxmodel::unpack, amxmodel::write, amxmodel::add_weighted, amxmodel::gate, amxmodel::quantise_block};
void tile_dot_model(TileKind kind, int rows, int bytes, const void* a, const void* b, void* c) { amxmodel::one_product(kind, rows, bytes, a, b, c); }
}  // namespace ktx
