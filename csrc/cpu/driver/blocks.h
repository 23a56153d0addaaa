// Complete transformer modules in one call, for decode steps with few tokens, where returning to Python between kernels
// costs more than the arithmetic. Activations are f32; each part is the kernel that the module-by-module path calls.
#pragma once
#include <cstdint>
#include <vector>

#include "cpu/driver/attention.h"
#include "cpu/driver/experts.h"
#include "cpu/driver/linear.h"
#include "cpu/driver/elementwise.h"

namespace ktx {
struct Projection {  // the rows of one or more packed matrices; y and stride are set at the call
  std::vector<LinearPart> parts;
  int64_t rows() const {
    int64_t n = 0;
    for (const LinearPart& p : parts) n += p.n;
    return n;
  }
};
struct Norm {  // RMSNorm; weight null: none
  const float* weight;
  float eps;
  bool plus_one;
};
// Runs a block: b.out = run(b.x), or with a norm of weights the pre-norm residual layer b.out = run(norm(b.x)) + b.x.
// b.x is f32 [rows][width].
template <class B>
void with_norm_and_residual(B& b, const Norm& pre_norm, int64_t rows, int64_t width, void (*run)(const B&)) {
  if (!pre_norm.weight) return run(b);
  thread_local std::vector<float> normalized;
  normalized.resize(size_t(rows * width));
  rms_norm(b.x, DType::F32, rows, width, width, pre_norm.weight, pre_norm.eps, pre_norm.plus_one, normalized.data());
  const float* x = b.x;
  b.x = normalized.data();
  run(b);
  for (int64_t i = 0; i < rows * width; ++i) b.out[i] += x[i];
}
// cos and sin [batch][length][rope_dim]; `batch`: their stride per sequence, 0 if one table serves all
struct RopeTables {
  const float *cos, *sin;
  int64_t rope_dim, batch;
  bool interleaved;
};
// storage of keys or values: [batch or page][head][position][column]; `write` converts an f32 row to its dtype
struct KVStore {
  Strided storage;
  void write(int64_t batch, int64_t head, int64_t position, const float* row, int64_t columns) const;
};
struct KVSlots {         // where the keys and values of the new tokens are stored
  int64_t past, length;  // of every batch: cached positions, and new tokens
  const int64_t* slots;  // of a ragged call: page index * page + position in the page, per token; else null
  int64_t page;          // positions per page
  int64_t batch(int64_t t) const { return slots ? slots[t] / page : t / length; }
  int64_t position(int64_t t) const { return slots ? slots[t] % page : past + t % length; }
};

struct MlaBlock {  // see ktx/ops/mla.py, absorbed form
  const float* x;
  float* out;                       // both [batch][length][hidden]
  int64_t batches, length, hidden;  // of a ragged call one batch, of all tokens
  KVSlots slots;
  Projection q_a, q, kv_a, o;  // q_a without parts: q takes x
  Norm q_norm, kv_norm;
  const Layout *uk_layout, *uv_layout;
  const uint8_t *uk, *uv;  // [heads] x [kv_lora_rank, qk_nope_head_dim] and [heads] x [v_head_dim, kv_lora_rank]
  int64_t heads, qk_nope_head_dim, kv_lora_rank, v_head_dim;
  RopeTables rotation;
  KVStore latent, rope;
  AttentionCall masks;  // its masks, scale, sequences and keys
};
void mla_block(const MlaBlock& block);

struct GqaBlock {  // see ktx/ops/attention.py
  const float* x;
  float* out;
  int64_t batches, length, hidden;  // of a ragged call one batch, of all tokens
  KVSlots slots;
  Projection q, k, v, o;
  Norm q_norm, k_norm;  // over a head's columns, or over all of them
  bool norm_all;
  int64_t heads, kv_heads, head_dim;
  RopeTables rotation;
  KVStore keys, values;
  AttentionCall masks;  // its masks, sinks, softcap, scale, sequences and keys
};
void gqa_block(const GqaBlock& block);

struct MoeBlock {  // see ktx/ops/moe.py; without experts a plain gated layer (ktx/ops/mlp.py)
  const float* x;
  float* out;  // both [tokens][hidden]
  Projection router;
  RouteCall route;      // its style; logits, ids and weights are made here
  ExpertsCall experts;  // its matrices and activation; experts 0: none
  ExpertsCall shared;   // one expert for all tokens, inner 0: none; its tokens and hidden are the block's
  Projection shared_gate;
};
void moe_block(const MoeBlock& block);
}  // namespace ktx
