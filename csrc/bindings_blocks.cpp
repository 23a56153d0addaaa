// Fused modules, and sequences of them, as torch operators; see bindings.cpp. A module is registered as a step once: a
// list of its packed matrices and a flat list of their descriptors (number of parts; type code and rows of each; see
// WeightDescriptor in ktx/ops/fusion/fused.py). A call then passes step ids and tokens only, so that it has few
// arguments to convert.
#include <pthread.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <functional>
#include <memory>
#include <mutex>
#include <unordered_map>
#include <vector>

#include "bindings.h"
#include "cpu/driver/blocks.h"

namespace {
using namespace ktx;
using Tensors = std::vector<Tensor>;
using Doubles = std::vector<double>;

// Reads matrices in order from the two lists that a module is registered with: descriptors and packed tensors. The
// order is that of the calls in the constructors of the steps below. `what` names the matrix in errors.
class MatrixReader {
 public:
  MatrixReader(const Tensors& packed, const Ints& descriptors) : packed_(packed), descriptors_(descriptors) {}
  // Descriptors of a projection: the number of parts, then type code and rows of each. `k`: columns of all parts.
  Projection projection(int64_t k, const char* what) {
    Projection result;
    for (int64_t parts_left = next(what); parts_left > 0; --parts_left) {
      const int64_t code = next(what), n = next(what);
      const Layout& layout = layout_of(code, k);
      result.parts.push_back({&layout, data(layout, 1, n, k, what), n, nullptr, nullptr, 0});
    }
    return result;
  }
  // Descriptor of `count` expert matrices [n, k]: one type code.
  ExpertMatrix experts(int64_t count, int64_t n, int64_t k, const char* what) {
    const Layout& layout = layout_of(next(what), k);
    return {&layout, data(layout, count, n, k, what), nullptr};
  }

