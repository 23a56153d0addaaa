// Small operators, each of which would be many torch calls: the cost is the calls, not the arithmetic.
#pragma once
#include <cstdint>

#include "cpu/driver/attention.h"
#include "cpu/quant/dtype.h"

namespace ktx {
// y = x / sqrt(mean(x^2) + eps) * (weight or 1 + weight), row by row; x rows `stride` elements apart
void rms_norm(const void* x, DType type, int64_t rows, int64_t width, int64_t stride, const float* weight, float eps, bool plus_one, void* y);
// x [batch][head][position][width] with the strides of its three outer dimensions -> y dense; cos and sin f32 [batch][position][rope_dim]
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
void convert_kv(const Strided& from, void* to, const Strided& places, int64_t batches, int64_t heads, int64_t positions, int64_t columns);

enum class Scoring { SOFTMAX, SIGMOID, SOFTMAX_TOPK };
enum class Groups { NONE, MAX, TOP2 };
struct RouteCall {
  const float* logits;  // [tokens][experts]
  const float* bias;    // [experts] or null: affects the choice of experts only
  int64_t tokens, experts, top, n_group, topk_group;
  Scoring scoring;
  Groups groups;
  bool renorm;
  float scale;
  int64_t* ids;    // [tokens][top], by descending score; ties: lower id first
  float* weights;  // [tokens][top]
};
void route(const RouteCall& call);
// out = act(gate) * up; gate and up rows of `width` may be `stride` apart (halves of one tensor), out dense
void gated(int act, const void* gate, const void* up, DType type, int64_t rows, int64_t width, int64_t stride, void* out);
}  // namespace ktx
