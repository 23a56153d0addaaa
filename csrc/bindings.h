// Shared by all binding files: checks of tensors and conversions of arguments.
#pragma once
#include <torch/csrc/stable/c/shim.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <initializer_list>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "cpu/driver/attention.h"
#include "cpu/driver/experts.h"
#include "cpu/isa/kernels.h"
#include "cpu/quant/layout.h"
#include "cpu/runtime/numa.h"
#include "cpu/quant/dtype.h"
#include "cpu/driver/elementwise.h"

inline ktx::DType dtype_of(const torch::stable::Tensor& t) {
  using torch::headeronly::ScalarType;
  const ScalarType type = t.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::Half || type == ScalarType::BFloat16,
      "activations must be float32, float16 or bfloat16");
  return type == ScalarType::Float ? ktx::DType::F32 : type == ScalarType::Half ? ktx::DType::F16 : ktx::DType::BF16;
}

namespace ktx {
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Optional = std::optional<Tensor>;
using Ints = std::vector<int64_t>;

// Returns the layout of a type code, after a check that it packs rows of k columns.
inline const Layout& layout_of(int64_t code, int64_t k) {
  const Layout* layout = find_layout(int(code));
  STD_TORCH_CHECK(layout, "no weight type has the code ", code);
  STD_TORCH_CHECK(k > 0 && k % layout->block == 0, layout->name, " packs rows in blocks of ", layout->block,
      ", a row of ", k, " does not fit");
  return *layout;
}

// Returns the data of `matrices` packed [n, k] matrices, after a check of their size. `what` names the argument in
// errors, here and below.
inline const uint8_t* packed_data(const Tensor& packed, const Layout& layout, int64_t matrices, int64_t n, int64_t k,
    const char* what) {
  STD_TORCH_CHECK(packed.scalar_type() == ScalarType::Byte && packed.is_contiguous(), what,
      " must be a contiguous uint8 tensor");
  const int64_t expected_bytes = matrices * int64_t(packed_bytes(layout, n, k));
  STD_TORCH_CHECK(packed.numel() == expected_bytes, what, " holds ", packed.numel(), " bytes, ", matrices, " x [", n,
      ", ", k, "] of ", layout.name, " takes ", expected_bytes);
  return static_cast<const uint8_t*>(packed.const_data_ptr());
}

// Returns the data of a contiguous f32 tensor of `count` elements, after a check; null for a missing optional one.
inline const float* float_data(const Tensor& t, int64_t count, const char* what) {
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Float && t.is_contiguous() && t.numel() == count, what, " must be ",
      count, " contiguous float32");
  return static_cast<const float*>(t.const_data_ptr());
}

inline const float* optional_float_data(const Optional& t, int64_t count, const char* what) {
  return t ? float_data(*t, count, what) : nullptr;
}

// Returns the counters to which a call of experts adds its statistics: they are the elements of `t`, int64 [experts + 2
// + nodes], in the order of ExpertStats. None without `t`.
inline ExpertStats optional_stats(const Optional& t, int64_t experts) {
  if (!t) return {};
  STD_TORCH_CHECK(t->scalar_type() == ScalarType::Long && t->is_contiguous() && t->numel() == experts + 2 + nodes(),
      "counts must be ", experts + 2 + nodes(), " contiguous int64");
  int64_t* first = static_cast<int64_t*>(t->mutable_data_ptr());
  return {first, first + experts, first + experts + 1, first + experts + 2};
}

// Describes a [batch, head, position, column] tensor (a 3-D one has a single head); columns must be dense. `is_cache`:
// a uint8 tensor is taken as Q8_0 blocks, as keys and values are cached.
inline Strided strided(const Tensor& t, const char* what, bool is_cache = false) {
  STD_TORCH_CHECK((t.dim() == 3 || t.dim() == 4) && (t.size(t.dim() - 1) == 1 || t.stride(t.dim() - 1) == 1), what,
      " must have dense columns");
  const bool heads = t.dim() == 4, blocks = is_cache && t.scalar_type() == ScalarType::Byte;
  return {t.const_data_ptr(), blocks ? DType::Q8_0 : dtype_of(t), t.stride(0), heads ? t.stride(1) : 0,
      t.stride(heads ? 2 : 1)};
}

