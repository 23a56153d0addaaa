// What an instruction set offers to the drivers (linear.cpp, experts.cpp): one table of plain functions.
#pragma once
#include <cstddef>
#include <cstdint>

#include "cpu/quant/dtype.h"

namespace ktx {
struct Layout;

// One row of activations, quantised: int8 with a scale per 32 k, and the sums that offsets and minimums need.
struct RowView {
  int8_t* q;        // [k]
  float* scale;     // [k/32]
  int32_t* sum16;   // [k/16] sum of q
};

// Activations of n tokens, cut into tiles of at most `tile` tokens. Tile t starts at token start(t); all arrays are indexed
// [element of the row][token of the tile] inside a tile, and a tile's part begins at start(t) * (elements of a row). Kernels with tile registers
// have more than `gemv_tokens` tokens as [k/32][T][32] bytes. `wide` tokens are all multiplied in bf16, over tiles of BF16_TILE_TOKENS tokens: they have [k/32][T][16] pairs and no bytes.
constexpr int BF16_TILE_TOKENS = 16;
struct ActTiles {
  int n = 0, tiles = 0;
  int64_t k = 0;
  int8_t* q = nullptr;       // [k/4][T][4]
  float* scale = nullptr;    // [k/32][T]
  int32_t* sum16 = nullptr;  // [k/16][T] minus the sum of q: what a code's offset takes away, up to a shift
  int32_t* sum32 = nullptr;  // [k/32][T]
  float* part16 = nullptr;   // [k/16][T] scale * sum of q
  float* part32 = nullptr;   // [k/32][T]
  float* f = nullptr;        // [k][T] unquantised, for float weights
  uint32_t* pair = nullptr;  // [k/2][T] the same as pairs of bf16, where the kernels multiply these and k is even
  bool bf16 = false;
  int start(int t) const { return bf16 ? (t < tiles ? t * BF16_TILE_TOKENS : n) : int(int64_t(n) * t / tiles); }
};

// Where a token lies: the first token of its tile, how many that has, and which of them it is.
struct TileSlot { int first, count, at; };
// f(token, spot) for the tokens of a tile.
template <class F> void for_tile(const ActTiles& x, int tile, F&& f) {
  const int first = x.start(tile), count = x.start(tile + 1) - first;
  for (int t = 0; t < count; ++t) f(first + t, TileSlot{first, count, t});
}

enum Activation { SILU, GELU, GELU_TANH, RELU, RELU2, SWIGLU_OAI };

struct Kernels {
  int bf16_columns;      // of how many columns a row must be a multiple to be multiplied in pairs of bf16; 0: never
  bool bf16_tiles;      // whether they can multiply wide tokens
  int tile_tokens, gemv_tokens;  // widest tile; up to `gemv_tokens` quantised tokens make one tile and take the fused path
  void (*quantize)(const float* x, int64_t step, int64_t k, RowView out);  // sixteen values every `step`
  // Columns from..from+length of a token into its tile; `row` and `x` hold these columns only. Multiples of 32 for `place`.
  void (*scatter)(const RowView& row, const ActTiles& to, TileSlot token, int64_t from, int64_t length);
  void (*scatter_floats)(const float* x, const ActTiles& to, TileSlot token, int64_t from, int64_t length);
  // out[group][token][16] = packed rows of `groups` groups times every token; `work` holds WORK_BYTES. `next` is what the caller
  // will multiply with next, or null: its beginning is fetched while the end of this is used.
  void (*multiply)(const Layout& layout, const uint8_t* packed, int groups, const ActTiles& x, float* out, uint8_t* work,
                   const uint8_t* next);
  void (*unpack)(const Layout& layout, const uint8_t* group, int64_t k, float* out);  // [k][16]
  void (*write)(const float* x, int64_t step, int64_t groups, DType type, void* out);  // sixteen values every `step`, one after the other as f32, f16 or bf16
  // total[token[t]][columns] += weight[t] * sums[group][t][16]
  void (*add_weighted)(const float* sums, int n, int groups, const int64_t* token, const float* weight, float* total, int64_t columns);
  void (*gated_activation)(Activation act, float alpha, float limit, const float* gate, const float* up, float* out, int64_t n);  // n % 16 == 0
  void (*quantize_block)(const float* x, int n, bool four, uint8_t* out);  // n weights -> a block of INT8_128 or Q8_0, else of INT4_* or Q4_0
};
constexpr size_t WORK_BYTES = 4 * 256 * 32 + 64;  // four groups of 256 columns in bf16; or two of 128 as floats, or of 256 as codes with their scales

extern const Kernels AMXMODEL_KERNELS, AMX_KERNELS, SCALAR_KERNELS, AVX2_KERNELS, AVXVNNI_KERNELS, AVX512VL_KERNELS, AVX512VNNI_KERNELS, AVX512VBMI_KERNELS, AVX512BF16_KERNELS;
const Kernels& kernels();  // of picked_isa()
bool fast_gemm();          // KTX_GEMM=fast, see fast.inl; throws std::runtime_error on another word than that and exact

// One product of tiles, c [rows][16] += a [rows][bytes] * b [bytes/4][16][4], by the instructions (only where best_isa() is AMX) and by their model.
enum TileKind { SSD, USD, PAIRS_OF_BF16 };  // signed times signed, unsigned times signed, pairs of bf16 into f32
void tile_dot_amx(TileKind kind, int rows, int bytes, const void* a, const void* b, void* c);
void tile_dot_model(TileKind kind, int rows, int bytes, const void* a, const void* b, void* c);
}  // namespace ktx
