// Small operators, each of which would be many torch calls: the cost is the calls, not the arithmetic.
#pragma once
#include <cstdint>

#include "cpu/driver/attention.h"
#include "cpu/quant/dtype.h"

namespace ktx {
// y = x / sqrt(mean(x^2) + eps) * (weight, or 1 + weight if `plus_one`), row by row; rows of x are `stride` elements
// apart, y is dense.
void rms_norm(const void* x, DType type, int64_t rows, int64_t width, int64_t stride, const float* weight, float eps,
    bool plus_one, void* y);
// Rotates the first rope_dim columns of x [batch][head][position][width], which has the strides of its three outer
// dimensions, and copies the other columns. y is dense. cos and sin: f32 [batch][position][rope_dim].
struct RopeCall {
  const void* x;
  void* y;
  DType type;
  int64_t batches, heads, positions, width, rope_dim, batch_stride, head_stride, position_stride;
  const float *cos, *sin;
  int64_t table_batch;  // stride of a sequence in cos and sin; 0 when one table serves all
  bool interleaved;     // pairs (2i, 2i+1) in, halves out
};
void rope(const RopeCall& call);

// Copies [batch][head][position][column] to another dtype: keys and values on the way into or out of a KV cache.
void convert_kv(const Strided& from, void* to, const Strided& layout, int64_t batches, int64_t heads, int64_t positions,
    int64_t columns);

// How scores are made of router logits. SOFTMAX_TOPK: the logits decide, and the weights are a softmax over the chosen
// ones.
enum class Scoring { SOFTMAX, SIGMOID, SOFTMAX_TOPK };
// Group-limited routing: the score of a group is its best expert, or the sum of its two best. NONE: experts have no
// groups.
enum class Groups { NONE, MAX, TOP2 };
// Chooses `top` experts per token.
struct RouteCall {
  const float* logits;                                // [tokens][experts]
  const float* bias;                                  // [experts] or null: affects the choice of experts only
  int64_t tokens, experts, top, n_group, topk_group;  // experts are in n_group groups, of which topk_group are eligible
  Scoring scoring;
  Groups groups;
  bool renorm;
  float scale;
  int64_t* ids;    // [tokens][top], by descending score; ties: lower id first
  float* weights;  // [tokens][top]
};
void route(const RouteCall& call);
// out = act(gate) * up; rows of gate and up, `width` columns, are `stride` elements apart (they may be halves of one
// tensor); out is dense.
void apply_gated_activation(int act, const void* gate, const void* up, DType type, int64_t rows, int64_t width,
    int64_t stride, void* out);
}  // namespace ktx
