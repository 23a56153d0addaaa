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

template <class F>
void each_row(int64_t rows, int64_t width, F&& body) {
  if (rows * width < MIN_PARALLEL_ELEMENTS || rows < 2) {
    for (int64_t r = 0; r < rows; ++r) body(r);
    return;
  }
  const int64_t block = std::max<int64_t>(1, rows / (8 * threads()));
  Queue queue;
  parallel([&](int) {
    for (int64_t b; (b = queue.take()) * block < rows;)
      for (int64_t r = b * block; r < std::min(rows, (b + 1) * block); ++r) body(r);
  });
}

struct RowBuffers {  // thread-local f32 rows
  std::vector<float> a, b;
  void fit(int64_t width) {
    if (int64_t(a.size()) < width) a.resize(width), b.resize(width);
  }
};
thread_local RowBuffers buffers;

// Eight partial sums, which the compiler keeps in a vector register.
float mean_square(const float* x, int64_t n) {
  float part[8] = {};
  int64_t i = 0;
  for (; i + 8 <= n; i += 8)
    for (int j = 0; j < 8; ++j) part[j] += x[i + j] * x[i + j];
  for (; i < n; ++i) part[0] += x[i] * x[i];
  return std::accumulate(part, part + 8, 0.0f) / float(n);
}
}  // namespace

void rms_norm(const void* x, DType type, int64_t rows, int64_t width, int64_t stride, const float* weight, float eps, bool plus_one, void* y) {
  const int64_t size = int64_t(size_of(type));
  each_row(rows, width, [&](int64_t r) {
    buffers.fit(width);
    const float* v = as_floats(static_cast<const uint8_t*>(x) + r * stride * size, type, width, buffers.a.data());
    const float inverse = 1.0f / sqrtf(mean_square(v, width) + eps), one = plus_one ? 1.0f : 0.0f;
    float* out = type == DType::F32 ? reinterpret_cast<float*>(static_cast<uint8_t*>(y) + r * width * size) : buffers.b.data();
    for (int64_t i = 0; i < width; ++i) out[i] = v[i] * inverse * (weight[i] + one);
    if (type != DType::F32) from_floats(out, type, width, static_cast<uint8_t*>(y) + r * width * size);
  });
}

void rope(const RopeCall& c) {
  const int64_t size = int64_t(size_of(c.type)), half = c.rope_dim / 2;
  each_row(c.batches * c.heads * c.positions, c.width, [&](int64_t r) {
    buffers.fit(c.width);
    const int64_t p = r % c.positions, h = r / c.positions % c.heads, b = r / c.positions / c.heads;
    const uint8_t* from = static_cast<const uint8_t*>(c.x) + (b * c.batch_stride + h * c.head_stride + p * c.position_stride) * size;
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

void convert_kv(const Strided& from, void* to, const Strided& places, int64_t batches, int64_t heads, int64_t positions, int64_t columns) {
  each_row(batches * heads * positions, columns, [&](int64_t r) {
    buffers.fit(columns);
    const int64_t p = r % positions, h = r / positions % heads, b = r / positions / heads;
    const auto at = [&](const Strided& t) { return (b * t.batch + h * t.head + p * t.position) * int64_t(size_of(t.type)); };
    const float* row = as_floats(static_cast<const uint8_t*>(from.data) + at(from), from.type, columns, buffers.a.data());
    from_floats(row, places.type, columns, static_cast<uint8_t*>(to) + at(places));
  });
}

namespace {
void softmax(const float* x, int64_t n, float* out) {
  const float most = *std::max_element(x, x + n);
  float sum = 0;
  for (int64_t i = 0; i < n; ++i) sum += out[i] = expf(x[i] - most);
  for (int64_t i = 0; i < n; ++i) out[i] /= sum;
}

// The indices of the `count` largest of n values, by descending value; ties: lower index first.
void largest(const float* values, int64_t n, int64_t count, std::vector<int64_t>& order) {
  order.resize(n);
  std::iota(order.begin(), order.end(), 0);
  std::partial_sort(order.begin(), order.begin() + count, order.end(),
                    [&](int64_t a, int64_t b) { return values[a] != values[b] ? values[a] > values[b] : a < b; });
}

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
  largest(group_score.data(), c.n_group, c.topk_group, order);
  for (int64_t i = c.topk_group; i < c.n_group; ++i)
    std::fill_n(choice + order[i] * size, size, -std::numeric_limits<float>::infinity());
}
}  // namespace

void route(const RouteCall& c) {
  each_row(c.tokens, c.experts * 8, [&](int64_t t) {
    thread_local std::vector<float> group_score;
    thread_local std::vector<int64_t> order;
    buffers.fit(c.experts);
    const float* logits = c.logits + t * c.experts;
    float *scores = buffers.a.data(), *choice = buffers.b.data();
    if (c.scoring == Scoring::SOFTMAX) softmax(logits, c.experts, scores);
    else
      for (int64_t i = 0; i < c.experts; ++i) scores[i] = c.scoring == Scoring::SIGMOID ? 1.0f / (1.0f + expf(-logits[i])) : logits[i];
    for (int64_t i = 0; i < c.experts; ++i) choice[i] = scores[i] + (c.bias ? c.bias[i] : 0.0f);
    if (c.groups != Groups::NONE && c.n_group > 1) mask_groups(c, choice, group_score, order);
    largest(choice, c.experts, c.top, order);
    float* weights = c.weights + t * c.top;
    float sum = 0;
    for (int64_t j = 0; j < c.top; ++j) sum += weights[j] = scores[c.ids[t * c.top + j] = order[j]];
    if (c.scoring == Scoring::SOFTMAX_TOPK) softmax(weights, c.top, weights), sum = 1;
    for (int64_t j = 0; j < c.top; ++j) weights[j] *= c.scale / (c.renorm ? sum + 1e-20f : 1.0f);
  });
}

void gated(int act, const void* gate, const void* up, DType type, int64_t rows, int64_t width, int64_t stride, void* out) {
  const int64_t size = int64_t(size_of(type)), padded = (width + 15) / 16 * 16;
  each_row(rows, width, [&](int64_t r) {
    buffers.fit(padded);
    const uint8_t *g = static_cast<const uint8_t*>(gate) + r * stride * size, *u = static_cast<const uint8_t*>(up) + r * stride * size;
    const float* gf = as_floats(g, type, width, buffers.a.data());
    const float* uf = as_floats(u, type, width, buffers.b.data());
    if (gf != buffers.a.data()) std::copy(gf, gf + width, buffers.a.data());
    if (uf != buffers.b.data()) std::copy(uf, uf + width, buffers.b.data());
    kernels().gated_activation(Activation(act), 0, 0, buffers.a.data(), buffers.b.data(), buffers.a.data(), padded);
    from_floats(buffers.a.data(), type, width, static_cast<uint8_t*>(out) + r * width * size);
  });
}
}  // namespace ktx
