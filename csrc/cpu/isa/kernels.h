// The table of functions that an instruction set offers to the drivers (linear.cpp, experts.cpp).
#pragma once
#include <cstddef>
#include <cstdint>

#include "cpu/quant/dtype.h"

namespace ktx {
struct Layout;

// One quantized row of activations: int8 with a scale per 32 columns, and the sums that offsets and minimums need.
struct RowView {
  int8_t* q;        // [k]
  float* scale;     // [k/32]
  int32_t* sum16;   // [k/16] sum of q
};

// Activations of n tokens in tiles of at most `tile_tokens` tokens. Tile t starts at token start(t). Arrays are indexed [element of the row][token of the
// tile] inside a tile, whose part begins at start(t) * (elements of a row). Kernels with tile registers store more than `gemv_tokens` tokens as
// [k/32][T][32] bytes. With `bf16` all products are in bf16, over tiles of BF16_TILE_TOKENS tokens: [k/32][T][16] pairs and no bytes.
constexpr int BF16_TILE_TOKENS = 16;
struct ActTiles {
  int n = 0, tiles = 0;
  int64_t k = 0;
  int8_t* q = nullptr;       // [k/4][T][4]
  float* scale = nullptr;    // [k/32][T]
  int32_t* sum16 = nullptr;  // [k/16][T] minus the sum of q: subtracts the offset of codes, up to a shift
  int32_t* sum32 = nullptr;  // [k/32][T]
  float* part16 = nullptr;   // [k/16][T] scale * sum of q
  float* part32 = nullptr;   // [k/32][T]
  float* f = nullptr;        // [k][T] not quantized, for float weights
  uint32_t* pair = nullptr;  // [k/2][T] the same as pairs of bf16, if the kernels multiply these and k is even
  bool bf16 = false;
  int start(int t) const { return bf16 ? (t < tiles ? t * BF16_TILE_TOKENS : n) : int(int64_t(n) * t / tiles); }
};

// A token's place: the first token of its tile, the tile's number of tokens, the token's index in the tile.
struct TileSlot { int first, count, at; };
// Calls f(token, slot) for the tokens of a tile.
template <class F> void for_tile(const ActTiles& x, int tile, F&& f) {
  const int first = x.start(tile), count = x.start(tile + 1) - first;
  for (int t = 0; t < count; ++t) f(first + t, TileSlot{first, count, t});
}

enum Activation { SILU, GELU, GELU_TANH, RELU, RELU2, SWIGLU_OAI };

struct Kernels {
  int bf16_columns;      // rows of a multiple of so many columns are multiplied in bf16; 0: never
  bool bf16_tiles;       // multiplies ActTiles with `bf16`
  int tile_tokens, gemv_tokens;  // tokens of the widest tile; up to `gemv_tokens` quantized tokens are one tile and take the GEMV path
  void (*quantize)(const float* x, int64_t step, int64_t k, RowView out);  // sixteen values every `step` floats
  // Columns from..from+length of a token into its tile; `row` and `x` hold these columns only. `scatter` takes multiples of 32.
  void (*scatter)(const RowView& row, const ActTiles& to, TileSlot token, int64_t from, int64_t length);
  void (*scatter_floats)(const float* x, const ActTiles& to, TileSlot token, int64_t from, int64_t length);
  // out[group][token][16] = packed rows of `groups` groups times every token; `work` has WORK_BYTES. `next`: the weights that the
  // caller multiplies next, or null; their beginning is prefetched while the end of these is used.
  void (*multiply)(const Layout& layout, const uint8_t* packed, int groups, const ActTiles& x, float* out, uint8_t* work,
                   const uint8_t* next);
  void (*unpack)(const Layout& layout, const uint8_t* group, int64_t k, float* out);  // [k][16]
  void (*write)(const float* x, int64_t step, int64_t groups, DType type, void* out);  // sixteen values every `step` floats, stored densely as f32, f16 or bf16
  // total[token[t]][columns] += weight[t] * sums[group][t][16]
  void (*add_weighted)(const float* sums, int n, int groups, const int64_t* token, const float* weight, float* total, int64_t columns);
  void (*gated_activation)(Activation act, float alpha, float limit, const float* gate, const float* up, float* out, int64_t n);  // n % 16 == 0
  void (*quantize_block)(const float* x, int n, bool four, uint8_t* out);  // n weights -> a block of INT8_128 or Q8_0, else of INT4_* or Q4_0
};
constexpr size_t WORK_BYTES = 4 * 256 * 32 + 64;  // four groups of 256 columns in bf16, or two of 128 columns in f32, or two of 256 columns as codes with scales

extern const Kernels AMXMODEL_KERNELS, AMX_KERNELS, SCALAR_KERNELS, AVX2_KERNELS, AVXVNNI_KERNELS, AVX512VL_KERNELS, AVX512VNNI_KERNELS, AVX512VBMI_KERNELS, AVX512BF16_KERNELS;
const Kernels& kernels();  // of picked_isa()

// One product of tiles, c [rows][16] += a [rows][bytes] * b [bytes/4][16][4]: by the instructions (needs best_isa() == AMX) and emulated.
enum TileKind { SSD, USD, PAIRS_OF_BF16 };  // signed times signed, unsigned times signed, pairs of bf16 into f32
void tile_dot_amx(TileKind kind, int rows, int bytes, const void* a, const void* b, void* c);
void tile_dot_model(TileKind kind, int rows, int bytes, const void* a, const void* b, void* c);
}  // namespace ktx