 private:
  int64_t next(const char* what) {
    STD_TORCH_CHECK(next_descriptor_ < descriptors_.size(), "the list of numbers ends before ", what);
    return descriptors_[next_descriptor_++];
  }
  const uint8_t* data(const Layout& layout, int64_t count, int64_t n, int64_t k, const char* what) {
    STD_TORCH_CHECK(n > 0 && count > 0, what, " needs rows");
    STD_TORCH_CHECK(next_tensor_ < packed_.size(), "the list of matrices ends before ", what);
    return packed_data(packed_[next_tensor_++], layout, count, n, k, what);
  }
  const Tensors& packed_;
  const Ints& descriptors_;
  size_t next_descriptor_ = 0, next_tensor_ = 0;
};

// Distributes the bias of a projection [rows] over its parts.
void set_bias(Projection& p, const Optional& bias, const char* what) {
  const float* from = optional_float_data(bias, p.rows(), what);
  for (LinearPart& part : p.parts) part.bias = from, from += from ? part.n : 0;
}

// Checks cos and sin of a call, f32 [batch or 1, length, rope_dim], and returns them as the kernels take them.
RopeTables rope_tables(const Tensor& cos, const Tensor& sin, int64_t batches, int64_t length, bool interleaved) {
  STD_TORCH_CHECK(cos.dim() == 3 && cos.size(1) == length && cos.size(2) % 2 == 0 &&
          (cos.size(0) == 1 || cos.size(0) == batches),
      "cos does not fit x");
  const int64_t count = cos.size(0) * length * cos.size(2);
  return {float_data(cos, count, "cos"), float_data(sin, count, "sin"), cos.size(2),
      cos.size(0) == 1 ? 0 : length * cos.size(2), interleaved};
}

// Checks a cache tensor [batch or page, heads, at least `positions`, columns] of keys or values, to which a step writes
// unchecked, and returns its description. `what` names it in errors.
KVStore kv_store(const Tensor& t, int64_t batches, int64_t heads, int64_t positions, int64_t columns,
    const char* what) {
  STD_TORCH_CHECK(t.dim() == 4 && t.size(0) == batches && t.size(1) == heads && t.size(2) >= positions &&
          num_columns(t, what) == columns,
      what, " must be [", batches, ", ", heads, ", at least ", positions, ", ", columns, "]");
  return {strided(t, what, /*is_cache=*/true)};
}

// Where a block's tokens are stored and what they attend to: `past` positions of each batch and the new tokens, or, for
// a ragged call, slots and sequences on pages.
struct CachePlan {
  KVSlots slots;
  int64_t batches, positions;  // minimum sizes of the cache tensors
  std::optional<Ragged> ragged;
  // Without `sequences` the tokens follow `past` positions of their batch, else they go to `slots` of the pool `cache`.
  CachePlan(const Tensor& x, int64_t past, const Tensor& cache, const Optional& sequences, const Optional& pages,
      const Optional& slots)
      : slots{past, x.size(1), nullptr, 0} {
    batches = x.size(0), positions = past + x.size(1);
    if (!sequences) return;
    STD_TORCH_CHECK(x.size(0) == 1, "sequences on pages come as one batch, found ", x.size(0));
    ragged.emplace(*sequences, pages, cache, x.size(1));
    this->slots.slots = checked_slots(slots, x.size(1), cache), this->slots.page = ragged->page;
    batches = cache.size(0), positions = this->slots.page;
  }
  void apply_to(AttentionCall& c, const Optional& ranges, const Optional& mask) const {
    c.keys = positions;
    if (ragged) ragged->apply_to(c);
    set_masks(c, ranges, mask);
  }
};

// The arguments of run_steps that all its steps share.
struct Call {
  const Tensor& x;  // f32 [batches, length, hidden], of the first step; later ones have the same shape
  const Optional &cos, &sin, &ranges, &mask, &sequences, &pages, &slots;
  int64_t past, batches, length;
};

// A module as run_steps runs it (not a step of the engine): everything that does not depend on tokens. A step owns the
// tensors that it reads, and stores their addresses, because torch moves the memory of a tensor in place when it shares
// the tensor with another process.
class Step {
 public:
  Step(int64_t hidden, const Optional& pre_norm, double eps, bool plus_one)
      : hidden(hidden), pre_norm_{optional_float_data(pre_norm, hidden, "before"), float(eps), plus_one} {
    retain({&pre_norm});
  }
  virtual ~Step() = default;
  // Returns whether a tensor has other memory than when the step was built, so that the step's pointers are stale.
  bool moved() const {
    for (const auto& [tensor, address] : retained_)
      if (tensor.const_data_ptr() != address) return true;
    return false;
  }
  virtual size_t num_caches() const { return 0; }  // number of cache tensors that the step writes
  // Computes the module: completes a copy of its block with what depends on the call, because threads may share the
  // step, and runs the copy. x and out: f32 [batch * length][hidden]; `caches`: the step's num_caches() tensors.
  virtual void run(const Call& call, Tensor* caches, const float* x, float* out) const = 0;
  const int64_t hidden;

 protected:
  // Keeps tensors alive as long as the step, and stores their addresses for moved().
  void retain(const Tensors& tensors) {
    for (const Tensor& t : tensors) retained_.emplace_back(t, t.const_data_ptr());
  }
  void retain(std::initializer_list<const Optional*> tensors) {
    for (const Optional* t : tensors)
      if (*t) retained_.emplace_back(**t, (*t)->const_data_ptr());
  }
  Norm pre_norm_;

