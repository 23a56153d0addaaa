// Fused modules, and sequences of them, as torch operators; see bindings.cpp. A module is registered as a step once: a list of its packed matrices and
// a flat list of their descriptors (number of parts; type code and rows of each; see WeightDescriptor in ktx/ops/fusion/fused.py). A call then passes
// step ids and tokens only, so that it has few arguments to convert.
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

// Reads matrices from the front of the lists.
class Matrices {
 public:
  Matrices(const Tensors& packed, const Ints& about) : packed_(packed), about_(about) {}
  // `about` (the descriptor): the number of parts of the projection, then type code and rows of each.
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

RopeTables rotation(const Tensor& cos, const Tensor& sin, int64_t batches, int64_t length, bool interleaved) {
  STD_TORCH_CHECK(cos.dim() == 3 && cos.size(1) == length && cos.size(2) % 2 == 0 && (cos.size(0) == 1 || cos.size(0) == batches), "cos does not fit x");
  const int64_t count = cos.size(0) * length * cos.size(2);
  return {floats(cos, count, "cos"), floats(sin, count, "sin"), cos.size(2), cos.size(0) == 1 ? 0 : length * cos.size(2), interleaved};
}

KVStore cached(const Tensor& t, int64_t batches, int64_t heads, int64_t positions, int64_t columns, const char* what) {
  STD_TORCH_CHECK(t.dim() == 4 && t.size(0) == batches && t.size(1) == heads && t.size(2) >= positions && columns_of(t, what) == columns,
                  what, " must be [", batches, ", ", heads, ", at least ", positions, ", ", columns, "]");
  return {strided(t, what, true)};
}

// Where a block's tokens are stored and what they attend to: `past` positions of each batch and the new tokens, or slots and sequences on pages.
struct Past {
  KVSlots slots;
  int64_t batches, positions;  // minimum sizes of the cache tensors
  std::optional<Ragged> ragged;
  Past(const Tensor& x, int64_t past, const Tensor& kept, const Optional& sequences, const Optional& pages, const Optional& slots) : slots{past, x.size(1), nullptr, 0} {
    batches = x.size(0), positions = past + x.size(1);
    if (!sequences) return;
    STD_TORCH_CHECK(x.size(0) == 1, "sequences on pages come as one batch, found ", x.size(0));
    ragged.emplace(*sequences, pages, kept, x.size(1));
    this->slots.slots = slots_of(slots, x.size(1), kept), this->slots.page = ragged->page;
    batches = kept.size(0), positions = this->slots.page;
  }
  void put(AttentionCall& c, const Optional& ranges, const Optional& mask) const {
    c.keys = positions;
    if (ragged) ragged->put(c);
    set_masks(c, ranges, mask);
  }
};

// Arguments that the steps of a call share.
struct Call {
  const Tensor& x;  // f32 [batches, length, hidden], of the first step; later ones have the same shape
  const Optional &cos, &sin, &ranges, &mask, &sequences, &pages, &slots;
  int64_t past, batches, length;
};

// A step: everything that does not depend on tokens. It owns the tensors that it reads, and remembers their addresses, because torch moves the memory of a
// tensor in place when it shares the tensor with another process.
class Step {
 public:
  Step(int64_t hidden, const Optional& pre_norm, double eps, bool plus_one) : hidden(hidden), pre_norm_{optional_floats(pre_norm, hidden, "before"), float(eps), plus_one} { hold({&pre_norm}); }
  virtual ~Step() = default;
  bool moved() const {
    for (const auto& [tensor, address] : held_)
      if (tensor.const_data_ptr() != address) return true;
    return false;
  }
  virtual size_t keeps() const { return 0; }  // number of cache tensors that it writes
  virtual void run(const Call& call, Tensor* kept, const float* x, float* out) const = 0;
  const int64_t hidden;

 protected:
  void hold(const Tensors& tensors) {
    for (const Tensor& t : tensors) held_.emplace_back(t, t.const_data_ptr());
  }
  void hold(std::initializer_list<const Optional*> tensors) {
    for (const Optional* t : tensors)
      if (*t) held_.emplace_back(**t, (*t)->const_data_ptr());
  }
  Norm pre_norm_;

