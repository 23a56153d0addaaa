// Softmax attention on the CPU with an online softmax: no matrix of all scores, keys and values read once for all heads
// they serve.
#pragma once
#include <cstdint>

#include "cpu/quant/dtype.h"

namespace ktx {
struct Strided {  // [batch][head][position][column], columns dense
  const void* data;
  DType type;
  int64_t batch, head, position;  // strides in elements, of Q8_0 in bytes
};
struct Sequence {                // of a ragged call: its queries are the last of its keys, which are stored on pages
  int64_t first, queries, keys;  // queries [first, first + queries) of the one batch
  const int32_t* pages;
};
struct AttentionCall {
  Strided q, q_rope;     // q_rope.data null: the keys are k alone; else scores are q.k + q_rope.k_rope
  Strided k, k_rope, v;  // of a ragged call: [page][head][position in it][column]
  int64_t batches, heads, kv_heads, queries, keys;
  int64_t dk, dr, dv;                                   // columns of k, of k_rope (0: none) and of v
  const int32_t* key_ranges;                            // [batch][query][2] visible keys, or null
  const bool* bool_mask;                                // bool mask, or null
  const float* additive_mask;                           // additive mask, or null
  int64_t mask_batch, mask_head, mask_query, mask_key;  // strides of the mask in elements; 0 broadcasts
  const float* sinks;                                   // [heads] or null
  float scale, softcap;          // score = q.k * scale, then softcap * tanh(score / softcap); softcap 0: none
  const Sequence* sequences;     // of a ragged call, or null: every batch is a sequence, its keys in one piece
  int64_t sequence_count, page;  // page: positions per page, a multiple of the kernels' block of keys
  void* out;                     // [batch][query][head][dv] dense, of out_type
  DType out_type;
};
void attention(const AttentionCall& call);
}  // namespace ktx
