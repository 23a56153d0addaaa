// Attention and the elementwise operators as torch operators; see bindings.cpp.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "bindings.h"
#include "cpu/driver/attention.h"
#include "cpu/isa/kernels.h"
#include "cpu/driver/elementwise.h"

namespace {
using namespace ktx;

// What attention_ and mla_attention_ have in common: completes a call (sequences, masks, output) and runs it; returns
// [batch, queries, heads, dv] of the dtype of `like`. `pool`: the tensor with the pages, or the keys.
Tensor run_attention(AttentionCall& c, const Tensor& like, const Optional& ranges, const Optional& mask,
    const Optional& sequences, const Optional& pages, const Tensor& pool) {
  std::optional<Ragged> ragged;
  if (sequences) {
    STD_TORCH_CHECK(c.batches == 1, "sequences on pages come as one batch, found ", c.batches);
    ragged.emplace(*sequences, pages, pool, c.queries).apply_to(c);
  }
  set_masks(c, ranges, mask);
  Tensor out = torch::stable::new_empty(like, {c.batches, c.queries, c.heads, c.dv});
  c.out = out.mutable_data_ptr(), c.out_type = dtype_of(out);
  if (out.numel()) attention(c);
  return out;
}

// Attention of q [batch, heads, queries, dk] over k and v [batch, KV heads, keys, columns], which may be a KV cache.
// With `sequences` and `pages`: a ragged call over pages. q_rope and k_rope: more columns of queries and keys, which
// are stored apart.
Tensor attention_(const Tensor& q, const Tensor& k, const Tensor& v, const Optional& ranges, const Optional& mask,
    double scale, const Optional& sinks, double softcap, const Optional& q_rope, const Optional& k_rope,
    const Optional& sequences, const Optional& pages) {
  STD_TORCH_CHECK(q.dim() == 4 && k.dim() == 4 && v.dim() == 4,
      "q, k and v must be [batch, heads, positions, columns]");
  AttentionCall c{};
  c.q = strided(q, "q"), c.k = strided(k, "k", /*is_cache=*/true), c.v = strided(v, "v", /*is_cache=*/true);
  c.batches = q.size(0), c.heads = q.size(1), c.kv_heads = k.size(1), c.queries = q.size(2), c.keys = k.size(2),
  c.dk = q.size(3), c.dv = num_columns(v, "v");
  STD_TORCH_CHECK(k.size(0) == (sequences ? v.size(0) : c.batches) &&
          v.size(0) == (sequences ? k.size(0) : c.batches) && v.size(1) == c.kv_heads && v.size(2) == c.keys &&
          num_columns(k, "k") == c.dk,
      "k and v do not fit q and each other");
  STD_TORCH_CHECK(c.kv_heads > 0 && c.heads % c.kv_heads == 0, c.heads, " query heads on ", c.kv_heads,
      " key/value heads");
  if (sinks) c.sinks = float_data(*sinks, c.heads, "sinks");
  STD_TORCH_CHECK(bool(q_rope) == bool(k_rope), "q_rope and k_rope come together");
  if (q_rope) {
    STD_TORCH_CHECK(q_rope->dim() == 4 && k_rope->dim() == 4,
        "q_rope and k_rope must be [batch, heads, positions, columns]");
    c.q_rope = strided(*q_rope, "q_rope"), c.k_rope = strided(*k_rope, "k_rope", /*is_cache=*/true),
    c.dr = q_rope->size(3);
    STD_TORCH_CHECK(q_rope->size(0) == c.batches && q_rope->size(1) == c.heads && q_rope->size(2) == c.queries,
        "q_rope does not fit q");
    STD_TORCH_CHECK(k_rope->size(0) == c.batches && (k_rope->size(1) == 1 || k_rope->size(1) == c.kv_heads) &&
            k_rope->size(2) == c.keys && num_columns(*k_rope, "k_rope") == c.dr,
        "k_rope does not fit k and q_rope");
    if (k_rope->size(1) == 1) c.k_rope.head = 0;
  }
  c.scale = float(scale), c.softcap = float(softcap);
  return run_attention(c, q, ranges, mask, sequences, pages, k);
}

// Absorbed MLA: keys are [ckv, kpe], values are ckv, and all heads share them, so it is attention with one KV head.
Tensor mla_attention_(const Tensor& q_nope, const Tensor& q_rope, const Tensor& ckv, const Tensor& kpe,
    const Optional& ranges, const Optional& mask, double scale, const Optional& sequences, const Optional& pages) {
  STD_TORCH_CHECK(q_nope.dim() == 4 && q_rope.dim() == 4 && ckv.dim() == 3 && kpe.dim() == 3,
      "q_nope and q_rope must be 4-D, ckv and kpe 3-D");
  AttentionCall c{};
  c.q = strided(q_nope, "q_nope"), c.q_rope = strided(q_rope, "q_rope"), c.k = strided(ckv, "ckv", /*is_cache=*/true),
  c.k_rope = strided(kpe, "kpe", /*is_cache=*/true), c.v = c.k;
  c.batches = q_nope.size(0), c.heads = q_nope.size(1), c.kv_heads = 1, c.queries = q_nope.size(2),
  c.keys = ckv.size(1);
  c.dk = q_nope.size(3), c.dr = q_rope.size(3), c.dv = c.dk;
  STD_TORCH_CHECK(q_rope.size(0) == c.batches && q_rope.size(1) == c.heads && q_rope.size(2) == c.queries,
      "q_rope does not fit q_nope");
  STD_TORCH_CHECK(kpe.size(0) == ckv.size(0) && (sequences || ckv.size(0) == c.batches) && kpe.size(1) == c.keys &&
          num_columns(ckv, "ckv") == c.dk && num_columns(kpe, "kpe") == c.dr,
      "ckv and kpe do not fit the queries and each other");
  c.scale = float(scale);
  return run_attention(c, q_nope, ranges, mask, sequences, pages, ckv);
}

// Returns x, which is contiguous, with each row (the last dimension) normalized by its root mean square.
Tensor rms_norm_(const Tensor& x, const Tensor& weight, double eps, bool plus_one) {
  const int64_t width = x.size(x.dim() - 1), rows = x.numel() / (width ? width : 1);
  STD_TORCH_CHECK(x.is_contiguous() && width > 0, "x must be contiguous");
  Tensor y = torch::stable::empty_like(x);
  rms_norm(x.const_data_ptr(), dtype_of(x), rows, width, width, float_data(weight, width, "weight"), float(eps),
      plus_one, y.mutable_data_ptr());
  return y;
}

// Returns a copy of x [batch, heads, positions, columns] with rope_dim columns rotated; cos and sin: f32 [batch or 1,
// positions, rope_dim].
Tensor rope_(const Tensor& x, const Tensor& cos, const Tensor& sin, bool interleaved) {
  STD_TORCH_CHECK(x.dim() == 4 && x.stride(3) == 1 && cos.dim() == 3,
      "x must be [batch, heads, positions, columns], cos [batch, positions, rope_dim]");
  const int64_t rope_dim = cos.size(2), num_tables = cos.size(0);
  STD_TORCH_CHECK(rope_dim % 2 == 0 && rope_dim <= x.size(3) && cos.size(1) == x.size(2) &&
          (num_tables == 1 || num_tables == x.size(0)),
      "cos does not fit x");
  Tensor y = torch::stable::new_empty(x, {x.size(0), x.size(1), x.size(2), x.size(3)});
  const int64_t table_size = num_tables * x.size(2) * rope_dim;
  rope({x.const_data_ptr(), y.mutable_data_ptr(), dtype_of(x), x.size(0), x.size(1), x.size(2), x.size(3), rope_dim,
      x.stride(0), x.stride(1), x.stride(2), float_data(cos, table_size, "cos"), float_data(sin, table_size, "sin"),
      num_tables == 1 ? 0 : x.size(2) * rope_dim, interleaved});
  return y;
}

// Returns the ids (int64) and weights (f32) of each token's top_k experts, by descending score; see
// cpu/driver/elementwise.h.
std::tuple<Tensor, Tensor> route_(const Tensor& logits, int64_t top_k, StringHandle scoring_word, const Optional& bias,
    int64_t n_group, int64_t topk_group, StringHandle group_word, bool renorm, double scale) {
  const std::string scoring = take_string(scoring_word), group_mode = take_string(group_word);
  STD_TORCH_CHECK(logits.dim() == 2, "logits must be [tokens, experts]");
  const int64_t tokens = logits.size(0), experts = logits.size(1);
  const float* values = float_data(logits, tokens * experts, "logits");
  RouteCall r = make_route_call(scoring, group_mode, bias ? float_data(*bias, experts, "bias") : nullptr, experts,
      top_k, n_group, topk_group, renorm, scale);
  Tensor ids = torch::stable::new_empty(logits, {tokens, top_k}, std::make_optional(ScalarType::Long));
  Tensor weights = torch::stable::new_empty(logits, {tokens, top_k});
  r.logits = values, r.tokens = tokens, r.ids = static_cast<int64_t*>(ids.mutable_data_ptr()),
  r.weights = static_cast<float*>(weights.mutable_data_ptr());
  route(r);
  return {ids, weights};
}

// Quantizes keys or values x [batch][head][position][column] to the Q8_0 blocks of `to`, which may be a slice of a
// longer cache.
void store_q8_0_(const Tensor& x, Tensor& to) {
  STD_TORCH_CHECK(x.dim() == 4 && to.dim() == 4 && to.scalar_type() == ScalarType::Byte,
      "x and to must be [batch, heads, positions, columns], to in bytes");
  const int64_t columns = x.size(3), heads = x.size(1), positions = x.size(2);
  STD_TORCH_CHECK(to.size(0) == x.size(0) && to.size(1) == heads && to.size(2) == positions &&
          num_columns(to, "to") == columns,
      "to does not fit x");
  convert_kv(strided(x, "x"), to.mutable_data_ptr(), strided(to, "to", /*is_cache=*/true), x.size(0), heads, positions,
      columns);
}

// Stores keys or values x [1][head][token][column] of a ragged call in the slots of a pool
// [page][head][position][column]. Converts the tokens of a run of consecutive slots on a page at once.
void store_slots_(const Tensor& x, Tensor& pool, const Tensor& slots) {
  STD_TORCH_CHECK(x.dim() == 4 && pool.dim() == 4 && x.size(0) == 1 && pool.size(1) == x.size(1) &&
          num_columns(pool, "pool") == x.size(3),
      "x [1, heads, tokens, columns] does not fit the pool");
  const int64_t tokens = x.size(2), page = pool.size(2);
  const int64_t* slot_ids = checked_slots(slots, tokens, pool);
  const Strided from = strided(x, "x"), to = strided(pool, "pool", /*is_cache=*/true);
  for (int64_t first = 0, end; first < tokens; first = end) {
    for (end = first + 1; end < tokens && slot_ids[end] == slot_ids[end - 1] + 1 && slot_ids[end] % page; ++end) {}
    const Strided slot_run{static_cast<const uint8_t*>(from.data) + first * from.position * int64_t(size_of(from.type)),
        from.type, 0, from.head, from.position};
    uint8_t* target = static_cast<uint8_t*>(pool.mutable_data_ptr()) +
        (slot_ids[first] / page * to.batch + slot_ids[first] % page * to.position) * int64_t(size_of(to.type));
    convert_kv(slot_run, target, to, 1, x.size(1), end - first, x.size(3));
  }
}

// Returns the values of Q8_0 blocks, dequantized to dense f16, for callers that compute in torch.
Tensor load_q8_0_(const Tensor& x) {
  STD_TORCH_CHECK(x.dim() == 4 && x.scalar_type() == ScalarType::Byte, "x must be [batch, heads, positions, bytes]");
  Tensor y = torch::stable::new_empty(x, {x.size(0), x.size(1), x.size(2), num_columns(x, "x")},
      std::make_optional(ScalarType::Half));
  convert_kv(strided(x, "x", /*is_cache=*/true), y.mutable_data_ptr(), strided(y, "y"), x.size(0), x.size(1), x.size(2),
      y.size(3));
  return y;
}

// Returns act(gate) * up, of gate's shape: the middle of a gated MLP that runs as single operators. SWIGLU_OAI is not
// offered, because it has parameters.
Tensor gated_(const Tensor& gate, const Tensor& up, StringHandle act_word) {
  const std::string act_name = take_string(act_word);
  const int64_t width = gate.size(gate.dim() - 1), rows = gate.numel() / (width ? width : 1);
  STD_TORCH_CHECK(gate.is_contiguous() && up.is_contiguous() && gate.numel() == up.numel() &&
          gate.scalar_type() == up.scalar_type(),
      "gate and up must be contiguous twins");
  const int act = parse_enum<int>(act_name,
      {{"silu", SILU}, {"gelu", GELU}, {"gelu_tanh", GELU_TANH}, {"relu", RELU}, {"relu2", RELU2}}, "activation");
  Tensor out = torch::stable::empty_like(gate);
  apply_gated_activation(act, gate.const_data_ptr(), up.const_data_ptr(), dtype_of(gate), rows, width, width,
      out.mutable_data_ptr());
  return out;
}
}  // namespace