 private:
  std::vector<std::pair<Tensor, const void*>> held_;
};

// Sets the arguments of a block that attends and stores its tokens in a cache like `kept`. The result must live until the block has run.
template <class B>
Past place(B& b, const Call& call, const Tensor& kept, bool interleaved) {
  STD_TORCH_CHECK(kept.dim() == 4 && call.cos && call.sin, "a cache [batch, heads, positions, columns], cos and sin are needed");
  b.batches = call.batches, b.length = call.length;
  Past where(call.x, call.past, kept, call.sequences, call.pages, call.slots);
  b.slots = where.slots;
  b.rotation = rotation(*call.cos, *call.sin, b.batches, b.length, interleaved);
  b.masks.batches = b.batches, b.masks.queries = b.length;
  where.put(b.masks, call.ranges, call.mask);
  return where;
}

class MlaStep : public Step {
 public:
  MlaStep(const Tensors& packed, const Ints& about, const Ints& sizes, const Optional& q_norm, const Optional& kv_norm, bool interleaved, const Doubles& numbers,
          const Optional& pre_norm, double eps, bool plus_one)
      : Step(sizes[0], pre_norm, eps, plus_one), turned_(sizes[5]), interleaved_(interleaved) {
    MlaBlock& b = block_;
    b.hidden = sizes[0], b.heads = sizes[1], b.nope = sizes[2], b.values = sizes[3], b.rank = sizes[4];
    Matrices matrices(packed, about);
    b.q_a = matrices.projection(b.hidden, "q_a_proj");
    b.q = matrices.projection(b.q_a.rows() ? b.q_a.rows() : b.hidden, "q_proj");
    b.kv_a = matrices.projection(b.hidden, "kv_a_proj");
    b.o = matrices.projection(b.heads * b.values, "o_proj");
    STD_TORCH_CHECK(b.q.rows() == b.heads * (b.nope + turned_) && b.kv_a.rows() == b.rank + turned_ && b.o.rows() == b.hidden && (!b.q_a.rows() || q_norm) && kv_norm,
                    "the projections do not fit ", b.heads, " heads of ", b.nope, " + ", turned_, " columns on a latent of ", b.rank);
    const ExpertMatrix uk = matrices.experts(b.heads, b.rank, b.nope, "W_UK"), uv = matrices.experts(b.heads, b.values, b.rank, "W_UV");
    b.uk_layout = uk.layout, b.uk = uk.packed, b.uv_layout = uv.layout, b.uv = uv.packed;
    b.q_norm = {optional_floats(q_norm, b.q_a.rows(), "q_norm"), float(numbers[0]), false};
    b.kv_norm = {optional_floats(kv_norm, b.rank, "kv_norm"), float(numbers[1]), false};
    b.masks.heads = b.heads, b.masks.scale = float(numbers[2]);
    hold(packed), hold({&q_norm, &kv_norm});
  }
  size_t keeps() const override { return 2; }
  void run(const Call& call, Tensor* kept, const float* x, float* out) const override {
    MlaBlock b = block_;
    const Past where = place(b, call, kept[0], interleaved_);
    STD_TORCH_CHECK(b.rotation.rope_dim == turned_, "cos has ", b.rotation.rope_dim, " columns, ", turned_, " are turned");
    b.latent = cached(kept[0], where.batches, 1, where.positions, b.rank, "latents"), b.rope = cached(kept[1], where.batches, 1, where.positions, turned_, "ropes");
    b.x = x, b.out = out;
    with_norm_and_residual(b, pre_norm_, b.batches * b.length, b.hidden, mla_block);
  }

