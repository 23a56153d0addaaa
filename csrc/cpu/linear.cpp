#include "linear.h"

#include <algorithm>
#include <atomic>

#include "isa.h"
#include "kernels.h"
#include "pool.h"
#include "scratch.h"

namespace ktx {
const Kernels& kernels() {
  static const Kernels* const table[ISA_COUNT] = {&SCALAR_KERNELS, &AVX2_KERNELS, &AVX512VNNI_KERNELS};
  return *table[picked_isa()];
}

namespace {
constexpr int64_t CHUNK = 512;  // tokens at once: their int8 rows stay in the second-level cache while weights pass by
thread_local Scratch shared_scratch, member_scratch;

// One or several matrices, each with `tokens` rows of x of its own.
struct Call {
  const Kernels& kernels;
  const Layout& layout;
  const uint8_t* packed;
  int64_t n, k;
  const float* bias;
  Number type;
  const uint8_t* x;
  uint8_t* y;
  int64_t matrices;
  int tokens;
  Tokens all;  // activations of every matrix's tokens
  int64_t groups, per_item;
  Queue rows{};
  Line items{};

  void prepare(Scratch& own) {  // whole tiles a member: two that write words of one line would fight for it
    float* room = own.take<float>(k);
    const RowView row = layout.is_float ? RowView{} : take_row(own, k);
    const int tiles = slice(all, 0, tokens, kernels).tiles;
    for (int64_t tile; (tile = rows.take()) < matrices * tiles;) {
      const int64_t matrix = tile / tiles;
      const Tokens mine = slice(all, matrix * tokens, tokens, kernels);
      for (int t = mine.start(int(tile % tiles)); t < mine.start(int(tile % tiles) + 1); ++t) {
        const float* values = as_floats(x + (matrix * tokens + t) * k * size_of(type), type, k, room);
        if (layout.is_float) kernels.place_floats(values, mine, t, 0, k);
        else kernels.quantise(values, k, row), kernels.place(row, mine, t, 0, k);
      }
    }
  }
  void finish(int64_t matrix, int64_t group, const float* sums) {  // [token][16] -> y, with bias
    const int64_t row = group * 16, width = std::min<int64_t>(16, n - row);
    for (int t = 0; t < tokens; ++t) {
      float v[16];
      for (int i = 0; i < width; ++i) v[i] = sums[t * 16 + i] + (bias ? bias[row + i] : 0.0f);
      from_floats(v, type, width, y + ((matrix * tokens + t) * n + row) * int64_t(size_of(type)));
    }
  }
  int64_t items_of_matrix() const { return (groups + per_item - 1) / per_item; }
  const uint8_t* weights(int64_t item) const {
    return packed + (item / items_of_matrix() * groups + item % items_of_matrix() * per_item) * group_bytes(layout, k);
  }
  void multiply(Scratch& own) {
    float* sums = own.take<float>(per_item * tokens * 16);
    uint8_t* work = own.take<uint8_t>(WORK_BYTES);
    items.walk([&](int64_t item, int64_t then) {
      const int64_t matrix = item / items_of_matrix(), first = item % items_of_matrix() * per_item;
      const int64_t count = std::min(per_item, groups - first);
      const Tokens mine = slice(all, matrix * tokens, tokens, kernels);
      kernels.multiply(layout, weights(item), int(count), mine, sums, work, then < 0 ? nullptr : weights(then));
      for (int64_t g = 0; g < count; ++g) finish(matrix, first + g, sums + g * tokens * 16);
    });
  }
};

void chunk(const void* x, Number type, int64_t matrices, int tokens, const Layout& layout, const uint8_t* packed, int64_t n, int64_t k,
           const float* bias, void* y) {
  const bool ints = !layout.is_float;
  const int64_t rows = matrices * tokens;
  shared_scratch.reset(tokens_bytes(rows, k, ints, !ints));
  const int64_t groups = (n + 15) / 16, share = matrices * groups / (4 * threads());
  const int64_t per_item = std::max<int64_t>(1, std::min<int64_t>(tokens > 64 ? 2 : 8, share));
  const int64_t even = per_item + (per_item > 1 && per_item % 2);
  Call call{.kernels = kernels(), .layout = layout, .packed = packed, .n = n, .k = k, .bias = bias, .type = type,
            .x = static_cast<const uint8_t*>(x), .y = static_cast<uint8_t*>(y), .matrices = matrices, .tokens = tokens,
            .all = take_tokens(shared_scratch, rows, k, ints, !ints), .groups = groups, .per_item = even, .rows = {},
            .items = {.count = matrices * ((groups + even - 1) / even)}};
  parallel([&](int) {
    member_scratch.reset(row_bytes(k) + size_t(call.per_item) * tokens * 64 + WORK_BYTES + 512);
    call.prepare(member_scratch);
    barrier();
    call.multiply(member_scratch);
  });
}
}  // namespace

void linear(const void* x, Number type, int64_t tokens, const Layout& layout, const uint8_t* packed, int64_t n, int64_t k,
            const float* bias, void* y) {
  for (int64_t t = 0; t < tokens; t += CHUNK)
    chunk(static_cast<const uint8_t*>(x) + t * k * size_of(type), type, 1, int(std::min(CHUNK, tokens - t)), layout, packed, n, k,
          bias, static_cast<uint8_t*>(y) + t * n * size_of(type));
}

void linear_batched(const void* x, Number type, int64_t matrices, int64_t tokens, const Layout& layout, const uint8_t* packed, int64_t n,
                    int64_t k, void* y) {
  const size_t matrix = packed_bytes(layout, n, k);
  const int64_t at_once = tokens <= CHUNK ? std::max<int64_t>(1, 16 * CHUNK / std::max<int64_t>(tokens, 1)) : 1;
  for (int64_t m = 0; m < matrices; m += at_once) {
    const int64_t count = std::min(at_once, matrices - m);
    const uint8_t* from = static_cast<const uint8_t*>(x) + m * tokens * k * size_of(type);
    uint8_t* to = static_cast<uint8_t*>(y) + m * tokens * n * size_of(type);
    if (tokens <= CHUNK) chunk(from, type, count, int(tokens), layout, packed + m * matrix, n, k, nullptr, to);
    else linear(from, type, tokens, layout, packed + m * matrix, n, k, nullptr, to);
  }
}

void unpack_rows(const Layout& layout, const uint8_t* packed, int64_t k, const int64_t* rows, int64_t count, float* out) {
  const size_t stride = group_bytes(layout, k);
  Queue queue;
  parallel([&](int) {
    member_scratch.reset(size_t(k) * 64 + 64);
    float* lanes = member_scratch.take<float>(k * 16);
    for (int64_t i; (i = queue.take()) < count;) {
      kernels().unpack(layout, packed + rows[i] / 16 * stride, k, lanes);
      for (int64_t c = 0; c < k; ++c) out[i * k + c] = lanes[c * 16 + rows[i] % 16];
    }
  });
}
}  // namespace ktx