 private:
  std::vector<std::pair<Tensor, const void*>> retained_;
};

// Sets the fields of a block with attention that depend on the call: sizes, slots, RoPE tables, masks, sequences.
// `cache`: one of the block's cache tensors, for their sizes. The result must live until the block has run, because the
// block points into it.
template <class B>
CachePlan bind_call(B& b, const Call& call, const Tensor& cache, bool interleaved) {
  STD_TORCH_CHECK(cache.dim() == 4 && call.cos && call.sin,
      "a cache [batch, heads, positions, columns], cos and sin are needed");
  b.batches = call.batches, b.length = call.length;
  CachePlan plan(call.x, call.past, cache, call.sequences, call.pages, call.slots);
  b.slots = plan.slots;
  b.rotation = rope_tables(*call.cos, *call.sin, b.batches, b.length, interleaved);
  b.masks.batches = b.batches, b.masks.queries = b.length;
  plan.apply_to(b.masks, call.ranges, call.mask);
  return plan;
}

// An absorbed MLA attention module.
class MlaStep : public Step {
 public:
  // Reads the matrices in the order in which Python lists them and checks that they fit each other. sizes: hidden,
  // heads, qk_nope_head_dim, v_head_dim, kv_lora_rank, rope_dim. scalars: eps of q_norm, eps of kv_norm, softmax scale.
  MlaStep(const Tensors& packed, const Ints& descriptors, const Ints& sizes, const Optional& q_norm,
      const Optional& kv_norm, bool interleaved, const Doubles& scalars, const Optional& pre_norm, double eps,
      bool plus_one)
      : Step(sizes[0], pre_norm, eps, plus_one), rope_dim_(sizes[5]), interleaved_(interleaved) {
    MlaBlock& b = block_;
    b.hidden = sizes[0], b.heads = sizes[1], b.qk_nope_head_dim = sizes[2], b.v_head_dim = sizes[3],
    b.kv_lora_rank = sizes[4];
    MatrixReader matrices(packed, descriptors);
    b.q_a = matrices.projection(b.hidden, "q_a_proj");
    b.q = matrices.projection(b.q_a.rows() ? b.q_a.rows() : b.hidden, "q_proj");
    b.kv_a = matrices.projection(b.hidden, "kv_a_proj");
    b.o = matrices.projection(b.heads * b.v_head_dim, "o_proj");
    STD_TORCH_CHECK(b.q.rows() == b.heads * (b.qk_nope_head_dim + rope_dim_) &&
            b.kv_a.rows() == b.kv_lora_rank + rope_dim_ && b.o.rows() == b.hidden && (!b.q_a.rows() || q_norm) &&
            kv_norm,
        "the projections do not fit ", b.heads, " heads of ", b.qk_nope_head_dim, " + ", rope_dim_,
        " columns on a latent of ", b.kv_lora_rank);
    const ExpertMatrix uk = matrices.experts(b.heads, b.kv_lora_rank, b.qk_nope_head_dim, "W_UK"),
                       uv = matrices.experts(b.heads, b.v_head_dim, b.kv_lora_rank, "W_UV");
    b.uk_layout = uk.layout, b.uk = uk.packed, b.uv_layout = uv.layout, b.uv = uv.packed;
    b.q_norm = {optional_float_data(q_norm, b.q_a.rows(), "q_norm"), float(scalars[0]), false};
    b.kv_norm = {optional_float_data(kv_norm, b.kv_lora_rank, "kv_norm"), float(scalars[1]), false};
    b.masks.heads = b.heads, b.masks.scale = float(scalars[2]);
    retain(packed), retain({&q_norm, &kv_norm});
  }
  size_t num_caches() const override { return 2; }
  // Completes a copy of the block with the call's sizes, slots, masks and caches (latents, RoPE columns), and runs it.
  void run(const Call& call, Tensor* caches, const float* x, float* out) const override {
    MlaBlock b = block_;
    const CachePlan plan = bind_call(b, call, caches[0], interleaved_);
    STD_TORCH_CHECK(b.rotation.rope_dim == rope_dim_, "cos has ", b.rotation.rope_dim, " columns, ", rope_dim_,
        " are rotated");
    b.latent = kv_store(caches[0], plan.batches, 1, plan.positions, b.kv_lora_rank, "latents"),
    b.rope = kv_store(caches[1], plan.batches, 1, plan.positions, rope_dim_, "ropes");
    b.x = x, b.out = out;
    with_norm_and_residual(b, pre_norm_, b.batches * b.length, b.hidden, mla_block);
  }