// The schemas of this file's operators.
STABLE_TORCH_LIBRARY_FRAGMENT(ktx, m) {
  m.def(
      "attention(Tensor q, Tensor k, Tensor v, Tensor? ranges, Tensor? mask, float scale, Tensor? sinks=None, "
      "float softcap=0.0, Tensor? q_rope=None, Tensor? k_rope=None, Tensor? sequences=None, "
      "Tensor? pages=None) -> Tensor");
  m.def(
      "mla_attention(Tensor q_nope, Tensor q_rope, Tensor ckv, Tensor kpe, Tensor? ranges, Tensor? mask, float scale, "
      "Tensor? sequences=None, Tensor? pages=None) -> Tensor");
  m.def("rms_norm(Tensor x, Tensor weight, float eps, bool plus_one=False) -> Tensor");
  m.def("rope(Tensor x, Tensor cos, Tensor sin, bool interleaved=False) -> Tensor");
  m.def(
      "route(Tensor logits, int top_k, str scoring, Tensor? bias=None, int n_group=1, int topk_group=1, "
      "str group_mode='none', bool renorm=False, float scale=1.0) -> (Tensor, Tensor)");
  m.def("store_q8_0(Tensor x, Tensor(a!) to) -> ()");
  m.def("store_slots(Tensor x, Tensor(a!) pool, Tensor slots) -> ()");
  m.def("load_q8_0(Tensor x) -> Tensor");
  m.def("gated(Tensor gate, Tensor up, str act) -> Tensor");
}
STABLE_TORCH_LIBRARY_IMPL(ktx, CPU, m) {
  m.impl("attention", TORCH_BOX(&attention_));
  m.impl("mla_attention", TORCH_BOX(&mla_attention_));
  m.impl("rms_norm", TORCH_BOX(&rms_norm_));
  m.impl("rope", TORCH_BOX(&rope_));
  m.impl("route", TORCH_BOX(&route_));
  m.impl("store_q8_0", TORCH_BOX(&store_q8_0_));
  m.impl("store_slots", TORCH_BOX(&store_slots_));
  m.impl("load_q8_0", TORCH_BOX(&load_q8_0_));
  m.impl("gated", TORCH_BOX(&gated_));
}
