// The kernels for 256-bit VNNI. All headers come before the target region: code of a standard header compiled inside it
// could be picked by the linker for every caller, and would then fault on lesser machines.
#include <immintrin.h>
#include <math.h>

#include "grids.h"
#include "kernels.h"
#include "layout.h"
#include "numbers.h"

#define AI inline __attribute__((always_inline))
#define KTX_TILE 2
#define KTX_FEW 2
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")

namespace ktx {
#define KTX_VNNI "%{vex%}"
namespace avxvnni {
namespace {
#include "verbs_avx2.inl"
#include "formats.inl"
#include "generic.inl"
}  // namespace
}  // namespace avxvnni
#undef KTX_VNNI

// The same instruction as AVX512-VNNI with short vectors encodes it: what these kernels are tested with on machines that have no other.
#define KTX_VNNI "%{evex%}"
namespace avx512vl {
namespace {
#include "verbs_avx2.inl"
#include "formats.inl"
#include "generic.inl"
}  // namespace
}  // namespace avx512vl

const Kernels AVXVNNI_KERNELS = {0, false, KTX_TILE, KTX_FEW, avxvnni::quantise, avxvnni::place, avxvnni::place_floats, avxvnni::multiply, avxvnni::unpack, avxvnni::write, avxvnni::add_weighted, avxvnni::gate, avxvnni::quantise_block};
const Kernels AVX512VL_KERNELS = {0, false, KTX_TILE, KTX_FEW, avx512vl::quantise, avx512vl::place, avx512vl::place_floats, avx512vl::multiply, avx512vl::unpack, avx512vl::write, avx512vl::add_weighted, avx512vl::gate, avx512vl::quantise_block};
}  // namespace ktx
#pragma GCC pop_options