 private:
  MlaBlock block_{};
  int64_t rope_dim_;
  bool interleaved_;
};

// A GQA attention module.
class GqaStep : public Step {
 public:
  // Reads the matrices in the order in which Python lists them and checks that they fit each other. sizes: hidden,
  // kv_heads, head_dim. scalars: eps of q_norm, eps of k_norm, softmax scale, softcap (0: none). norm_all: q and k are
  // normalized over all heads' columns at once.
  GqaStep(const Tensors& packed, const Ints& descriptors, const Ints& sizes, const Optional& q_bias,
      const Optional& k_bias, const Optional& v_bias, const Optional& o_bias, const Optional& q_norm,
      const Optional& k_norm, bool norm_all, bool norm_plus_one, const Optional& sinks, const Doubles& scalars,
      const Optional& pre_norm, double eps, bool plus_one)
      : Step(sizes[0], pre_norm, eps, plus_one) {
    GqaBlock& b = block_;
    b.hidden = sizes[0], b.kv_heads = sizes[1], b.head_dim = sizes[2];
    STD_TORCH_CHECK(b.kv_heads > 0 && b.head_dim > 0, "kv_heads and columns must be positive");
    MatrixReader matrices(packed, descriptors);
    b.q = matrices.projection(b.hidden, "q_proj"), b.k = matrices.projection(b.hidden, "k_proj"),
    b.v = matrices.projection(b.hidden, "v_proj");
    b.o = matrices.projection(b.q.rows(), "o_proj");
    b.heads = b.q.rows() / b.head_dim;
    STD_TORCH_CHECK(b.q.rows() % b.head_dim == 0 && b.heads > 0 && b.heads % b.kv_heads == 0 &&
            b.k.rows() == b.kv_heads * b.head_dim && b.v.rows() == b.k.rows() && b.o.rows() == b.hidden,
        "the projections do not fit ", b.kv_heads, " key/value heads of ", b.head_dim, " columns");
    set_bias(b.q, q_bias, "q_bias"), set_bias(b.k, k_bias, "k_bias"), set_bias(b.v, v_bias, "v_bias"),
        set_bias(b.o, o_bias, "o_bias");
    b.norm_all = norm_all;
    b.q_norm = {optional_float_data(q_norm, norm_all ? b.q.rows() : b.head_dim, "q_norm"), float(scalars[0]),
        norm_plus_one};
    b.k_norm = {optional_float_data(k_norm, norm_all ? b.k.rows() : b.head_dim, "k_norm"), float(scalars[1]),
        norm_plus_one};
    b.masks.heads = b.heads, b.masks.scale = float(scalars[2]), b.masks.softcap = float(scalars[3]);
    b.masks.sinks = optional_float_data(sinks, b.heads, "sinks");
    retain(packed), retain({&q_bias, &k_bias, &v_bias, &o_bias, &q_norm, &k_norm, &sinks});
  }
  size_t num_caches() const override { return 2; }
  // Completes a copy of the block with the call's sizes, slots, masks and caches (keys, values), and runs it.
  void run(const Call& call, Tensor* caches, const float* x, float* out) const override {
    GqaBlock b = block_;
    const CachePlan plan = bind_call(b, call, caches[0], /*interleaved=*/false);
    STD_TORCH_CHECK(b.rotation.rope_dim <= b.head_dim, "cos is wider than a head");
    b.keys = kv_store(caches[0], plan.batches, b.kv_heads, plan.positions, b.head_dim, "keys"),
    b.values = kv_store(caches[1], plan.batches, b.kv_heads, plan.positions, b.head_dim, "values");
    b.x = x, b.out = out;
    with_norm_and_residual(b, pre_norm_, b.batches * b.length, b.hidden, gqa_block);
  }