// Returns the number of columns of keys or values: the size of the last dimension, or what its Q8_0 blocks hold.
inline int64_t num_columns(const Tensor& t, const char* what) {
  const int64_t row_size = t.size(t.dim() - 1);
  if (t.scalar_type() != ScalarType::Byte) return row_size;
  STD_TORCH_CHECK(row_size % Q8_BYTES == 0, what, " of ", row_size, " bytes are no whole blocks of q8_0 (", Q8_BYTES,
      " bytes for ", Q8_BLOCK, " columns)");
  return row_size / Q8_BYTES * Q8_BLOCK;
}

// Sets which keys the queries of a call attend to, after checks of shape and type: `ranges` [batch, query, (first,
// end)], or a bool or additive mask with broadcast dimensions, or neither: causal. Sizes and sequences of the call must
// be set.
inline void set_masks(AttentionCall& c, const Optional& ranges, const Optional& mask) {
  STD_TORCH_CHECK(!(ranges && mask), "give ranges or a mask, not both");
  STD_TORCH_CHECK(!(mask && c.sequences), "sequences on pages take ranges, no mask");
  STD_TORCH_CHECK(ranges || mask || c.sequences || c.queries <= c.keys, "without ranges the ", c.queries,
      " queries must be the last of the ", c.keys, " keys");
  if (ranges) {
    STD_TORCH_CHECK(ranges->scalar_type() == ScalarType::Int && ranges->is_contiguous() &&
            ranges->numel() == c.batches * c.queries * 2,
        "ranges must be contiguous int32 [batch, queries, 2]");
    c.key_ranges = static_cast<const int32_t*>(ranges->const_data_ptr());
  }
  if (!mask) return;
  STD_TORCH_CHECK(mask->dim() == 4, "mask must be [batch or 1, heads or 1, queries, keys]");
  const int64_t expected[4] = {c.batches, c.heads, c.queries, c.keys};
  int64_t* strides[4] = {&c.mask_batch, &c.mask_head, &c.mask_query, &c.mask_key};
  for (int i = 0; i < 4; ++i) {
    STD_TORCH_CHECK(mask->size(i) == expected[i] || mask->size(i) == 1, "mask has ", mask->size(i), " at dimension ", i,
        ", attention has ", expected[i]);
    *strides[i] = mask->size(i) == 1 ? 0 : mask->stride(i);
  }
  if (mask->scalar_type() == ScalarType::Bool) c.bool_mask = static_cast<const bool*>(mask->const_data_ptr());
  else {
    STD_TORCH_CHECK(mask->scalar_type() == ScalarType::Float, "mask must be bool or float32");
    c.additive_mask = static_cast<const float*>(mask->const_data_ptr());
  }
}

// The sequences of a ragged call, whose keys are on pages of `pool`, after a check of every index: sequences int64
// [count, 3] (first query, number of queries, number of keys), pages int32 [count, max_pages] in order. The call points
// into this object.
struct Ragged {
  std::vector<Sequence> sequences;
  int64_t page = 0;
  // Copies the sequences. Checks that their queries, keys and pages are in bounds, because the kernels do not.
  Ragged(const Tensor& sequences_, const Optional& pages, const Tensor& pool, int64_t queries) {
    STD_TORCH_CHECK(pages && pages->scalar_type() == ScalarType::Int && pages->dim() == 2 && pages->is_contiguous(),
        "pages must be contiguous int32 [sequences, most pages]");
    STD_TORCH_CHECK(sequences_.scalar_type() == ScalarType::Long && sequences_.dim() == 2 && sequences_.size(1) == 3 &&
            sequences_.is_contiguous() && sequences_.size(0) == pages->size(0),
        "sequences must be contiguous int64 [as many as pages, 3]");
    const int64_t pool_pages = pool.size(0), max_pages = pages->size(1);
    page = pool.size(pool.dim() - 2);
    STD_TORCH_CHECK(page > 0 && page % 64 == 0, "a page must hold whole blocks of 64 positions, it holds ", page);
    const int64_t* fields = static_cast<const int64_t*>(sequences_.const_data_ptr());
    const int32_t* page_ids = static_cast<const int32_t*>(pages->const_data_ptr());
    for (int64_t i = 0; i < sequences_.size(0); ++i, fields += 3, page_ids += max_pages) {
      const int64_t first = fields[0], count = fields[1], keys = fields[2];
      STD_TORCH_CHECK(first >= 0 && count > 0 && first + count <= queries && keys >= count && keys <= max_pages * page,
          "sequence ", i, " has ", count, " queries from ", first, " on and ", keys, " keys: the call has ", queries,
          " queries, and room for ", max_pages * page, " keys");
      for (int64_t j = 0; j * page < keys; ++j)
        STD_TORCH_CHECK(page_ids[j] >= 0 && page_ids[j] < pool_pages, "sequence ", i, " has page ", page_ids[j],
            ", the pool has ", pool_pages);
      sequences.push_back({first, count, keys, page_ids});
    }
  }
  // Makes `c` a ragged call.
  void apply_to(AttentionCall& c) const {
    c.sequences = sequences.data(), c.sequence_count = int64_t(sequences.size()), c.page = page;
  }
};

