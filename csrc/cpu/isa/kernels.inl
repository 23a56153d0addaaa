// All kernels of one instruction set. Each .cpp of this folder includes its SIMD primitives (simd_*.inl) and this file
// inside a namespace and a target region of its own; README.md in csrc/cpu describes the macros that it defines before.

// Columns of a span: the part of a group of 16 rows that a GEMM dequantizes at once, 4 KB of codes, which stay in the
// first-level cache.
constexpr int SPAN = 256;

#include "cpu/isa/dequant.inl"
#include "cpu/isa/prefetch.inl"
#include "cpu/isa/int_gemm.inl"
#include "cpu/isa/float_gemm.inl"
#ifdef KTX_BF16
#include "cpu/isa/bf16_gemm.inl"
#endif
#ifdef KTX_AMX
#include "cpu/isa/amx_int8.inl"
#include "cpu/isa/amx_bf16.inl"
#endif
#include "cpu/isa/matmul.inl"
#include "cpu/isa/activations.inl"
#include "cpu/isa/quantize_weights.inl"

// Returns the table of this instruction set; the arguments are fields of Kernels (kernels.h).
constexpr Kernels kernel_table(int bf16_columns, bool bf16_tiles) {
  return {
      .bf16_columns = bf16_columns,
      .bf16_tiles = bf16_tiles,
      .tile_tokens = KTX_TILE_TOKENS,
      .gemv_tokens = KTX_GEMV_TOKENS,
      .quantize = quantize,
      .scatter = scatter,
      .scatter_floats = scatter_floats,
      .multiply = multiply,
      .unpack = unpack,
      .write = write,
      .add_weighted = add_weighted,
      .gated_activation = gated_activation,
      .quantize_block = quantize_block,
  };
}
