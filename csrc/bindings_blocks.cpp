// Whole modules as torch operators; see bindings.cpp. Matrices come as a list, each with its type's code and its rows in a list beside it.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <vector>

#include "bindings.h"
#include "cpu/blocks.h"

namespace {
using namespace ktx;
using Tensors = std::vector<Tensor>;
using Doubles = std::vector<double>;

// Takes matrices from the front of the lists.
class Matrices {
 public:
  Matrices(const Tensors& packed, const Ints& about) : packed_(packed), about_(about) {}
  // `about` holds how many parts the projection has, then a code and a number of rows for each.
  Projection projection(int64_t k, const char* what) {
    Projection found;
    for (int64_t left = next(what); left > 0; --left) {
      const int64_t code = next(what), n = next(what);
      const Layout& layout = layout_of(code, k);
      found.parts.push_back({&layout, data(layout, 1, n, k, what), n, nullptr, nullptr, 0});
    }
    return found;
  }
  ExpertMatrix experts(int64_t count, int64_t n, int64_t k, const char* what) {
    const Layout& layout = layout_of(next(what), k);
    return {&layout, data(layout, count, n, k, what), nullptr};
  }

 private:
  int64_t next(const char* what) {
    STD_TORCH_CHECK(at_ < about_.size(), "the list of numbers ends before ", what);
    return about_[at_++];
  }
  const uint8_t* data(const Layout& layout, int64_t count, int64_t n, int64_t k, const char* what) {
    STD_TORCH_CHECK(n > 0 && count > 0, what, " needs rows");
    STD_TORCH_CHECK(tensor_ < packed_.size(), "the list of matrices ends before ", what);
    return packed_data(packed_[tensor_++], layout, count, n, k, what);
  }
  const Tensors& packed_;
  const Ints& about_;
  size_t at_ = 0, tensor_ = 0;
};

void set_bias(Projection& p, const Optional& bias, const char* what) {
  const float* from = optional_floats(bias, p.rows(), what);
  for (LinearPart& part : p.parts) part.bias = from, from += from ? part.n : 0;
}

Rotation rotation(const Tensor& cos, const Tensor& sin, int64_t batches, int64_t length, bool interleaved) {
  STD_TORCH_CHECK(cos.dim() == 3 && cos.size(1) == length && cos.size(2) % 2 == 0 && (cos.size(0) == 1 || cos.size(0) == batches), "cos does not fit x");
  const int64_t count = cos.size(0) * length * cos.size(2);
  return {floats(cos, count, "cos"), floats(sin, count, "sin"), cos.size(2), cos.size(0) == 1 ? 0 : length * cos.size(2), interleaved};
}

Cached cached(const Tensor& t, int64_t batches, int64_t heads, int64_t positions, int64_t columns, const char* what) {
  STD_TORCH_CHECK(t.dim() == 4 && t.size(0) == batches && t.size(1) == heads && t.size(2) >= positions && columns_of(t, what) == columns,
                  what, " must be [", batches, ", ", heads, ", at least ", positions, ", ", columns, "]");
  return {strided(t, what, true)};
}

// Where a block's tokens go and what they attend to: `past` positions of every batch and what is appended to them, or slots and sequences on pages.
struct Past {
  Places places;
  int64_t batches, positions;  // of the tensors that keep them, at least
  std::optional<Ragged> ragged;
  Past(const Tensor& x, int64_t past, const Tensor& kept, const Optional& sequences, const Optional& pages, const Optional& slots) : places{past, x.size(1), nullptr, 0} {
    batches = x.size(0), positions = past + x.size(1);
    if (!sequences) return;
    STD_TORCH_CHECK(x.size(0) == 1, "sequences on pages come as one batch, found ", x.size(0));
    ragged.emplace(*sequences, pages, kept, x.size(1));
    places.slots = slots_of(slots, x.size(1), kept), places.page = ragged->page;
    batches = kept.size(0), positions = places.page;
  }
  void put(AttentionCall& c, const Optional& ranges, const Optional& mask) const {
    c.keys = positions;
    if (ragged) ragged->put(c);
    set_masks(c, ranges, mask);
  }
};

Norm norm_before(const Optional& weight, int64_t hidden, double eps, bool plus_one) { return {optional_floats(weight, hidden, "before"), float(eps), plus_one}; }

void check_x(const Tensor& x, int64_t dimensions) {
  STD_TORCH_CHECK(x.dim() == dimensions && x.is_contiguous() && x.scalar_type() == ScalarType::Float, "x must be contiguous float32 with ", dimensions, " dimensions");
}

Tensor mla_block_(const Tensor& x, const Tensor& cos, const Tensor& sin, Tensor& latents, Tensor& ropes, int64_t past, const Optional& ranges,
                  const Optional& mask, Tensors packed, Ints about, const Optional& q_norm, const Tensor& kv_norm, int64_t heads, int64_t nope,
                  int64_t values, bool interleaved, Doubles numbers, const Optional& before, double before_eps, bool before_plus_one,
                  const Optional& sequences, const Optional& pages, const Optional& slots) {
  check_x(x, 3);
  STD_TORCH_CHECK(latents.dim() == 4 && past >= 0 && heads > 0 && numbers.size() == 3, "latents, past, heads or numbers are not what a block takes");
  MlaBlock b{};
  b.batches = x.size(0), b.length = x.size(1), b.hidden = x.size(2);
  const Past where(x, past, latents, sequences, pages, slots);
  b.places = where.places;
  b.heads = heads, b.nope = nope, b.values = values, b.rank = columns_of(latents, "latents");
  b.rotation = rotation(cos, sin, b.batches, b.length, interleaved);
  const int64_t turned = b.rotation.turned;
  b.latent = cached(latents, where.batches, 1, where.positions, b.rank, "latents"), b.rope = cached(ropes, where.batches, 1, where.positions, turned, "ropes");
  Matrices matrices(packed, about);
  b.q_a = matrices.projection(b.hidden, "q_a_proj");
  b.q = matrices.projection(b.q_a.rows() ? b.q_a.rows() : b.hidden, "q_proj");
  b.kv_a = matrices.projection(b.hidden, "kv_a_proj");
  b.o = matrices.projection(heads * values, "o_proj");
  STD_TORCH_CHECK(b.q.rows() == heads * (nope + turned) && b.kv_a.rows() == b.rank + turned && b.o.rows() == b.hidden && (!b.q_a.rows() || q_norm),
                  "the projections do not fit ", heads, " heads of ", nope, " + ", turned, " columns on a latent of ", b.rank);
  const ExpertMatrix uk = matrices.experts(heads, b.rank, nope, "W_UK"), uv = matrices.experts(heads, values, b.rank, "W_UV");
  b.uk_layout = uk.layout, b.uk = uk.packed, b.uv_layout = uv.layout, b.uv = uv.packed;
  b.q_norm = {optional_floats(q_norm, b.q_a.rows(), "q_norm"), float(numbers[0]), false};
  b.kv_norm = {floats(kv_norm, b.rank, "kv_norm"), float(numbers[1]), false};
  b.masks.batches = b.batches, b.masks.heads = heads, b.masks.queries = b.length, b.masks.scale = float(numbers[2]);
  where.put(b.masks, ranges, mask);
  Tensor out = torch::stable::empty_like(x);
  b.x = static_cast<const float*>(x.const_data_ptr()), b.out = static_cast<float*>(out.mutable_data_ptr());
  if (x.numel()) beside(b, norm_before(before, b.hidden, before_eps, before_plus_one), b.batches * b.length, b.hidden, mla_block);
  return out;
}

Tensor gqa_block_(const Tensor& x, const Tensor& cos, const Tensor& sin, Tensor& keys, Tensor& values, int64_t past, const Optional& ranges,
                  const Optional& mask, Tensors packed, Ints about, const Optional& q_bias, const Optional& k_bias, const Optional& v_bias,
                  const Optional& o_bias, const Optional& q_norm, const Optional& k_norm, bool norm_all, bool plus_one, const Optional& sinks,
                  Doubles numbers, const Optional& before, double before_eps, bool before_plus_one, const Optional& sequences, const Optional& pages, const Optional& slots) {
  check_x(x, 3);
  STD_TORCH_CHECK(keys.dim() == 4 && past >= 0 && numbers.size() == 4, "keys, past or numbers are not what a block takes");
  GqaBlock b{};
  b.batches = x.size(0), b.length = x.size(1), b.hidden = x.size(2);
  const Past where(x, past, keys, sequences, pages, slots);
  b.places = where.places;
  b.kv_heads = keys.size(1), b.columns = columns_of(keys, "keys");
  b.rotation = rotation(cos, sin, b.batches, b.length, false);
  STD_TORCH_CHECK(b.rotation.turned <= b.columns && b.kv_heads > 0, "cos is wider than a head");
  b.keys = cached(keys, where.batches, b.kv_heads, where.positions, b.columns, "keys"), b.values = cached(values, where.batches, b.kv_heads, where.positions, b.columns, "values");
  Matrices matrices(packed, about);
  b.q = matrices.projection(b.hidden, "q_proj"), b.k = matrices.projection(b.hidden, "k_proj"), b.v = matrices.projection(b.hidden, "v_proj");
  b.o = matrices.projection(b.q.rows(), "o_proj");
  b.heads = b.q.rows() / b.columns;
  STD_TORCH_CHECK(b.q.rows() % b.columns == 0 && b.heads > 0 && b.heads % b.kv_heads == 0 && b.k.rows() == b.kv_heads * b.columns && b.v.rows() == b.k.rows() && b.o.rows() == b.hidden,
                  "the projections do not fit ", b.kv_heads, " key/value heads of ", b.columns, " columns");
  set_bias(b.q, q_bias, "q_bias"), set_bias(b.k, k_bias, "k_bias"), set_bias(b.v, v_bias, "v_bias"), set_bias(b.o, o_bias, "o_bias");
  b.norm_all = norm_all;
  b.q_norm = {optional_floats(q_norm, norm_all ? b.q.rows() : b.columns, "q_norm"), float(numbers[0]), plus_one};
  b.k_norm = {optional_floats(k_norm, norm_all ? b.k.rows() : b.columns, "k_norm"), float(numbers[1]), plus_one};
  b.masks.batches = b.batches, b.masks.heads = b.heads, b.masks.queries = b.length;
  b.masks.scale = float(numbers[2]), b.masks.softcap = float(numbers[3]);
  if (sinks) b.masks.sinks = floats(*sinks, b.heads, "sinks");
  where.put(b.masks, ranges, mask);
  Tensor out = torch::stable::empty_like(x);
  b.x = static_cast<const float*>(x.const_data_ptr()), b.out = static_cast<float*>(out.mutable_data_ptr());
  if (x.numel()) beside(b, norm_before(before, b.hidden, before_eps, before_plus_one), b.batches * b.length, b.hidden, gqa_block);
  return out;
}

Tensor moe_block_(const Tensor& x, Tensors packed, Ints about, const Optional& router_bias, const Optional& correction, int64_t experts, int64_t top,
                  StringHandle scoring_word, StringHandle group_word, int64_t n_group, int64_t topk_group, bool renorm, double scale, int64_t ff,
                  int64_t shared_ff, StringHandle act_word, double alpha, double limit, const Optional& before, double before_eps, bool before_plus_one, const Optional& counts) {
  const std::string scoring = text_of(scoring_word), group_mode = text_of(group_word), act = text_of(act_word);
  check_x(x, 2);
  const int64_t tokens = x.size(0), hidden = x.size(1);
  STD_TORCH_CHECK(experts > 0 && ff > 0 && shared_ff >= 0, "experts and ff must be positive");
  Matrices matrices(packed, about);
  MoeBlock b{};
  b.router = matrices.projection(hidden, "router");
  STD_TORCH_CHECK(b.router.rows() == experts, "the router has ", b.router.rows(), " rows for ", experts, " experts");
  set_bias(b.router, router_bias, "router_bias");
  b.route = route_style(scoring, group_mode, optional_floats(correction, experts, "correction"), experts, top, n_group, topk_group, renorm, scale);
  b.experts.tokens = tokens, b.experts.top = top, b.experts.hidden = hidden, b.experts.inner = ff, b.experts.experts = experts;
  b.experts.act = activation(act), b.experts.alpha = float(alpha), b.experts.limit = float(limit);
  b.experts.counts = optional_counts(counts, experts);
  b.experts.gate = matrices.experts(experts, ff, hidden, "gate"), b.experts.up = matrices.experts(experts, ff, hidden, "up");
  b.experts.down = matrices.experts(experts, hidden, ff, "down");
  if (shared_ff) {
    b.shared.inner = shared_ff, b.shared.act = b.experts.act;
    b.shared.gate = matrices.experts(1, shared_ff, hidden, "shared gate"), b.shared.up = matrices.experts(1, shared_ff, hidden, "shared up");
    b.shared.down = matrices.experts(1, hidden, shared_ff, "shared down");
    b.shared_gate = matrices.projection(hidden, "shared_expert_gate");
    STD_TORCH_CHECK(b.shared_gate.rows() <= 1, "shared_expert_gate has more than one row");
  }
  Tensor out = torch::stable::empty_like(x);
  b.x = static_cast<const float*>(x.const_data_ptr()), b.out = static_cast<float*>(out.mutable_data_ptr());
  if (tokens) beside(b, norm_before(before, hidden, before_eps, before_plus_one), tokens, hidden, moe_block);
  return out;
}
}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(ktx, m) {
  m.def("mla_block(Tensor x, Tensor cos, Tensor sin, Tensor(a!) latents, Tensor(b!) ropes, int past, Tensor? ranges, Tensor? mask, Tensor[] packed, "
        "int[] about, Tensor? q_norm, Tensor kv_norm, int heads, int nope, int values, bool interleaved, float[] numbers, Tensor? before=None, float before_eps=0.0, bool before_plus_one=False, Tensor? sequences=None, Tensor? pages=None, Tensor? slots=None) -> Tensor");
  m.def("gqa_block(Tensor x, Tensor cos, Tensor sin, Tensor(a!) keys, Tensor(b!) values, int past, Tensor? ranges, Tensor? mask, Tensor[] packed, "
        "int[] about, Tensor? q_bias, Tensor? k_bias, Tensor? v_bias, Tensor? o_bias, Tensor? q_norm, Tensor? k_norm, bool norm_all, bool plus_one, "
        "Tensor? sinks, float[] numbers, Tensor? before=None, float before_eps=0.0, bool before_plus_one=False, Tensor? sequences=None, Tensor? pages=None, Tensor? slots=None) -> Tensor");
  m.def("moe_block(Tensor x, Tensor[] packed, int[] about, Tensor? router_bias, Tensor? correction, int experts, int top, str scoring, str group_mode, "
        "int n_group, int topk_group, bool renorm, float scale, int ff, int shared_ff, str act, float alpha, float limit, Tensor? before=None, float before_eps=0.0, bool before_plus_one=False, Tensor(a!)? counts=None) -> Tensor");
}
STABLE_TORCH_LIBRARY_IMPL(ktx, CPU, m) {
  m.impl("mla_block", TORCH_BOX(&mla_block_));
  m.impl("gqa_block", TORCH_BOX(&gqa_block_));
  m.impl("moe_block", TORCH_BOX(&moe_block_));
}
