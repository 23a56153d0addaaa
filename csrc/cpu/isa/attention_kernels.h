// What an instruction set offers to attention.cpp: one block of rows (queries times the heads that share keys) against one block of keys.
#pragma once
#include <cstdint>

#include "cpu/quant/dtype.h"

namespace ktx {
constexpr int KEYS = 64;    // keys of a block
constexpr int ROWS = 64;    // most rows of a block, whole vectors
constexpr int SINGLE = 32;  // most of them in f32: there a row's work is twice as long

// The running softmax of a block of rows: what was seen so far is `out / sum` under the maximum `most`.
struct Running {
  float* most;  // [ROWS]
  float* sum;   // [ROWS]
  float* out;   // [ROWS][dv]
};

// What is done beside the scores of eight keys of a latent: eight others become bf16 rows.
struct LatentStep {
  const uint8_t *k, *rope;  // of the first of the others
  int64_t k_step, rope_step;  // bytes
  Number type;
  int dk, dr;    // multiples of 32
  uint16_t* to;  // [8][dk + dr]
};

// In bf16, see attention_bf16.inl. `lanes`: vectors of 16 rows.
struct PairKernels {
  void (*queries)(const float* q, int rows, int d, int lanes, uint32_t* to);
  void (*row)(const void* from, Number type, int d, uint16_t* to);
  // up to 8 keys; as many of the two stretches of memory `next` are fetched, evenly, as of `k` are read
  void (*score)(const uint32_t* q, int lanes, const uint16_t* k, int64_t stride, int keys, int d, float* scores, const void* const* next);
  void (*latent)(const uint32_t* q, int lanes, const uint16_t* k, const LatentStep& step, float* scores);  // up to 2 lanes, 8 keys
  void (*soften)(const float* scores, int lanes, int rows, int keys, int dv, Running state, uint32_t* shares);
  void (*gather)(const uint32_t* shares, int lanes, const uint16_t* v, int64_t stride, int rows, int keys, int dv, float* out);
  const uint8_t* order;  // the columns that stand in 32 places of `out`
};

struct AttentionKernels {
  void (*convert)(const void* from, Number type, int64_t n, float* to);
  // scores[i][KEYS] = q[i] . k[j], rows d apart; `keys` of KEYS are valid
  void (*score)(const float* q, const float* k, int queries, int keys, int d, float* scores);
  // scores (already scaled and masked with -inf) become shares under the new maximum; out and sum are rescaled
  void (*soften)(float* scores, int queries, int keys, int dv, Running state);
  void (*gather)(const float* shares, const float* v, int queries, int keys, int dv, float* out);  // out[i] += shares[i] . v
  const PairKernels* pairs;  // null: this instruction set multiplies f32 only
};
extern const AttentionKernels SCALAR_ATTENTION, AVX2_ATTENTION, AVX512VNNI_ATTENTION, AVX512BF16_ATTENTION;
}  // namespace ktx