 private:
  GqaBlock block_{};
};

// A MoE layer or a plain gated MLP, which is a MoE layer with a shared expert only.
class MoeStep : public Step {
 public:
  // Reads the matrices in the order in which Python lists them. sizes: hidden, routed experts, their inner width, inner
  // width of the shared expert; 0 experts or width 0: there are none. counts: see optional_stats.
  MoeStep(const Tensors& packed, const Ints& descriptors, const Ints& sizes, const Optional& router_bias,
      const Optional& correction, const RouteCall& route, Activation act, double alpha, double limit,
      const Optional& counts, const Optional& pre_norm, double eps, bool plus_one)
      : Step(sizes[0], pre_norm, eps, plus_one) {
    const int64_t experts = sizes[1], ff = sizes[2], shared_ff = sizes[3];
    MatrixReader matrices(packed, descriptors);
    MoeBlock& b = block_;
    for (ExpertsCall* expert_call : {&b.experts, &b.shared})
      expert_call->hidden = hidden, expert_call->act = act, expert_call->alpha = float(alpha),
      expert_call->limit = float(limit);
    if (experts) {
      b.router = matrices.projection(hidden, "router");
      STD_TORCH_CHECK(b.router.rows() == experts, "the router has ", b.router.rows(), " rows for ", experts,
          " experts");
      set_bias(b.router, router_bias, "router_bias");
      b.route = route, b.route.bias = optional_float_data(correction, experts, "correction");
      b.experts.top = route.top, b.experts.inner = ff, b.experts.experts = experts;
      b.experts.stats = optional_stats(counts, experts);
      b.experts.gate = matrices.experts(experts, ff, hidden, "gate"),
      b.experts.up = matrices.experts(experts, ff, hidden, "up");
      b.experts.down = matrices.experts(experts, hidden, ff, "down");
    }
    if (shared_ff) {
      b.shared.inner = shared_ff, b.shared.top = b.shared.experts = 1;
      b.shared.gate = matrices.experts(1, shared_ff, hidden, "shared gate"),
      b.shared.up = matrices.experts(1, shared_ff, hidden, "shared up");
      b.shared.down = matrices.experts(1, hidden, shared_ff, "shared down");
      b.shared_gate = matrices.projection(hidden, "shared_expert_gate");
      STD_TORCH_CHECK(b.shared_gate.rows() <= 1, "shared_expert_gate has more than one row");
    }
    retain(packed), retain({&router_bias, &correction, &counts});
  }
  // Completes a copy of the block with the call's tokens, and runs it; there are no cache tensors.
  void run(const Call& call, Tensor*, const float* x, float* out) const override {
    MoeBlock b = block_;
    b.experts.tokens = b.shared.tokens = call.batches * call.length;
    b.x = x, b.out = out;
    with_norm_and_residual(b, pre_norm_, b.experts.tokens, hidden, moe_block);
  }

 private:
  MoeBlock block_{};
};

// The registry of steps by id: ids, because the stable ABI has no classes of its own as arguments. A call holds shared
// pointers to its steps, so they may be erased meanwhile.
class StepRegistry {
 public:
  using Factory = std::function<std::shared_ptr<const Step>()>;
  int64_t add(Factory factory) {
    auto step = factory();
    std::lock_guard<std::mutex> lock(mutex_);
    entries_.emplace(++last_id_, Entry{std::move(factory), std::move(step)});
    return last_id_;
  }
  void erase(int64_t id) {
    Entry erased;  // its tensors are freed after the lock is released
    std::lock_guard<std::mutex> lock(mutex_);
    if (const auto at = entries_.find(id); at != entries_.end()) erased = std::move(at->second), entries_.erase(at);
  }
  // Returns the steps of `ids`, in order, each rebuilt if memory that it reads has moved; an error for an unknown id.
  std::vector<std::shared_ptr<const Step>> find_current(const Ints& ids) {
    std::lock_guard<std::mutex> lock(mutex_);
    std::vector<std::shared_ptr<const Step>> result;
    for (int64_t id : ids) {
      const auto at = entries_.find(id);
      STD_TORCH_CHECK(at != entries_.end(), "there is no step ", id);
      if (at->second.step->moved()) at->second.step = at->second.factory();
      result.push_back(at->second.step);
    }
    return result;
  }
  void lock() { mutex_.lock(); }
  void unlock() { mutex_.unlock(); }

