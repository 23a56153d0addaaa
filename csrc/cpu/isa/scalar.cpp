// Portable kernels: vectors are arrays, for any x86-64, and the reference of the other instruction sets.
#include <immintrin.h>
#include <math.h>

#include "cpu/isa/attention_kernels.h"
#include "cpu/generated/iq_codebooks.h"
#include "cpu/isa/kernels.h"
#include "cpu/quant/layout.h"
#include "cpu/isa/scalar_lanes.h"

#define KTX_TILE_TOKENS 2
#define KTX_GEMV_TOKENS 2

namespace ktx {
namespace scalar {
namespace {
#include "cpu/isa/simd_scalar.inl"
#include "cpu/isa/kernels.inl"
#include "cpu/isa/attention.inl"
}  // namespace
}  // namespace scalar

constinit const Kernels SCALAR_KERNELS = scalar::kernel_table(0, false);
constinit const AttentionKernels SCALAR_ATTENTION = scalar::attention_table(nullptr);
}  // namespace ktx
