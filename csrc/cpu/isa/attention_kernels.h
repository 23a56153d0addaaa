// The attention kernels that each instruction set provides to driver/attention.cpp. Each call processes a block of rows
// and a block of keys; a row is one query of one of the heads that share keys. d: columns of queries and keys, dv:
// columns of values.
#pragma once
#include <cstdint>

#include "cpu/quant/dtype.h"

namespace ktx {
constexpr int BLOCK_KEYS = 64;      // max keys of a block
constexpr int BLOCK_ROWS = 64;      // max rows of a block in bf16: four vectors
constexpr int F32_BLOCK_ROWS = 32;  // max rows in f32, where a row takes twice as long

// The state of the online softmax for a block of rows, updated block of keys by block of keys. The result so far is
// `out / sum`; both are sums of exp(score - row_max).
struct SoftmaxState {
  float* row_max;  // [BLOCK_ROWS]
  float* sum;      // [BLOCK_ROWS]
  float* out;      // [BLOCK_ROWS][dv]
};

// What Bf16Kernels::score_latent converts while it computes scores: eight MLA latent keys, in the cache a row `latent`
// and a row `rope`, become bf16 rows.
struct LatentConversion {
  const uint8_t *latent, *rope;    // of the first key to convert
  int64_t latent_step, rope_step;  // bytes from one key to the next
  DType type;
  int dk, dr;    // columns of `latent` and of `rope`, multiples of 32
  uint16_t* to;  // [8][dk + dr]
};

// Kernels in bf16 (attention_bf16.inl). `row_vectors`: number of vectors of 16 rows.
struct Bf16Kernels {
  // packs q [rows][d] as pairs of columns [d/2][row_vectors*16]
  void (*pack_queries)(const float* q, int rows, int d, int row_vectors, uint32_t* to);
  // converts a row of the KV cache
  void (*convert_row)(const void* from, DType type, int d, uint16_t* to);
  // scores [key][row_vectors*16] = q . k for up to 8 keys; prefetches as many bytes of the two ranges `next` as it
  // reads of `k`
  void (*score)(const uint32_t* q, int row_vectors, const uint16_t* k, int64_t stride, int keys, int d, float* scores,
      const void* const* next);
  // scores of 8 MLA latent keys for up to 2 vectors of rows, while 8 other keys are converted
  void (*score_latent)(const uint32_t* q, int row_vectors, const uint16_t* k, const LatentConversion& conversion,
      float* scores);
  // scores -> pairs of probabilities [keys/2][row_vectors*16]; out and sum are rescaled to the new maximum
  void (*online_softmax)(const float* scores, int row_vectors, int rows, int keys, int dv, SoftmaxState state,
      uint32_t* probs);
  // out [rows][dv] += probs . v, columns in column_order
  void (*accumulate_pv)(const uint32_t* probs, int row_vectors, const uint16_t* v, int64_t stride, int rows, int keys,
      int dv, float* out);
  const uint8_t* column_order;  // the column of each of 32 positions of `out`
};

struct AttentionKernels {
  // converts n values of the KV cache to f32
  void (*convert)(const void* from, DType type, int64_t n, float* to);
  // scores[i][BLOCK_KEYS] = q[i] . k[j], rows d apart; `keys` of BLOCK_KEYS are valid
  void (*score)(const float* q, const float* k, int queries, int keys, int d, float* scores);
  // scores (scaled, masked with -inf) become probabilities relative to the new maximum; out and sum are rescaled
  void (*online_softmax)(float* scores, int queries, int keys, int dv, SoftmaxState state);
  // out[i] += probs[i] . v
  void (*accumulate_pv)(const float* probs, const float* v, int queries, int keys, int dv, float* out);
  const Bf16Kernels* bf16;  // null: this instruction set has f32 only
};
extern const AttentionKernels SCALAR_ATTENTION, AVX2_ATTENTION, AVX512VNNI_ATTENTION, AVX512BF16_ATTENTION;
}  // namespace ktx
