// The table of kernels that each instruction set provides to the drivers (linear.cpp, experts.cpp), and the form in
// which activations are passed to them. A group is 16 rows of a packed matrix (quant/layout.h); k is the number of
// columns.
#pragma once
#include <cstddef>
#include <cstdint>

#include "cpu/quant/dtype.h"

namespace ktx {
struct Layout;

// One quantized row of activations (a token): int8 with a scale per 32 columns, and the sums that weight types with an
// offset or a minimum need.
struct RowView {
  int8_t* q;       // [k]
  float* scale;    // [k/32]
  int32_t* sum16;  // [k/16] sum of q
};

// Activations of n tokens, cut into tiles of at most `tile_tokens` tokens, whose sums a GEMM holds in registers. Tile t
// starts at token start(t) and has T = start(t + 1) - start(t) tokens. Inside a tile arrays are indexed [element of a
// row][token of the tile], because kernels read one element of all its tokens; the tile begins at index start(t) *
// (elements of a row). Exceptions: kernels with tile registers (AMX) read the q of more than `gemv_tokens` tokens as
// [k/32][T][32] bytes; with `bf16` all products are in bf16, over tiles of BF16_TILE_TOKENS tokens, and `pair` is
// [k/32][T][16] without q.
constexpr int BF16_TILE_TOKENS = 16;
struct ActTiles {
  int n = 0, tiles = 0;
  int64_t k = 0;
  int8_t* q = nullptr;       // [k/4][T][4]
  float* scale = nullptr;    // [k/32][T]
  int32_t* sum16 = nullptr;  // [k/16][T] minus the sum of q: times the offset of a type's codes, it starts an int32 sum
  int32_t* sum32 = nullptr;  // [k/32][T] the same for sub-blocks of 32 columns
  float* scaled_sum16 = nullptr;  // [k/16][T] scale * sum of q: what the minimum of a sub-block multiplies
  float* scaled_sum32 = nullptr;  // [k/32][T]
  float* f = nullptr;             // [k][T] not quantized, for float weights
  uint32_t* pair = nullptr;       // [k/2][T] the same as pairs of bf16, if the kernels multiply these and k is even
  bool bf16 = false;
  int start(int t) const { return bf16 ? (t < tiles ? t * BF16_TILE_TOKENS : n) : int(int64_t(n) * t / tiles); }
};

// Where a token is in ActTiles: the first token of its tile, the number of tokens of the tile, the index of the token
// in the tile.
struct TileSlot {
  int first, count, at;
};
// Calls f(token, slot) for the tokens of a tile.
template <class F> void for_tile(const ActTiles& x, int tile, F&& f) {
  const int first = x.start(tile), count = x.start(tile + 1) - first;
  for (int t = 0; t < count; ++t) f(first + t, TileSlot{first, count, t});
}

enum Activation { SILU, GELU, GELU_TANH, RELU, RELU2, SWIGLU_OAI };

struct Kernels {
  int bf16_columns;  // float weights are multiplied in bf16 if k is a multiple of this; 0: never
  bool bf16_tiles;   // supports ActTiles with `bf16` (AMX)
  int tile_tokens;   // max tokens of a tile
  int gemv_tokens;   // up to so many quantized tokens are one tile and take the GEMV path
  // Quantizes a row; x holds sixteen columns every `step` floats.
  void (*quantize)(const float* x, int64_t step, int64_t k, RowView out);
  // Copy columns from..from+length of a token to its tile; `row` and `x` hold these columns only. `scatter` takes
  // multiples of 32.
  void (*scatter)(const RowView& row, const ActTiles& to, TileSlot token, int64_t from, int64_t length);
  void (*scatter_floats)(const float* x, const ActTiles& to, TileSlot token, int64_t from, int64_t length);
  // out[group][token][16] = packed rows of `groups` groups times every token; `work` has WORK_BYTES. `next`: the
  // weights that the caller multiplies next, or null; their beginning is prefetched while the end of these is used.
  void (*multiply)(const Layout& layout, const uint8_t* packed, int groups, const ActTiles& x, float* out,
      uint8_t* work, const uint8_t* next);
  // Dequantizes a group to out [k][16 rows].
  void (*unpack)(const Layout& layout, const uint8_t* group, int64_t k, float* out);
  // Stores `groups` times sixteen values, `step` floats apart, densely as f32, f16 or bf16.
  void (*write)(const float* x, int64_t step, int64_t groups, DType type, void* out);
  // total[token[t]][columns] += weight[t] * sums[group][t][16]
  void (*add_weighted)(const float* sums, int n, int groups, const int64_t* token, const float* weight, float* total,
      int64_t columns);
  // out = act(gate) * up; n is a multiple of 16. alpha and limit: of SWIGLU_OAI.
  void (*gated_activation)(Activation act, float alpha, float limit, const float* gate, const float* up, float* out,
      int64_t n);
  // Quantizes n weights to a block of INT4_* or Q4_0 (four_bits), else of INT8_128 or Q8_0.
  void (*quantize_block)(const float* x, int n, bool four_bits, uint8_t* out);
};
// Buffer of a thread for dequantized spans: four groups of 256 columns in bf16, or two of 128 columns in f32, or two of
// 256 columns as codes with scales.
constexpr size_t WORK_BYTES = 4 * 256 * 32 + 64;

extern const Kernels AMXMODEL_KERNELS, AMX_KERNELS, SCALAR_KERNELS, AVX2_KERNELS, AVXVNNI_KERNELS, AVX512VL_KERNELS,
    AVX512VNNI_KERNELS, AVX512VBMI_KERNELS, AVX512BF16_KERNELS;
const Kernels& kernels();  // the table of picked_isa()

// Multiplies one pair of AMX tiles, c [rows][16] += a [rows][bytes] * b [bytes/4][16][4]: with the instructions
// (tile_dot_amx, needs best_isa() == AMX) and emulated (tile_dot_model). A test compares the two.
enum TileKind { SSD, USD, PAIRS_OF_BF16 };  // signed times signed, unsigned times signed, pairs of bf16 into f32
void tile_dot_amx(TileKind kind, int rows, int bytes, const void* a, const void* b, void* c);
void tile_dot_model(TileKind kind, int rows, int bytes, const void* a, const void* b, void* c);
}  // namespace ktx
