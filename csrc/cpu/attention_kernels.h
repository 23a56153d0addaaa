// What an instruction set offers to attention.cpp: one block of queries against one block of keys, all f32.
#pragma once
#include <cstdint>

#include "numbers.h"

namespace ktx {
constexpr int KEYS = 64;     // keys of a block
constexpr int QUERIES = 32;  // most queries of a block

// The running softmax of a block of queries: what was seen so far is `out / sum` under the maximum `most`.
struct Running {
  float* most;  // [queries]
  float* sum;   // [queries]
  float* out;   // [queries][dv]
};

struct AttentionKernels {
  void (*convert)(const void* from, Number type, int64_t n, float* to);
  // scores[i][KEYS] = q[i] . k[j], rows d apart; `keys` of KEYS are valid
  void (*score)(const float* q, const float* k, int queries, int keys, int d, float* scores);
  // scores (already scaled and masked with -inf) become shares under the new maximum; out and sum are rescaled
  void (*soften)(float* scores, int queries, int keys, int dv, Running state);
  void (*gather)(const float* shares, const float* v, int queries, int keys, int dv, float* out);  // out[i] += shares[i] . v
};
extern const AttentionKernels SCALAR_ATTENTION, AVX2_ATTENTION, AVX512VNNI_ATTENTION, AVX512VBMI_ATTENTION;
}  // namespace ktx