 private:
  struct Entry {
    Factory factory;
    std::shared_ptr<const Step> step;
  };
  std::mutex mutex_;
  std::unordered_map<int64_t, Entry> entries_;
  int64_t last_id_ = 0;
};
StepRegistry& registry() {
  static StepRegistry* steps = new StepRegistry;  // never destroyed at exit, because torch may be unloaded first
  return *steps;
}
// A fork takes the lock (held for microseconds), so the child inherits a consistent registry and an open lock.
[[maybe_unused]] const int at_fork = pthread_atfork([] { registry().lock(); }, [] { registry().unlock(); },
    [] { registry().unlock(); });

// Checks that `sizes` has `count` values, the first `positive` of them positive and the others not negative.
void check_sizes(const Ints& sizes, size_t count, size_t positive) {
  STD_TORCH_CHECK(sizes.size() == count, "a step of this kind has ", count, " sizes, found ", sizes.size());
  for (size_t i = 0; i < count; ++i)
    STD_TORCH_CHECK(sizes[i] >= (i < positive ? 1 : 0), "size ", i, " of a step is ", sizes[i]);
}

// Registers an absorbed MLA attention module as a step that run_steps can run, and returns its id. The arguments of
// mla_step, gqa_step and moe_step are those of the step's class. They register a factory with copies of the arguments,
// because the registry rebuilds a step whose tensors have moved.
int64_t mla_step(Tensors packed, Ints descriptors, Ints sizes, const Optional& q_norm, const Optional& kv_norm,
    bool interleaved, Doubles scalars, const Optional& pre_norm, double eps, bool plus_one) {
  check_sizes(sizes, 6, 6);
  STD_TORCH_CHECK(scalars.size() == 3, "numbers are two epsilons and a scale");
  return registry().add([=] {
    return std::make_shared<MlaStep>(packed, descriptors, sizes, q_norm, kv_norm, interleaved, scalars, pre_norm, eps,
        plus_one);
  });
}

// Registers a GQA attention module as a step that run_steps can run, and returns its id; see mla_step.
int64_t gqa_step(Tensors packed, Ints descriptors, Ints sizes, const Optional& q_bias, const Optional& k_bias,
    const Optional& v_bias, const Optional& o_bias, const Optional& q_norm, const Optional& k_norm, bool norm_all,
    bool norm_plus_one, const Optional& sinks, Doubles scalars, const Optional& pre_norm, double eps, bool plus_one) {
  check_sizes(sizes, 3, 3);
  STD_TORCH_CHECK(scalars.size() == 4, "numbers are two epsilons, a scale and a cap");
  return registry().add([=] {
    return std::make_shared<GqaStep>(packed, descriptors, sizes, q_bias, k_bias, v_bias, o_bias, q_norm, k_norm,
        norm_all, norm_plus_one, sinks, scalars, pre_norm, eps, plus_one);
  });
}

// Registers a MoE layer or a plain gated MLP as a step that run_steps can run, and returns its id; see mla_step. Takes
// the strings before it makes the factory, because a string argument can be taken only once.
int64_t moe_step(Tensors packed, Ints descriptors, Ints sizes, const Optional& router_bias, const Optional& correction,
    int64_t top, StringHandle scoring_word, StringHandle group_word, int64_t n_group, int64_t topk_group, bool renorm,
    double scale, StringHandle act_word, double alpha, double limit, const Optional& counts, const Optional& pre_norm,
    double eps, bool plus_one) {
  const std::string scoring = take_string(scoring_word), group_mode = take_string(group_word),
                    act = take_string(act_word);
  check_sizes(sizes, 4, 1);
  STD_TORCH_CHECK((sizes[1] > 0) == (sizes[2] > 0) && sizes[1] + sizes[3] > 0,
      "experts have a width, or there is a layer that all tokens pass");
  const RouteCall route = sizes[1]
      ? make_route_call(scoring, group_mode, nullptr, sizes[1], top, n_group, topk_group, renorm, scale)
      : RouteCall{};
  return registry().add([=] {
    return std::make_shared<MoeStep>(packed, descriptors, sizes, router_bias, correction, route, parse_activation(act),
        alpha, limit, counts, pre_norm, eps, plus_one);
  });
}

void erase_step(int64_t id) { registry().erase(id); }

// Runs steps in order on x, each on the result of the step before. Each of `outs` receives the result of one or two
// consecutive steps (attention and MLP of a layer). `caches`: two tensors per attention step, in order.
void run_steps(const Tensor& x, Tensors outs, Ints step_ids, Tensors caches, int64_t past, const Optional& cos,
    const Optional& sin, const Optional& ranges, const Optional& mask, const Optional& sequences, const Optional& pages,
    const Optional& slots) {
  const auto is_activation = [](const Tensor& t) {
    return t.dim() == 3 && t.is_contiguous() && t.scalar_type() == ScalarType::Float;
  };
  STD_TORCH_CHECK(is_activation(x), "x must be contiguous float32 [batch, length, hidden]");
  STD_TORCH_CHECK(past >= 0 && !outs.empty() && (step_ids.size() == outs.size() || step_ids.size() == 2 * outs.size()),
      step_ids.size(), " steps after ", past, " positions for ", outs.size(), " results");
  for (const Tensor& out : outs)
    STD_TORCH_CHECK(is_activation(out) && out.size(0) == x.size(0) && out.size(1) == x.size(1) &&
            out.size(2) == x.size(2),
        "a result must have the shape and type of x");
  const auto steps = registry().find_current(step_ids);
  size_t needed_caches = 0;
  for (const auto& step : steps) {
    STD_TORCH_CHECK(step->hidden == x.size(2), "x has ", x.size(2), " columns, a step takes ", step->hidden);
    needed_caches += step->num_caches();
  }
  STD_TORCH_CHECK(caches.size() == needed_caches, "the steps keep ", needed_caches, " tensors, found ", caches.size());
  if (!x.numel()) return;
  const Call call{x, cos, sin, ranges, mask, sequences, pages, slots, past, x.size(0), x.size(1)};
  thread_local std::vector<float> intermediate;
  const size_t steps_per_out = steps.size() / outs.size();
  if (steps_per_out > 1) intermediate.resize(size_t(x.numel()));
  const float* input = static_cast<const float*>(x.const_data_ptr());
  Tensor* step_caches = caches.data();
  for (size_t i = 0; i < steps.size(); ++i) {
    float* output = (i + 1) % steps_per_out ? intermediate.data()
                                            : static_cast<float*>(outs[i / steps_per_out].mutable_data_ptr());
    steps[i]->run(call, step_caches, input, output);
    input = output, step_caches += steps[i]->num_caches();
  }
}
}  // namespace