 private:
  MlaBlock block_{};
  int64_t turned_;
  bool interleaved_;
};

class GqaStep : public Step {
 public:
  GqaStep(const Tensors& packed, const Ints& about, const Ints& sizes, const Optional& q_bias, const Optional& k_bias, const Optional& v_bias, const Optional& o_bias,
          const Optional& q_norm, const Optional& k_norm, bool norm_all, bool norm_plus_one, const Optional& sinks, const Doubles& numbers, const Optional& pre_norm, double eps,
          bool plus_one)
      : Step(sizes[0], pre_norm, eps, plus_one) {
    GqaBlock& b = block_;
    b.hidden = sizes[0], b.kv_heads = sizes[1], b.columns = sizes[2];
    STD_TORCH_CHECK(b.kv_heads > 0 && b.columns > 0, "kv_heads and columns must be positive");
    Matrices matrices(packed, about);
    b.q = matrices.projection(b.hidden, "q_proj"), b.k = matrices.projection(b.hidden, "k_proj"), b.v = matrices.projection(b.hidden, "v_proj");
    b.o = matrices.projection(b.q.rows(), "o_proj");
    b.heads = b.q.rows() / b.columns;
    STD_TORCH_CHECK(b.q.rows() % b.columns == 0 && b.heads > 0 && b.heads % b.kv_heads == 0 && b.k.rows() == b.kv_heads * b.columns && b.v.rows() == b.k.rows() && b.o.rows() == b.hidden,
                    "the projections do not fit ", b.kv_heads, " key/value heads of ", b.columns, " columns");
    set_bias(b.q, q_bias, "q_bias"), set_bias(b.k, k_bias, "k_bias"), set_bias(b.v, v_bias, "v_bias"), set_bias(b.o, o_bias, "o_bias");
    b.norm_all = norm_all;
    b.q_norm = {optional_floats(q_norm, norm_all ? b.q.rows() : b.columns, "q_norm"), float(numbers[0]), norm_plus_one};
    b.k_norm = {optional_floats(k_norm, norm_all ? b.k.rows() : b.columns, "k_norm"), float(numbers[1]), norm_plus_one};
    b.masks.heads = b.heads, b.masks.scale = float(numbers[2]), b.masks.softcap = float(numbers[3]);
    b.masks.sinks = optional_floats(sinks, b.heads, "sinks");
    hold(packed), hold({&q_bias, &k_bias, &v_bias, &o_bias, &q_norm, &k_norm, &sinks});
  }
  size_t keeps() const override { return 2; }
  void run(const Call& call, Tensor* kept, const float* x, float* out) const override {
    GqaBlock b = block_;
    const Past where = place(b, call, kept[0], false);
    STD_TORCH_CHECK(b.rotation.rope_dim <= b.columns, "cos is wider than a head");
    b.keys = cached(kept[0], where.batches, b.kv_heads, where.positions, b.columns, "keys"), b.values = cached(kept[1], where.batches, b.kv_heads, where.positions, b.columns, "values");
    b.x = x, b.out = out;
    with_norm_and_residual(b, pre_norm_, b.batches * b.length, b.hidden, gqa_block);
  }

 private:
  GqaBlock block_{};
};

class MoeStep : public Step {
 public:
  MoeStep(const Tensors& packed, const Ints& about, const Ints& sizes, const Optional& router_bias, const Optional& correction, const RouteCall& route, Activation act, double alpha,
          double limit, const Optional& counts, const Optional& pre_norm, double eps, bool plus_one)
      : Step(sizes[0], pre_norm, eps, plus_one) {
    const int64_t experts = sizes[1], ff = sizes[2], shared_ff = sizes[3];
    Matrices matrices(packed, about);
    MoeBlock& b = block_;
    for (ExpertsCall* e : {&b.experts, &b.shared}) e->hidden = hidden, e->act = act, e->alpha = float(alpha), e->limit = float(limit);
    if (experts) {
      b.router = matrices.projection(hidden, "router");
      STD_TORCH_CHECK(b.router.rows() == experts, "the router has ", b.router.rows(), " rows for ", experts, " experts");
      set_bias(b.router, router_bias, "router_bias");
      b.route = route, b.route.bias = optional_floats(correction, experts, "correction");
      b.experts.top = route.top, b.experts.inner = ff, b.experts.experts = experts;
      b.experts.stats = optional_stats(counts, experts);
      b.experts.gate = matrices.experts(experts, ff, hidden, "gate"), b.experts.up = matrices.experts(experts, ff, hidden, "up");
      b.experts.down = matrices.experts(experts, hidden, ff, "down");
    }
    if (shared_ff) {
      b.shared.inner = shared_ff, b.shared.top = b.shared.experts = 1;
      b.shared.gate = matrices.experts(1, shared_ff, hidden, "shared gate"), b.shared.up = matrices.experts(1, shared_ff, hidden, "shared up");
      b.shared.down = matrices.experts(1, hidden, shared_ff, "shared down");
      b.shared_gate = matrices.projection(hidden, "shared_expert_gate");
      STD_TORCH_CHECK(b.shared_gate.rows() <= 1, "shared_expert_gate has more than one row");
    }
    hold(packed), hold({&router_bias, &correction, &counts});
  }
  void run(const Call& call, Tensor*, const float* x, float* out) const override {
    MoeBlock b = block_;
    b.experts.tokens = b.shared.tokens = call.batches * call.length;
    b.x = x, b.out = out;
    with_norm_and_residual(b, pre_norm_, b.experts.tokens, hidden, moe_block);
  }

