#include "cpu/driver/blocks.h"

#include <math.h>

#include <algorithm>
#include <initializer_list>

#include "cpu/driver/scratch.h"

namespace ktx {
namespace {
thread_local Scratch scratch;
thread_local std::vector<LinearPart> all_parts;

struct ProjectionOutput {
  const Projection& projection;
  float* y;
};  // y [tokens][projection.rows()]

// Multiplies x by all projections in one call, so that x is quantized once and the pool starts once.
void project(const float* x, int64_t tokens, int64_t k, std::initializer_list<ProjectionOutput> outputs) {
  all_parts.clear();
  for (const ProjectionOutput& output : outputs) {
    const int64_t stride = output.projection.rows();
    float* y = output.y;
    for (LinearPart part : output.projection.parts) {
      part.y = y, part.stride = stride, y += part.n;
      all_parts.push_back(part);
    }
  }
  linear_parts(x, DType::F32, tokens, k, all_parts.data(), int(all_parts.size()));
}

void normalize(const Norm& norm, float* x, int64_t rows, int64_t width) {
  if (norm.weight) rms_norm(x, DType::F32, rows, width, width, norm.weight, norm.eps, norm.plus_one, x);
}

// x [batch][length][head][stride] from column `first_column` on -> y [batch][head][length][width], the first rope_dim
// columns rotated. Changes the order to [head][length] in the same pass, as attention() takes it.
void apply_rope(const RopeTables& r, const float* x, int64_t first_column, int64_t batches, int64_t length,
    int64_t heads, int64_t stride, int64_t width, float* y) {
  rope({x + first_column, y, DType::F32, batches, heads, length, width, r.rope_dim, length * heads * stride, stride,
      heads * stride, r.cos, r.sin, r.batch, r.interleaved});
}

// Returns [a][b][width] as [b][a][width]: in `buffer`, or x itself if a or b is 1, because then both orders are equal.
const float* transpose(const float* x, int64_t a, int64_t b, int64_t width, float* buffer) {
  if (a == 1 || b == 1) return x;
  for (int64_t i = 0; i < a; ++i)
    for (int64_t j = 0; j < b; ++j) std::copy_n(x + (i * b + j) * width, width, buffer + (j * a + i) * width);
  return buffer;
}

// An f32 tensor with dense columns; strides in elements.
Strided dense_f32(const float* data, int64_t batch, int64_t head, int64_t position) {
  return {data, DType::F32, batch, head, position};
}
}  // namespace

void KVStore::write(int64_t batch, int64_t head, int64_t position, const float* row, int64_t columns) const {
  const int64_t to = batch * storage.batch + head * storage.head + position * storage.position;
  from_floats(row, storage.type, columns,
      const_cast<uint8_t*>(static_cast<const uint8_t*>(storage.data)) + to * int64_t(size_of(storage.type)));
}

// Absorbed MLA: W_UK is multiplied into the queries and W_UV into the result, so attention runs on the latent itself,
// as one KV head that all heads share, and the cache holds rank + rope_dim columns per token.
void mla_block(const MlaBlock& b) {
  const int64_t num_tokens = b.batches * b.length, num_heads = b.heads, rope_dim = b.rotation.rope_dim,
                q_head_dim = b.qk_nope_head_dim + rope_dim, kv_columns = b.kv_lora_rank + rope_dim;
  const int64_t q_lora_rank = b.q_a.rows();
  scratch.reset(size_t(num_tokens) *
          (num_heads * (q_head_dim + rope_dim + b.qk_nope_head_dim + 3 * b.kv_lora_rank + 2 * b.v_head_dim) +
              kv_columns + b.kv_lora_rank + rope_dim + q_lora_rank) *
          4 +
      16 * 64);
  // Queries (through the low-rank q_a if the model has one), and [latent, k_rope] of each token.
  float *q = scratch.take<float>(num_tokens * num_heads * q_head_dim),
        *kv = scratch.take<float>(num_tokens * kv_columns);
  if (q_lora_rank) {
    float* compressed = scratch.take<float>(num_tokens * q_lora_rank);
    project(b.x, num_tokens, b.hidden, {{b.q_a, compressed}, {b.kv_a, kv}});
    normalize(b.q_norm, compressed, num_tokens, q_lora_rank);
    project(compressed, num_tokens, q_lora_rank, {{b.q, q}});
  } else {
    project(b.x, num_tokens, b.hidden, {{b.q, q}, {b.kv_a, kv}});
  }
  // Norm of the latent, RoPE of keys and queries, and both into the cache.
  float *latent = scratch.take<float>(num_tokens * b.kv_lora_rank),
        *k_rope = scratch.take<float>(num_tokens * rope_dim),
        *q_rope = scratch.take<float>(num_tokens * num_heads * rope_dim);
  rms_norm(kv, DType::F32, num_tokens, b.kv_lora_rank, kv_columns, b.kv_norm.weight, b.kv_norm.eps, b.kv_norm.plus_one,
      latent);
  apply_rope(b.rotation, kv, b.kv_lora_rank, b.batches, b.length, 1, kv_columns, rope_dim, k_rope);
  apply_rope(b.rotation, q, b.qk_nope_head_dim, b.batches, b.length, num_heads, q_head_dim, rope_dim, q_rope);
  for (int64_t t = 0; t < num_tokens; ++t) {
    b.latent.write(b.slots.batch(t), 0, b.slots.position(t), latent + t * b.kv_lora_rank, b.kv_lora_rank);
    b.rope.write(b.slots.batch(t), 0, b.slots.position(t), k_rope + t * rope_dim, rope_dim);
  }
  // Absorbed queries: [head][token][nope] x W_UK -> [head][token][rank].
  float *q_by_head = scratch.take<float>(num_heads * num_tokens * b.qk_nope_head_dim),
        *absorbed = scratch.take<float>(num_heads * num_tokens * b.kv_lora_rank),
        *context = scratch.take<float>(num_tokens * num_heads * b.kv_lora_rank);
  for (int64_t h = 0; h < num_heads; ++h)
    for (int64_t t = 0; t < num_tokens; ++t)
      std::copy_n(q + (t * num_heads + h) * q_head_dim, b.qk_nope_head_dim,
          q_by_head + (h * num_tokens + t) * b.qk_nope_head_dim);
  linear_batched(q_by_head, DType::F32, num_heads, num_tokens, *b.uk_layout, b.uk, b.kv_lora_rank, b.qk_nope_head_dim,
      absorbed);
  // Attention over the latents: scores are absorbed . latent + q_rope . k_rope, and the values are the latents.
  AttentionCall c = b.masks;
  c.q = dense_f32(absorbed, b.length * b.kv_lora_rank, num_tokens * b.kv_lora_rank, b.kv_lora_rank),
  c.q_rope = dense_f32(q_rope, num_heads * b.length * rope_dim, b.length * rope_dim, rope_dim);
  c.k = c.v = b.latent.storage, c.k_rope = b.rope.storage;
  c.batches = b.batches, c.heads = num_heads, c.kv_heads = 1, c.queries = b.length;
  c.dk = c.dv = b.kv_lora_rank, c.dr = rope_dim, c.out = context, c.out_type = DType::F32;
  attention(c);
  // Values of each head from its context: [head][token][rank] x W_UV; then o_proj of the concatenated heads.
  float *values = scratch.take<float>(num_heads * num_tokens * b.v_head_dim),
        *buffer = scratch.take<float>(num_tokens * num_heads * b.v_head_dim);
  linear_batched(transpose(context, num_tokens, num_heads, b.kv_lora_rank, absorbed), DType::F32, num_heads, num_tokens,
      *b.uv_layout, b.uv, b.v_head_dim, b.kv_lora_rank, values);
  project(transpose(values, num_heads, num_tokens, b.v_head_dim, buffer), num_tokens, num_heads * b.v_head_dim,
      {{b.o, b.out}});
}

// A full GQA attention module in one call: projections, q and k norms, RoPE, store to the cache, attention, o_proj. The
// module-by-module path (ktx/ops/attention.py) calls the same kernels.
void gqa_block(const GqaBlock& b) {
  const int64_t num_tokens = b.batches * b.length, head_dim = b.head_dim, num_heads = b.heads,
                num_kv_heads = b.kv_heads;
  scratch.reset(size_t(num_tokens) * (3 * num_heads + 3 * num_kv_heads) * head_dim * 4 + 8 * 64);
  float *q = scratch.take<float>(num_tokens * num_heads * head_dim),
        *k = scratch.take<float>(num_tokens * num_kv_heads * head_dim),
        *v = scratch.take<float>(num_tokens * num_kv_heads * head_dim);
  project(b.x, num_tokens, b.hidden, {{b.q, q}, {b.k, k}, {b.v, v}});
  normalize(b.q_norm, q, b.norm_all ? num_tokens : num_tokens * num_heads,
      b.norm_all ? num_heads * head_dim : head_dim);
  normalize(b.k_norm, k, b.norm_all ? num_tokens : num_tokens * num_kv_heads,
      b.norm_all ? num_kv_heads * head_dim : head_dim);
  float *q_rotated = scratch.take<float>(num_tokens * num_heads * head_dim),
        *k_rotated = scratch.take<float>(num_tokens * num_kv_heads * head_dim),
        *context = scratch.take<float>(num_tokens * num_heads * head_dim);
  apply_rope(b.rotation, q, 0, b.batches, b.length, num_heads, head_dim, head_dim, q_rotated);
  apply_rope(b.rotation, k, 0, b.batches, b.length, num_kv_heads, head_dim, head_dim, k_rotated);
  for (int64_t t = 0; t < num_tokens; ++t)
    for (int64_t h = 0; h < num_kv_heads; ++h) {
      b.keys.write(b.slots.batch(t), h, b.slots.position(t),
          k_rotated + ((t / b.length * num_kv_heads + h) * b.length + t % b.length) * head_dim, head_dim);
      b.values.write(b.slots.batch(t), h, b.slots.position(t), v + (t * num_kv_heads + h) * head_dim, head_dim);
    }
  AttentionCall c = b.masks;
  c.q = dense_f32(q_rotated, num_heads * b.length * head_dim, b.length * head_dim, head_dim), c.k = b.keys.storage,
  c.v = b.values.storage;
  c.batches = b.batches, c.heads = num_heads, c.kv_heads = num_kv_heads, c.queries = b.length;
  c.dk = c.dv = head_dim, c.dr = 0, c.out = context, c.out_type = DType::F32;
  attention(c);
  project(context, num_tokens, num_heads * head_dim, {{b.o, b.out}});
}

// A full MLP in one call, for decode steps: out = routed experts(x) + gate * shared expert(x). A layer without experts
// (a plain gated MLP) is one shared expert.
void moe_block(const MoeBlock& b) {
  const int64_t tokens = b.shared.tokens, hidden = b.shared.hidden, num_experts = b.experts.experts,
                top = std::max<int64_t>(b.experts.top, 1);
  scratch.reset(size_t(tokens) * (num_experts * 4 + top * 12 + hidden * 4 + 16) + 8 * 64);
  float *logits = scratch.take<float>(tokens * num_experts), *weights = scratch.take<float>(tokens * top);
  int64_t* ids = scratch.take<int64_t>(tokens * top);
  float *shared_out = scratch.take<float>(tokens * hidden), *shared_weights = scratch.take<float>(tokens);
  if (num_experts) {
    project(b.x, tokens, hidden, {{b.router, logits}});
    RouteCall r = b.route;
    r.logits = logits, r.tokens = tokens, r.experts = num_experts, r.top = top, r.ids = ids, r.weights = weights;
    route(r);
    ExpertsCall e = b.experts;
    e.x = b.x, e.out = b.out, e.type = DType::F32, e.ids = ids, e.weights = weights;
    experts(e);
  }
  if (!b.shared.inner) return;
  std::fill_n(shared_weights, tokens, 1.0f);
  if (!b.shared_gate.parts.empty()) {
    project(b.x, tokens, hidden, {{b.shared_gate, shared_weights}});
    // The sigmoid is in f64 as in ops/moe.py, so that the result does not depend on the number of tokens.
    for (int64_t t = 0; t < tokens; ++t) shared_weights[t] = float(1.0 / (1.0 + exp(-double(shared_weights[t]))));
  }
  std::fill_n(ids, tokens, int64_t(0));  // every token takes the one shared expert
  ExpertsCall s = b.shared;
  s.x = b.x, s.out = num_experts ? shared_out : b.out, s.type = DType::F32, s.ids = ids, s.weights = shared_weights;
  experts(s);
  for (int64_t i = 0; num_experts && i < tokens * hidden; ++i) b.out[i] += shared_out[i];
}
}  // namespace ktx