// The schemas of this file's operators.
STABLE_TORCH_LIBRARY_FRAGMENT(ktx, m) {
  m.def(
      "mla_step(Tensor[] packed, int[] about, int[] sizes, Tensor? q_norm, Tensor? kv_norm, bool interleaved, "
      "float[] numbers, Tensor? before=None, float before_eps=0.0, "
      "bool before_plus_one=False) -> int");
  m.def(
      "gqa_step(Tensor[] packed, int[] about, int[] sizes, Tensor? q_bias, Tensor? k_bias, Tensor? v_bias, "
      "Tensor? o_bias, Tensor? q_norm, Tensor? k_norm, bool norm_all, bool norm_plus_one, Tensor? sinks, "
      "float[] numbers, Tensor? before=None, float before_eps=0.0, "
      "bool before_plus_one=False) -> int");
  m.def(
      "moe_step(Tensor[] packed, int[] about, int[] sizes, Tensor? router_bias, Tensor? correction, int top, "
      "str scoring, str group_mode, int n_group, int topk_group, bool renorm, float scale, str act, float alpha, "
      "float limit, Tensor? counts=None, Tensor? before=None, float before_eps=0.0, "
      "bool before_plus_one=False) -> int");
  m.def("erase_step(int number) -> ()");
  m.def(
      "run_steps(Tensor x, Tensor(a!)[] outs, int[] steps, Tensor(b!)[] kept, int past=0, Tensor? cos=None, "
      "Tensor? sin=None, Tensor? ranges=None, Tensor? mask=None, Tensor? sequences=None, Tensor? pages=None, "
      "Tensor? slots=None) -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(ktx, CompositeExplicitAutograd, m) { m.impl("erase_step", TORCH_BOX(&erase_step)); }
STABLE_TORCH_LIBRARY_IMPL(ktx, CPU, m) {
  m.impl("mla_step", TORCH_BOX(&mla_step));
  m.impl("gqa_step", TORCH_BOX(&gqa_step));
  m.impl("moe_step", TORCH_BOX(&moe_step));
  m.impl("run_steps", TORCH_BOX(&run_steps));
}