 private:
  MoeBlock block_{};
};

// The registry of steps by id. A step is rebuilt if memory that it reads has moved. A call holds shared pointers to its steps, so they may be erased meanwhile.
class Steps {
 public:
  using Make = std::function<std::shared_ptr<const Step>()>;
  int64_t add(Make make) {
    auto step = make();
    std::lock_guard<std::mutex> lock(mutex_);
    known_.emplace(++last_, Known{std::move(make), std::move(step)});
    return last_;
  }
  void forget(int64_t number) {
    Known gone;  // its tensors are freed after the lock is released
    std::lock_guard<std::mutex> lock(mutex_);
    if (const auto at = known_.find(number); at != known_.end()) gone = std::move(at->second), known_.erase(at);
  }
  std::vector<std::shared_ptr<const Step>> find(const Ints& numbers) {
    std::lock_guard<std::mutex> lock(mutex_);
    std::vector<std::shared_ptr<const Step>> found;
    for (int64_t number : numbers) {
      const auto at = known_.find(number);
      STD_TORCH_CHECK(at != known_.end(), "there is no step ", number);
      if (at->second.step->moved()) at->second.step = at->second.make();
      found.push_back(at->second.step);
    }
    return found;
  }
  void lock() { mutex_.lock(); }
  void unlock() { mutex_.unlock(); }

