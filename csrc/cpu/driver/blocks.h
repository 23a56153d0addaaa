// Whole modules of a transformer in one call, for the few tokens of a decoding step: their arithmetic is short, so what counts is not
// to come back to Python between its parts. Activations are f32; every part is the kernel that the module-by-module path calls.
#pragma once
#include <cstdint>
#include <vector>

#include "cpu/driver/attention.h"
#include "cpu/driver/experts.h"
#include "cpu/driver/linear.h"
#include "cpu/driver/elementwise.h"

namespace ktx {
struct Projection {  // rows of one or several packed matrices, one after another; y and stride are set where it is used
  std::vector<LinearPart> parts;
  int64_t rows() const { int64_t n = 0; for (const LinearPart& p : parts) n += p.n; return n; }
};
struct Norm {  // RMSNorm; weight null: none
  const float* weight;
  float eps;
  bool plus_one;
};
// run(b), on norm(b.x) and plus b.x when `before` has a weight.
template <class B>
void with_norm_and_residual(B& b, const Norm& before, int64_t rows, int64_t width, void (*run)(const B&)) {
  if (!before.weight) return run(b);
  thread_local std::vector<float> normalized;
  normalized.resize(size_t(rows * width));
  rms_norm(b.x, DType::F32, rows, width, width, before.weight, before.eps, before.plus_one, normalized.data());
  const float* x = b.x;
  b.x = normalized.data();
  run(b);
  for (int64_t i = 0; i < rows * width; ++i) b.out[i] += x[i];
}
struct RopeTables {  // cos and sin [batch][length][turned]; `batch` their stride, 0 when one table serves all
  const float *cos, *sin;
  int64_t rope_dim, batch;
  bool interleaved;
};
struct KVStore {  // where keys or values are kept: [batch or page][head][position][column], room for more positions than are used
  Strided at;
  void write(int64_t batch, int64_t head, int64_t position, const float* row, int64_t columns) const;
};
struct KVSlots {  // where the tokens' keys and values go
  int64_t past, length;  // of every batch
  const int64_t* slots;  // of a ragged call: page * positions of a page + position; else null
  int64_t page;
  int64_t batch(int64_t t) const { return slots ? slots[t] / page : t / length; }
  int64_t position(int64_t t) const { return slots ? slots[t] % page : past + t % length; }
};

struct MlaBlock {  // see ktx/ops/mla.py, absorbed form
  const float* x;
  float* out;  // both [batch][length][hidden]
  int64_t batches, length, hidden;  // of a ragged call one batch, of all tokens
  KVSlots slots;
  Projection q_a, q, kv_a, o;  // q_a without parts: q takes x
  Norm q_norm, kv_norm;
  const Layout *uk_layout, *uv_layout;
  const uint8_t *uk, *uv;  // [heads] x [rank, nope] and [heads] x [values, rank]
  int64_t heads, nope, rank, values;
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
  int64_t heads, kv_heads, columns;
  RopeTables rotation;
  KVStore keys, values;
  AttentionCall masks;  // its masks, sinks, softcap, scale, sequences and keys
};
void gqa_block(const GqaBlock& block);

struct MoeBlock {  // see ktx/ops/moe.py; without experts a plain gated layer (ktx/ops/mlp.py)
  const float* x;
  float* out;  // both [tokens][hidden]
  Projection router;
  RouteCall route;       // its style; logits, ids and weights are made here
  ExpertsCall experts;   // its matrices and activation; experts 0: none
  ExpertsCall shared;    // one expert for all tokens, inner 0: none; its tokens and hidden are the block's
  Projection shared_gate;
};
void moe_block(const MoeBlock& block);
}  // namespace ktx
