#include "cpu/driver/elementwise.h"

#include <math.h>

#include <algorithm>
#include <limits>
#include <numeric>
#include <vector>

#include "cpu/isa/kernels.h"
#include "cpu/runtime/pool.h"

namespace ktx {
namespace {
constexpr int64_t MIN_PARALLEL_ELEMENTS = 1 << 15;  // waking the pool costs more than it saves below this

// Calls body(row) for all rows: in the thread pool, or in the calling thread if the work is small. `cost_per_row`: the
// cost of a row in elements read once. Eight items per thread even out workers of unequal speed.
template <class F>
void for_each_row(int64_t rows, int64_t cost_per_row, F&& body) {
  if (rows * cost_per_row < MIN_PARALLEL_ELEMENTS || rows < 2) {
    for (int64_t r = 0; r < rows; ++r) body(r);
    return;
  }
  const int64_t rows_per_item = std::max<int64_t>(1, rows / (8 * threads()));
  Queue queue;
  parallel([&](int) {
    for (int64_t item; (item = queue.take()) * rows_per_item < rows;)
      for (int64_t r = item * rows_per_item; r < std::min(rows, (item + 1) * rows_per_item); ++r) body(r);
  });
}

struct RowBuffers {  // thread-local f32 rows
  std::vector<float> a, b;
  void fit(int64_t width) {
    if (int64_t(a.size()) < width) a.resize(width), b.resize(width);
  }
};
thread_local RowBuffers buffers;

// Returns mean(x^2). Eight partial sums, because the compiler keeps them in a vector register.
float mean_square(const float* x, int64_t n) {
  float partial[8] = {};
  int64_t i = 0;
  for (; i + 8 <= n; i += 8)
    for (int j = 0; j < 8; ++j) partial[j] += x[i + j] * x[i + j];
  for (; i < n; ++i) partial[0] += x[i] * x[i];
  return std::accumulate(partial, partial + 8, 0.0f) / float(n);
}
}  // namespace

// Normalizes each row by its root mean square and multiplies it by the weight, in f32; other dtypes are converted per
// row in `buffers`.
void rms_norm(const void* x, DType type, int64_t rows, int64_t width, int64_t stride, const float* weight, float eps,
    bool plus_one, void* y) {
  const int64_t size = int64_t(size_of(type));
  // Normalizes row r: v is the row in f32, `out` the f32 result, in y itself if y is f32.
  for_each_row(rows, width, [&](int64_t r) {
    buffers.fit(width);
    const float* v = as_floats(static_cast<const uint8_t*>(x) + r * stride * size, type, width, buffers.a.data());
    const float inverse = 1.0f / sqrtf(mean_square(v, width) + eps), offset = plus_one ? 1.0f : 0.0f;
    float* out = type == DType::F32 ? reinterpret_cast<float*>(static_cast<uint8_t*>(y) + r * width * size)
                                    : buffers.b.data();
    for (int64_t i = 0; i < width; ++i) out[i] = v[i] * inverse * (weight[i] + offset);
    if (type != DType::F32) from_floats(out, type, width, static_cast<uint8_t*>(y) + r * width * size);
  });
}

// Rotary position embedding: rotates pair i of a row by the angle i of its position: (low, high) -> (low cos - high
// sin, high cos + low sin). The pair is columns (i, half + i), or (2i, 2i+1) if interleaved; the result always has the
// first order.
void rope(const RopeCall& c) {
  const int64_t size = int64_t(size_of(c.type)), half = c.rope_dim / 2;
  // A row r is the columns of one head at one position: rotates its first rope_dim columns and copies the others.
  for_each_row(c.batches * c.heads * c.positions, c.width, [&](int64_t r) {
    buffers.fit(c.width);
    const int64_t p = r % c.positions, h = r / c.positions % c.heads, b = r / c.positions / c.heads;
    const uint8_t* from = static_cast<const uint8_t*>(c.x) +
        (b * c.batch_stride + h * c.head_stride + p * c.position_stride) * size;
    const float* v = as_floats(from, c.type, c.width, buffers.a.data());
    const float *cos = c.cos + b * c.table_batch + p * c.rope_dim, *sin = c.sin + b * c.table_batch + p * c.rope_dim;
    float* out = buffers.b.data();
    for (int64_t i = 0; i < half; ++i) {
      const float low = c.interleaved ? v[2 * i] : v[i], high = c.interleaved ? v[2 * i + 1] : v[half + i];
      out[i] = low * cos[i] - high * sin[i];
      out[half + i] = high * cos[half + i] + low * sin[half + i];
    }
    std::copy(v + c.rope_dim, v + c.width, out + c.rope_dim);
    from_floats(out, c.type, c.width, static_cast<uint8_t*>(c.y) + r * c.width * size);
  });
}

// Copies keys or values to another dtype and layout (caches in half precision or Q8_0). Row by row, because in both
// layouts only the columns are contiguous.
void convert_kv(const Strided& from, void* to, const Strided& layout, int64_t batches, int64_t heads, int64_t positions,
    int64_t columns) {
  // A row r is the columns of one head at one position p of sequence b: finds it in both layouts and converts it.
  for_each_row(batches * heads * positions, columns, [&](int64_t r) {
    buffers.fit(columns);
    const int64_t p = r % positions, h = r / positions % heads, b = r / positions / heads;
    const auto offset_in = [&](const Strided& t) {
      return (b * t.batch + h * t.head + p * t.position) * int64_t(size_of(t.type));
    };
    const float* row = as_floats(static_cast<const uint8_t*>(from.data) + offset_in(from), from.type, columns,
        buffers.a.data());
    from_floats(row, layout.type, columns, static_cast<uint8_t*>(to) + offset_in(layout));
  });
}

namespace {
// `out` may be x.
void softmax(const float* x, int64_t n, float* out) {
  const float max_value = *std::max_element(x, x + n);
  float sum = 0;
  for (int64_t i = 0; i < n; ++i) sum += out[i] = expf(x[i] - max_value);
  for (int64_t i = 0; i < n; ++i) out[i] /= sum;
}

// Sets the first `count` of `order` to the indices of the `count` largest of n values, by descending value; ties: lower
// index first. The others follow in no order.
void select_largest(const float* values, int64_t n, int64_t count, std::vector<int64_t>& order) {
  order.resize(n);
  std::iota(order.begin(), order.end(), 0);
  std::partial_sort(order.begin(), order.begin() + count, order.end(),
      [&](int64_t a, int64_t b) { return values[a] != values[b] ? values[a] > values[b] : a < b; });
}

// Group-limited routing of DeepSeek: experts outside the topk_group best groups get a choice score of -inf. The score
// of a group is its best expert (MAX) or the sum of its two best (TOP2).
void mask_groups(const RouteCall& c, float* choice, std::vector<float>& group_score, std::vector<int64_t>& order) {
  const int64_t size = c.experts / c.n_group;
  group_score.resize(c.n_group);
  for (int64_t g = 0; g < c.n_group; ++g) {
    float first = -std::numeric_limits<float>::infinity(), second = first;
    for (int64_t i = g * size; i < (g + 1) * size; ++i) {
      if (choice[i] > first) second = first, first = choice[i];
      else second = std::max(second, choice[i]);
    }
    group_score[g] = c.groups == Groups::MAX ? first : first + second;
  }
  select_largest(group_score.data(), c.n_group, c.topk_group, order);
  for (int64_t i = c.topk_group; i < c.n_group; ++i)
    std::fill_n(choice + order[i] * size, size, -std::numeric_limits<float>::infinity());
}
}  // namespace

// Chooses the experts of each token, in one pass per token: scores of all experts; choice scores (with bias, groups
// masked), which decide the top experts; weights from the plain scores of the chosen experts, renormalized and scaled.
void route(const RouteCall& c) {
  constexpr int64_t COST_PER_EXPERT = 8;  // exp, and the partial sort
  constexpr float EPSILON = 1e-20f;       // against a division by a zero sum
  // Routes token t: `choice` (scores plus bias, masked groups) decides which experts, `scores` give their weights.
  for_each_row(c.tokens, c.experts * COST_PER_EXPERT, [&](int64_t t) {
    thread_local std::vector<float> group_score;
    thread_local std::vector<int64_t> order;
    buffers.fit(c.experts);
    const float* logits = c.logits + t * c.experts;
    float *scores = buffers.a.data(), *choice = buffers.b.data();
    if (c.scoring == Scoring::SOFTMAX) softmax(logits, c.experts, scores);
    else
      for (int64_t i = 0; i < c.experts; ++i)
        scores[i] = c.scoring == Scoring::SIGMOID ? 1.0f / (1.0f + expf(-logits[i])) : logits[i];
    for (int64_t i = 0; i < c.experts; ++i) choice[i] = scores[i] + (c.bias ? c.bias[i] : 0.0f);
    if (c.groups != Groups::NONE && c.n_group > 1) mask_groups(c, choice, group_score, order);
    select_largest(choice, c.experts, c.top, order);
    float* weights = c.weights + t * c.top;
    float sum = 0;
    for (int64_t j = 0; j < c.top; ++j) sum += weights[j] = scores[c.ids[t * c.top + j] = order[j]];
    if (c.scoring == Scoring::SOFTMAX_TOPK) softmax(weights, c.top, weights), sum = 1;
    for (int64_t j = 0; j < c.top; ++j) weights[j] *= c.scale / (c.renorm ? sum + EPSILON : 1.0f);
  });
}

// out = act(gate) * up, row by row. The kernel takes f32 rows of a multiple of 16 columns and works in place, so both
// inputs are copied to padded buffers.
void apply_gated_activation(int act, const void* gate, const void* up, DType type, int64_t rows, int64_t width,
    int64_t stride, void* out) {
  constexpr float NO_ALPHA = 0, NO_LIMIT = 0;  // parameters of SWIGLU_OAI, which callers do not pass here
  const int64_t size = int64_t(size_of(type)), padded = (width + 15) / 16 * 16;
  // Row r: f32 copies of gate and up in padded buffers, the activation in place, the result to `out`.
  for_each_row(rows, width, [&](int64_t r) {
    buffers.fit(padded);
    const uint8_t *gate_row = static_cast<const uint8_t*>(gate) + r * stride * size,
                  *up_row = static_cast<const uint8_t*>(up) + r * stride * size;
    const float* gate_values = as_floats(gate_row, type, width, buffers.a.data());
    const float* up_values = as_floats(up_row, type, width, buffers.b.data());
    if (gate_values != buffers.a.data()) std::copy(gate_values, gate_values + width, buffers.a.data());
    if (up_values != buffers.b.data()) std::copy(up_values, up_values + width, buffers.b.data());
    kernels().gated_activation(Activation(act), NO_ALPHA, NO_LIMIT, buffers.a.data(), buffers.b.data(),
        buffers.a.data(), padded);
    from_floats(buffers.a.data(), type, width, static_cast<uint8_t*>(out) + r * width * size);
  });
}
}  // namespace ktx