 private:
  struct Known {
    Make make;
    std::shared_ptr<const Step> step;
  };
  std::mutex mutex_;
  std::unordered_map<int64_t, Known> known_;
  int64_t last_ = 0;
};
Steps& known() {
  static Steps* steps = new Steps;  // never destroyed at exit, because torch may be unloaded first
  return *steps;
}
// A fork takes the lock (held for microseconds), so the child inherits a consistent registry and an open lock.
[[maybe_unused]] const int at_fork = pthread_atfork([] { known().lock(); }, [] { known().unlock(); }, [] { known().unlock(); });

void check_sizes(const Ints& sizes, size_t count, size_t positive) {
  STD_TORCH_CHECK(sizes.size() == count, "a step of this kind has ", count, " sizes, found ", sizes.size());
  for (size_t i = 0; i < count; ++i) STD_TORCH_CHECK(sizes[i] >= (i < positive ? 1 : 0), "size ", i, " of a step is ", sizes[i]);
}

int64_t mla_step(Tensors packed, Ints about, Ints sizes, const Optional& q_norm, const Optional& kv_norm, bool interleaved, Doubles numbers, const Optional& pre_norm, double eps, bool plus_one) {
  check_sizes(sizes, 6, 6);
  STD_TORCH_CHECK(numbers.size() == 3, "numbers are two epsilons and a scale");
  return known().add([=] { return std::make_shared<MlaStep>(packed, about, sizes, q_norm, kv_norm, interleaved, numbers, pre_norm, eps, plus_one); });
}

int64_t gqa_step(Tensors packed, Ints about, Ints sizes, const Optional& q_bias, const Optional& k_bias, const Optional& v_bias, const Optional& o_bias, const Optional& q_norm,
                 const Optional& k_norm, bool norm_all, bool norm_plus_one, const Optional& sinks, Doubles numbers, const Optional& pre_norm, double eps, bool plus_one) {
  check_sizes(sizes, 3, 3);
  STD_TORCH_CHECK(numbers.size() == 4, "numbers are two epsilons, a scale and a cap");
  return known().add([=] { return std::make_shared<GqaStep>(packed, about, sizes, q_bias, k_bias, v_bias, o_bias, q_norm, k_norm, norm_all, norm_plus_one, sinks, numbers, pre_norm, eps, plus_one); });
}

int64_t moe_step(Tensors packed, Ints about, Ints sizes, const Optional& router_bias, const Optional& correction, int64_t top, StringHandle scoring_word, StringHandle group_word,
                 int64_t n_group, int64_t topk_group, bool renorm, double scale, StringHandle act_word, double alpha, double limit, const Optional& counts, const Optional& pre_norm,
                 double eps, bool plus_one) {
  const std::string scoring = text_of(scoring_word), group_mode = text_of(group_word), act = text_of(act_word);
  check_sizes(sizes, 4, 1);
  STD_TORCH_CHECK((sizes[1] > 0) == (sizes[2] > 0) && sizes[1] + sizes[3] > 0, "experts have a width, or there is a layer that all tokens pass");
  const RouteCall route = sizes[1] ? route_style(scoring, group_mode, nullptr, sizes[1], top, n_group, topk_group, renorm, scale) : RouteCall{};
  return known().add([=] { return std::make_shared<MoeStep>(packed, about, sizes, router_bias, correction, route, activation(act), alpha, limit, counts, pre_norm, eps, plus_one); });
}

void erase_step(int64_t number) { known().forget(number); }

// Runs steps in order on x. Each of `outs` receives the result of one or two consecutive steps. `kept`: two cache tensors per step that attends.
void run_steps(const Tensor& x, Tensors outs, Ints numbers, Tensors kept, int64_t past, const Optional& cos, const Optional& sin, const Optional& ranges, const Optional& mask,
               const Optional& sequences, const Optional& pages, const Optional& slots) {
  const auto is_activation = [](const Tensor& t) { return t.dim() == 3 && t.is_contiguous() && t.scalar_type() == ScalarType::Float; };
  STD_TORCH_CHECK(is_activation(x), "x must be contiguous float32 [batch, length, hidden]");
  STD_TORCH_CHECK(past >= 0 && !outs.empty() && (numbers.size() == outs.size() || numbers.size() == 2 * outs.size()), numbers.size(), " steps after ", past, " positions for ", outs.size(), " results");
  for (const Tensor& out : outs)
    STD_TORCH_CHECK(is_activation(out) && out.size(0) == x.size(0) && out.size(1) == x.size(1) && out.size(2) == x.size(2), "a result must have the shape and type of x");
  const auto steps = known().find(numbers);
  size_t need = 0;
  for (const auto& step : steps) {
    STD_TORCH_CHECK(step->hidden == x.size(2), "x has ", x.size(2), " columns, a step takes ", step->hidden);
    need += step->keeps();
  }
  STD_TORCH_CHECK(kept.size() == need, "the steps keep ", need, " tensors, found ", kept.size());
  if (!x.numel()) return;
  const Call call{x, cos, sin, ranges, mask, sequences, pages, slots, past, x.size(0), x.size(1)};
  thread_local std::vector<float> between;
  const size_t each = steps.size() / outs.size();
  if (each > 1) between.resize(size_t(x.numel()));
  const float* from = static_cast<const float*>(x.const_data_ptr());
  Tensor* own = kept.data();
  for (size_t i = 0; i < steps.size(); ++i) {
    float* to = (i + 1) % each ? between.data() : static_cast<float*>(outs[i / each].mutable_data_ptr());
    steps[i]->run(call, own, from, to);
    from = to, own += steps[i]->keeps();
  }
}
}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(ktx, m) {
  m.def("mla_step(Tensor[] packed, int[] about, int[] sizes, Tensor? q_norm, Tensor? kv_norm, bool interleaved, float[] numbers, Tensor? before=None, float before_eps=0.0, "
        "bool before_plus_one=False) -> int");
  m.def("gqa_step(Tensor[] packed, int[] about, int[] sizes, Tensor? q_bias, Tensor? k_bias, Tensor? v_bias, Tensor? o_bias, Tensor? q_norm, Tensor? k_norm, bool norm_all, "
        "bool norm_plus_one, Tensor? sinks, float[] numbers, Tensor? before=None, float before_eps=0.0, bool before_plus_one=False) -> int");
  m.def("moe_step(Tensor[] packed, int[] about, int[] sizes, Tensor? router_bias, Tensor? correction, int top, str scoring, str group_mode, int n_group, int topk_group, bool renorm, "
        "float scale, str act, float alpha, float limit, Tensor? counts=None, Tensor? before=None, float before_eps=0.0, bool before_plus_one=False) -> int");
  m.def("erase_step(int number) -> ()");
  m.def("run_steps(Tensor x, Tensor(a!)[] outs, int[] steps, Tensor(b!)[] kept, int past=0, Tensor? cos=None, Tensor? sin=None, Tensor? ranges=None, Tensor? mask=None, "
        "Tensor? sequences=None, Tensor? pages=None, Tensor? slots=None) -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(ktx, CompositeExplicitAutograd, m) { m.impl("erase_step", TORCH_BOX(&erase_step)); }
STABLE_TORCH_LIBRARY_IMPL(ktx, CPU, m) {
  m.impl("mla_step", TORCH_BOX(&mla_step));
  m.impl("gqa_step", TORCH_BOX(&gqa_step));
  m.impl("moe_step", TORCH_BOX(&moe_step));
  m.impl("run_steps", TORCH_BOX(&run_steps));
}
