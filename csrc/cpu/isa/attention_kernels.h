// The functions that an instruction set offers to attention.cpp: a block of rows (queries times the heads that share keys) against a block of keys.
#pragma once
#include <cstdint>

#include "cpu/quant/dtype.h"

namespace ktx {
constexpr int BLOCK_KEYS = 64;    // keys in a block
constexpr int BLOCK_ROWS = 64;    // max rows of a block, full vectors
constexpr int F32_BLOCK_ROWS = 32;  // max rows in f32, where a row takes twice as long

// The online softmax of a block of rows: the result so far is `out / sum`, with scores relative to `row_max`.
struct SoftmaxState {
  float* row_max;  // [BLOCK_ROWS]
  float* sum;   // [BLOCK_ROWS]
  float* out;   // [BLOCK_ROWS][dv]
};

// The conversion that runs interleaved with the scores of eight MLA latent keys: eight other keys become bf16 rows.
struct LatentConversion {
  const uint8_t *k, *rope;  // of the first of the other keys
  int64_t k_step, rope_step;  // bytes
  DType type;
  int dk, dr;    // multiples of 32
  uint16_t* to;  // [8][dk + dr]
};

// In bf16, see attention_bf16.inl. `lanes`: vectors of 16 rows.
struct Bf16Kernels {
  void (*queries)(const float* q, int rows, int d, int lanes, uint32_t* to);
  void (*row)(const void* from, DType type, int d, uint16_t* to);
  // up to 8 keys; prefetches as many bytes of the two ranges `next` as it reads of `k`
  void (*score)(const uint32_t* q, int lanes, const uint16_t* k, int64_t stride, int keys, int d, float* scores, const void* const* next);
  void (*latent)(const uint32_t* q, int lanes, const uint16_t* k, const LatentConversion& step, float* scores);  // up to 2 lanes, 8 keys
  void (*online_softmax)(const float* scores, int lanes, int rows, int keys, int dv, SoftmaxState state, uint32_t* probs);
  void (*accumulate_pv)(const uint32_t* probs, int lanes, const uint16_t* v, int64_t stride, int rows, int keys, int dv, float* out);
  const uint8_t* column_order;  // the column of each of 32 positions of `out`
};

struct AttentionKernels {
  void (*convert)(const void* from, DType type, int64_t n, float* to);
  // scores[i][BLOCK_KEYS] = q[i] . k[j], rows d apart; `keys` of BLOCK_KEYS are valid
  void (*score)(const float* q, const float* k, int queries, int keys, int d, float* scores);
  // scores (scaled, masked with -inf) become probabilities relative to the new maximum; out and sum are rescaled
  void (*online_softmax)(float* scores, int queries, int keys, int dv, SoftmaxState state);
  void (*accumulate_pv)(const float* probs, const float* v, int queries, int keys, int dv, float* out);  // out[i] += probs[i] . v
  const Bf16Kernels* bf16;  // null: this instruction set has f32 only
};
extern const AttentionKernels SCALAR_ATTENTION, AVX2_ATTENTION, AVX512VNNI_ATTENTION, AVX512BF16_ATTENTION;
}  // namespace ktx
