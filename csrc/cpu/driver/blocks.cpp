#include "cpu/driver/blocks.h"

#include <math.h>

#include <algorithm>
#include <initializer_list>

#include "cpu/driver/scratch.h"

namespace ktx {
namespace {
thread_local Scratch scratch;
thread_local std::vector<LinearPart> all_parts;

struct ProjectionOutput { const Projection& projection; float* y; };  // y [tokens][projection.rows()]

// Projections of one x: quantized once, one work queue.
void project(const float* x, int64_t tokens, int64_t k, std::initializer_list<ProjectionOutput> goals) {
  all_parts.clear();
  for (const ProjectionOutput& goal : goals) {
    const int64_t stride = goal.projection.rows();
    float* y = goal.y;
    for (LinearPart part : goal.projection.parts) {
      part.y = y, part.stride = stride, y += part.n;
      all_parts.push_back(part);
    }
  }
  linear_parts(x, DType::F32, tokens, k, all_parts.data(), int(all_parts.size()));
}

void normalize(const Norm& norm, float* x, int64_t rows, int64_t width) {
  if (norm.weight) rms_norm(x, DType::F32, rows, width, width, norm.weight, norm.eps, norm.plus_one, x);
}

// x [batch][length][head][stride] from column `at` on -> y [batch][head][length][width], the first rope_dim columns rotated.
void apply_rope(const RopeTables& r, const float* x, int64_t at, int64_t batches, int64_t length, int64_t heads, int64_t stride, int64_t width, float* y) {
  rope({x + at, y, DType::F32, batches, heads, length, width, r.rope_dim, length * heads * stride, stride, heads * stride, r.cos, r.sin, r.batch, r.interleaved});
}

// [a][b][width] -> [b][a][width]; in place if a or b is 1
const float* transposed(const float* x, int64_t a, int64_t b, int64_t width, float* buffer) {
  if (a == 1 || b == 1) return x;
  for (int64_t i = 0; i < a; ++i)
    for (int64_t j = 0; j < b; ++j) std::copy_n(x + (i * b + j) * width, width, buffer + (j * a + i) * width);
  return buffer;
}

Strided dense(const float* data, int64_t batch, int64_t head, int64_t position) { return {data, DType::F32, batch, head, position}; }
}  // namespace

void KVStore::write(int64_t batch, int64_t head, int64_t position, const float* row, int64_t columns) const {
  const int64_t to = batch * at.batch + head * at.head + position * at.position;
  from_floats(row, at.type, columns, const_cast<uint8_t*>(static_cast<const uint8_t*>(at.data)) + to * int64_t(size_of(at.type)));
}

void mla_block(const MlaBlock& b) {
  const int64_t T = b.batches * b.length, H = b.heads, rope_dim = b.rotation.rope_dim, q_head_dim = b.nope + rope_dim, kv_row = b.rank + rope_dim;
  const int64_t low = b.q_a.rows();
  scratch.reset(size_t(T) * (H * (q_head_dim + rope_dim + b.nope + 3 * b.rank + 2 * b.values) + kv_row + b.rank + rope_dim + low) * 4 + 16 * 64);
  float *q = scratch.take<float>(T * H * q_head_dim), *kv = scratch.take<float>(T * kv_row);
  if (low) {
    float* compressed = scratch.take<float>(T * low);
    project(b.x, T, b.hidden, {{b.q_a, compressed}, {b.kv_a, kv}});
    normalize(b.q_norm, compressed, T, low);
    project(compressed, T, low, {{b.q, q}});
  } else {
    project(b.x, T, b.hidden, {{b.q, q}, {b.kv_a, kv}});
  }
  float *latent = scratch.take<float>(T * b.rank), *k_rope = scratch.take<float>(T * rope_dim), *q_rope = scratch.take<float>(T * H * rope_dim);
  rms_norm(kv, DType::F32, T, b.rank, kv_row, b.kv_norm.weight, b.kv_norm.eps, b.kv_norm.plus_one, latent);
  apply_rope(b.rotation, kv, b.rank, b.batches, b.length, 1, kv_row, rope_dim, k_rope);
  apply_rope(b.rotation, q, b.nope, b.batches, b.length, H, q_head_dim, rope_dim, q_rope);
  for (int64_t t = 0; t < T; ++t) {
    b.latent.write(b.slots.batch(t), 0, b.slots.position(t), latent + t * b.rank, b.rank);
    b.rope.write(b.slots.batch(t), 0, b.slots.position(t), k_rope + t * rope_dim, rope_dim);
  }
  float *by_head = scratch.take<float>(H * T * b.nope), *absorbed = scratch.take<float>(H * T * b.rank), *context = scratch.take<float>(T * H * b.rank);
  for (int64_t h = 0; h < H; ++h)
    for (int64_t t = 0; t < T; ++t) std::copy_n(q + (t * H + h) * q_head_dim, b.nope, by_head + (h * T + t) * b.nope);
  linear_batched(by_head, DType::F32, H, T, *b.uk_layout, b.uk, b.rank, b.nope, absorbed);
  AttentionCall c = b.masks;
  c.q = dense(absorbed, b.length * b.rank, T * b.rank, b.rank), c.q_rope = dense(q_rope, H * b.length * rope_dim, b.length * rope_dim, rope_dim);
  c.k = c.v = b.latent.at, c.k_rope = b.rope.at;
  c.batches = b.batches, c.heads = H, c.kv_heads = 1, c.queries = b.length;
  c.dk = c.dv = b.rank, c.dr = rope_dim, c.out = context, c.out_type = DType::F32;
  attention(c);
  float *values = scratch.take<float>(H * T * b.values), *buffer = scratch.take<float>(T * H * b.values);
  linear_batched(transposed(context, T, H, b.rank, absorbed), DType::F32, H, T, *b.uv_layout, b.uv, b.values, b.rank, values);
  project(transposed(values, H, T, b.values, buffer), T, H * b.values, {{b.o, b.out}});
}

void gqa_block(const GqaBlock& b) {
  const int64_t T = b.batches * b.length, d = b.columns, H = b.heads, K = b.kv_heads;
  scratch.reset(size_t(T) * (3 * H + 3 * K) * d * 4 + 8 * 64);
  float *q = scratch.take<float>(T * H * d), *k = scratch.take<float>(T * K * d), *v = scratch.take<float>(T * K * d);
  project(b.x, T, b.hidden, {{b.q, q}, {b.k, k}, {b.v, v}});
  normalize(b.q_norm, q, b.norm_all ? T : T * H, b.norm_all ? H * d : d);
  normalize(b.k_norm, k, b.norm_all ? T : T * K, b.norm_all ? K * d : d);
  float *q_rotated = scratch.take<float>(T * H * d), *k_rotated = scratch.take<float>(T * K * d), *context = scratch.take<float>(T * H * d);
  apply_rope(b.rotation, q, 0, b.batches, b.length, H, d, d, q_rotated);
  apply_rope(b.rotation, k, 0, b.batches, b.length, K, d, d, k_rotated);
  for (int64_t t = 0; t < T; ++t)
    for (int64_t h = 0; h < K; ++h) {
      b.keys.write(b.slots.batch(t), h, b.slots.position(t), k_rotated + ((t / b.length * K + h) * b.length + t % b.length) * d, d);
      b.values.write(b.slots.batch(t), h, b.slots.position(t), v + (t * K + h) * d, d);
    }
  AttentionCall c = b.masks;
  c.q = dense(q_rotated, H * b.length * d, b.length * d, d), c.k = b.keys.at, c.v = b.values.at;
  c.batches = b.batches, c.heads = H, c.kv_heads = K, c.queries = b.length;
  c.dk = c.dv = d, c.dr = 0, c.out = context, c.out_type = DType::F32;
  attention(c);
  project(context, T, H * d, {{b.o, b.out}});
}

void moe_block(const MoeBlock& b) {
  const int64_t tokens = b.shared.tokens, hidden = b.shared.hidden, count = b.experts.experts, top = std::max<int64_t>(b.experts.top, 1);
  scratch.reset(size_t(tokens) * (count * 4 + top * 12 + hidden * 4 + 16) + 8 * 64);
  float *logits = scratch.take<float>(tokens * count), *weights = scratch.take<float>(tokens * top);
  int64_t* ids = scratch.take<int64_t>(tokens * top);
  float *extra = scratch.take<float>(tokens * hidden), *share = scratch.take<float>(tokens);
  if (count) {
    project(b.x, tokens, hidden, {{b.router, logits}});
    RouteCall r = b.route;
    r.logits = logits, r.tokens = tokens, r.experts = count, r.top = top, r.ids = ids, r.weights = weights;
    route(r);
    ExpertsCall e = b.experts;
    e.x = b.x, e.out = b.out, e.type = DType::F32, e.ids = ids, e.weights = weights;
    experts(e);
  }
  if (!b.shared.inner) return;
  std::fill_n(share, tokens, 1.0f);
  if (!b.shared_gate.parts.empty()) {
    project(b.x, tokens, hidden, {{b.shared_gate, share}});
    for (int64_t t = 0; t < tokens; ++t) share[t] = float(1.0 / (1.0 + exp(-double(share[t]))));  // in f64 as ops/moe.py, so that the result does not depend on the number of tokens
  }
  std::fill_n(ids, tokens, int64_t(0));
  ExpertsCall s = b.shared;
  s.x = b.x, s.out = count ? extra : b.out, s.type = DType::F32, s.ids = ids, s.weights = share;
  experts(s);
  for (int64_t i = 0; count && i < tokens * hidden; ++i) b.out[i] += extra[i];
}
}  // namespace ktx