// Returns the slots [tokens] of a ragged call, each page index * positions per page + position, after a check that all
// are in the pool: the kernels write there unchecked.
inline const int64_t* checked_slots(const Optional& slots, int64_t tokens, const Tensor& pool) {
  STD_TORCH_CHECK(slots && slots->scalar_type() == ScalarType::Long && slots->is_contiguous() &&
          slots->numel() == tokens,
      "slots must be ", tokens, " contiguous int64");
  const int64_t* slot_ids = static_cast<const int64_t*>(slots->const_data_ptr());
  const int64_t capacity = pool.size(0) * pool.size(pool.dim() - 2);
  for (int64_t t = 0; t < tokens; ++t)
    STD_TORCH_CHECK(slot_ids[t] >= 0 && slot_ids[t] < capacity, "slot ", slot_ids[t], " of a pool of ", capacity);
  return slot_ids;
}

// Copies a str argument and deletes it, which is the callee's duty. torch's own conversion to std::string leaks a copy
// per call (2.13).
inline std::string take_string(StringHandle handle) {
  size_t length = 0;
  const char* data = nullptr;
  const bool found = torch_string_length(handle, &length) == 0 && torch_string_c_str(handle, &data) == 0;
  std::string text(found ? data : "", found ? length : 0);
  torch_delete_string(handle);
  return text;
}

// Returns the value of an option's name; an error if it has none.
template <class T>
T parse_enum(const std::string& name, std::initializer_list<std::pair<const char*, T>> known, const char* what) {
  for (const auto& [key, value] : known)
    if (name == key) return value;
  STD_TORCH_CHECK(false, what, " '", name, "' is not known");
}

// Checks the options of a router and returns them as a call without tokens, which the operator `route` and MoE steps
// complete.
inline RouteCall make_route_call(const std::string& scoring, const std::string& group_mode, const float* bias,
    int64_t experts, int64_t top_k, int64_t n_group, int64_t topk_group, bool renorm, double scale) {
  const Groups groups = parse_enum<Groups>(group_mode,
      {{"none", Groups::NONE}, {"max", Groups::MAX}, {"top2", Groups::TOP2}}, "group_mode");
  STD_TORCH_CHECK(top_k >= 1 && top_k <= experts, "top_k ", top_k, " of ", experts, " experts");
  STD_TORCH_CHECK(n_group >= 1 && experts % n_group == 0 && topk_group >= 1 && topk_group <= n_group, topk_group,
      " of ", n_group, " groups of ", experts, " experts");
  STD_TORCH_CHECK(groups == Groups::NONE || experts / n_group * topk_group >= top_k,
      "the chosen groups hold fewer than ", top_k, " experts");
  RouteCall call{};
  call.bias = bias, call.experts = experts, call.top = top_k, call.n_group = n_group, call.topk_group = topk_group,
  call.groups = groups, call.renorm = renorm, call.scale = float(scale);
  call.scoring = parse_enum<Scoring>(scoring,
      {{"softmax", Scoring::SOFTMAX}, {"sigmoid", Scoring::SIGMOID}, {"softmax_topk", Scoring::SOFTMAX_TOPK}},
      "scoring");
  return call;
}

inline Activation parse_activation(const std::string& name) {
  return parse_enum<Activation>(name,
      {{"silu", SILU}, {"gelu", GELU}, {"gelu_tanh", GELU_TANH}, {"relu", RELU}, {"relu2", RELU2},
          {"swiglu_oai", SWIGLU_OAI}},
      "activation");
}
}  // namespace ktx
