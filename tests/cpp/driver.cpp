// Runs every kernel driver on unusual shapes, from several threads at once. `make sanitize` runs this program under
// AddressSanitizer and ThreadSanitizer. It looks for invalid reads and writes and for data races, not for wrong
// results: weights are random bytes of valid sizes.
#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstring>
#include <random>
#include <stdexcept>
#include <thread>
#include <vector>

#include "cpu/driver/attention.h"
#include "cpu/driver/blocks.h"
#include "cpu/driver/experts.h"
#include "cpu/runtime/isa.h"
#include "cpu/quant/layout.h"
#include "cpu/driver/linear.h"
#include "cpu/runtime/numa.h"
#include "cpu/runtime/pool.h"
#include "cpu/driver/elementwise.h"

using namespace ktx;

namespace {
const int CODES[] = {F32, F16, BF16, F8_E4M3, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q2_K, Q3_K, Q4_K, Q5_K, Q6_K, IQ2_XXS,
    IQ2_XS, IQ2_S, IQ3_XXS, IQ3_S, IQ1_S, IQ1_M, IQ4_NL, IQ4_XS, MXFP4, TQ1_0, TQ2_0, INT8_128, INT4_64, INT4_128};

struct Random {
  std::mt19937 source{1};
  std::vector<float> floats(int64_t n) {
    std::normal_distribution<float> normal;
    std::vector<float> values(size_t(n), 0.0f);
    for (float& v : values) v = normal(source);
    return values;
  }
  // Returns random packed matrices in exactly as many heap bytes as they take, so that the sanitizer sees a read past
  // them.
  std::vector<uint8_t> packed(const Layout& layout, int64_t matrices, int64_t n, int64_t k) {
    const size_t size = packed_bytes(layout, n, k), row = size_t(k / layout.block) * size_t(layout.bytes);
    std::vector<uint8_t> rows(size_t(n) * row), data(size * size_t(matrices));
    std::vector<float> scale(size_t((n + 127) / 128 * ((k + 127) / 128)), 1.0f);
    for (int64_t m = 0; m < matrices; ++m) {
      for (uint8_t& byte : rows) byte = uint8_t(source()) & 0x3f;
      pack_rows(layout, rows.data(), row, n, k, data.data() + size_t(m) * size, 0,
          layout.code == F8_E4M3 ? scale.data() : nullptr, (k + 127) / 128);
    }
    return data;
  }
};

// Row counts that do not fill groups of 16, and token counts on both sides of the kernels' tile sizes.
void run_linear(Random& random, const Layout& layout) {
  const int64_t k = layout.block == 1 ? 200 : layout.block == 256 ? 512 : 3 * std::max(layout.block, 32);
  for (int64_t n : {7, 33, 80}) {
    const std::vector<uint8_t> packed_weights = random.packed(layout, 1, n, k);
    const std::vector<float> bias = random.floats(n);
    for (int64_t tokens : {1, 2, 5, 8, 9, 13, 40, 85}) {
      const std::vector<float> x = random.floats(tokens * k);
      std::vector<float> y(size_t(tokens * n));
      linear(x.data(), DType::F32, tokens, layout, packed_weights.data(), n, k, bias.data(), y.data());
    }
  }
  const std::vector<uint8_t> packed_weights = random.packed(layout, 5, 20, k);
  const std::vector<float> x = random.floats(5 * 3 * k);
  std::vector<float> y(5 * 3 * 20), row(size_t(2 * k));
  linear_batched(x.data(), DType::F32, 5, 3, layout, packed_weights.data(), 20, k, y.data());
  const int64_t rows[] = {0, 19};
  unpack_rows(layout, packed_weights.data(), k, rows, 2, row.data());
}

// `layout`: of gate and up. All calls add to the same counters, because callers of one layer do.
void run_experts(Random& random, const Layout& layout, const Layout& down) {
  const int64_t hidden = 256, inner = 768, num_experts = 5, top = 3;
  const std::vector<uint8_t> gate = random.packed(layout, num_experts, inner, hidden),
                             up = random.packed(layout, num_experts, inner, hidden),
                             down_weights = random.packed(down, num_experts, hidden, inner);
  for (int64_t tokens : {1, 4, 30, 200}) {
    const std::vector<float> x = random.floats(tokens * hidden), weights = random.floats(tokens * top);
    std::vector<int64_t> ids(size_t(tokens * top));
    // some are out of range, some come twice
    for (int64_t& id : ids) id = int64_t(random.source() % (num_experts + 2)) - 1;
    std::vector<float> out(size_t(tokens * hidden));
    static int64_t counters[num_experts + 2 + MAX_NODES];  // of all callers
    const ExpertStats stats{counters, counters + num_experts, counters + num_experts + 1, counters + num_experts + 2};
    experts({x.data(), out.data(), DType::F32, ids.data(), weights.data(), tokens, top, hidden, inner, num_experts,
        {&layout, gate.data(), nullptr}, {&layout, up.data(), nullptr}, {&down, down_weights.data(), nullptr}, SILU, 0,
        0, stats});
  }
}

// Returns random rows as a KV cache stores them, in exactly as many bytes as they take.
std::vector<uint8_t> random_cache(Random& random, DType type, int64_t rows, int64_t columns) {
  const int64_t bytes = type == DType::Q8_0 ? columns / Q8_BLOCK * Q8_BYTES : columns * int64_t(size_of(type));
  std::vector<uint8_t> data(size_t(rows * bytes));
  for (int64_t r = 0; r < rows; ++r) from_floats(random.floats(columns).data(), type, columns, data.data() + r * bytes);
  return data;
}
Strided strided_view(const std::vector<uint8_t>& data, DType type, int64_t heads, int64_t positions) {
  const int64_t row = int64_t(data.size() / size_of(type)) / heads / positions;
  return {data.data(), type, heads * positions * row, positions * row, row};
}

// Attention with grouped KV heads, then absorbed MLA (one KV head, rope columns apart).
void run_attention(Random& random) {
  for (DType type : {DType::F32, DType::F16, DType::BF16, DType::Q8_0})
    for (int64_t queries : {1, 3, 50})
      for (int64_t d : {20, 64, 128}) {
        if (type == DType::Q8_0 && d % Q8_BLOCK) continue;
        const int64_t heads = 6, kv_heads = 2, keys = 300;
        const std::vector<float> q = random.floats(heads * queries * d);
        const std::vector<uint8_t> k = random_cache(random, type, kv_heads * keys, d),
                                   v = random_cache(random, type, kv_heads * keys, d);
        std::vector<float> out(size_t(heads * queries * d));
        AttentionCall c{};
        c.q = {q.data(), DType::F32, heads * queries * d, queries * d, d}, c.k = strided_view(k, type, kv_heads, keys),
        c.v = strided_view(v, type, kv_heads, keys);
        c.batches = 1, c.heads = heads, c.kv_heads = kv_heads, c.queries = queries, c.keys = keys, c.dk = c.dv = d,
        c.scale = 0.1f;
        c.out = out.data(), c.out_type = DType::F32;
        attention(c);
      }
  for (DType type : {DType::F32, DType::F16, DType::BF16, DType::Q8_0})
    for (int64_t heads : {3, 16, 40})
      for (int64_t keys : {1, 13, 700}) {
        const int64_t rank = 96, rope_dim = 32;
        const std::vector<float> q = random.floats(heads * rank), q_rope = random.floats(heads * rope_dim);
        const std::vector<uint8_t> latent = random_cache(random, type, keys, rank),
                                   rope = random_cache(random, type, keys, rope_dim);
        std::vector<float> out(size_t(heads * rank));
        AttentionCall c{};
        c.q = {q.data(), DType::F32, heads * rank, rank, rank},
        c.q_rope = {q_rope.data(), DType::F32, heads * rope_dim, rope_dim, rope_dim};
        c.k = c.v = strided_view(latent, type, 1, keys), c.k_rope = strided_view(rope, type, 1, keys);
        c.batches = 1, c.heads = heads, c.kv_heads = 1, c.queries = 1, c.keys = keys, c.dk = c.dv = rank,
        c.dr = rope_dim, c.scale = 0.1f;
        c.out = out.data(), c.out_type = DType::F32;
        attention(c);
      }
}

// A ragged call: several sequences in one batch, their keys on pages in any order.
void run_ragged_attention(Random& random) {
  const int64_t heads = 6, kv_heads = 2, d = 64, page = 64, num_pages = 16, long_keys = 700;
  const std::vector<int32_t> first_pages{15, 3, 9, 1, 0, 14, 2, 8, 7, 5, 4}, second_pages{6}, third_pages{10, 11};
  const std::vector<Sequence> sequences{{0, 1, long_keys, first_pages.data()}, {1, 64, 64, second_pages.data()},
      {65, 3, 70, third_pages.data()}};
  const int64_t queries = 68;
  for (DType type : {DType::F32, DType::F16, DType::BF16, DType::Q8_0}) {
    const std::vector<float> q = random.floats(heads * queries * d);
    const std::vector<uint8_t> k = random_cache(random, type, num_pages * kv_heads * page, d),
                               v = random_cache(random, type, num_pages * kv_heads * page, d);
    const int64_t row = int64_t(k.size() / size_of(type)) / (num_pages * kv_heads * page);
    std::vector<float> out(size_t(heads * queries * d));
    AttentionCall c{};
    c.q = {q.data(), DType::F32, heads * queries * d, queries * d, d};
    c.k = {k.data(), type, kv_heads * page * row, page * row, row},
    c.v = {v.data(), type, kv_heads * page * row, page * row, row};
    c.batches = 1, c.heads = heads, c.kv_heads = kv_heads, c.queries = queries, c.keys = page, c.dk = c.dv = d,
    c.scale = 0.1f;
    c.sequences = sequences.data(), c.sequence_count = int64_t(sequences.size()), c.page = page;
    c.out = out.data(), c.out_type = DType::F32;
    attention(c);
  }
}

// Three phases of shared items: checks that each item is done once, and that no worker enters a phase before the
// previous one is complete. Workers join when the system wakes them; in every seventh round one of them is late.
void check_barriers(int num_threads) {
  constexpr int64_t ITEMS = 40;
  for (int round = 0; round < 2000; ++round) {
    Queue queues[3];
    int64_t done[3][ITEMS] = {}, wrong = 0;  // not atomic: ThreadSanitizer reports accesses that no barrier orders
    std::atomic<int> joined{0};
    parallel([&](int worker) {
      ++joined;
      if (round % 7 == 0 && worker == round % num_threads)
        std::this_thread::sleep_for(std::chrono::microseconds(round % 300));
      for (int phase = 0; phase < 3; ++phase) {
        if (phase) barrier();
        for (int64_t item; (item = queues[phase].take()) < ITEMS;) {
          for (int64_t i = 0; phase && i < ITEMS; ++i)
            if (done[phase - 1][i] != 1) throw std::logic_error("a phase began before the one before it was done");
          ++done[phase][item];
        }
      }
    });
    for (const auto& phase_items : done)
      for (int64_t times : phase_items) wrong += times != 1;
    if (wrong || joined < 1 || joined > num_threads) throw std::logic_error("an item was left out or done twice");
  }
}

// Checks that an exception of any worker, before or after a barrier, reaches the caller, and that no other worker waits
// forever.
void check_exceptions(int num_threads) {
  for (int round = 0; round < 200; ++round) {
    bool caught = false;
    Queue queue, second_queue;
    try {
      parallel([&](int) {
        for (int64_t item; (item = queue.take()) < 2 * num_threads;)
          if (item == round % (3 * num_threads)) throw std::runtime_error("expected");
        barrier();
        for (int64_t item; (item = second_queue.take()) < num_threads;)
          if (item + 2 * num_threads == round % (3 * num_threads)) throw std::runtime_error("expected");
        barrier();
      });
    } catch (const std::runtime_error&) {
      caught = true;
    }
    if (!caught) throw std::logic_error("an exception of a worker was lost");
  }
}

// All weight types in `linear`; for experts, pairs of types that cover integer and float products on either side.
void run_all_drivers(unsigned seed) {
  Random random;
  random.source.seed(seed);
  for (int code : CODES) run_linear(random, *find_layout(code));
  run_experts(random, *find_layout(Q4_K), *find_layout(Q5_0));
  run_experts(random, *find_layout(IQ2_S), *find_layout(IQ4_XS));
  run_experts(random, *find_layout(BF16), *find_layout(Q8_0));
  run_experts(random, *find_layout(INT4_128), *find_layout(F8_E4M3));
  run_attention(random);
  run_ragged_attention(random);
}
}  // namespace

int main() {
  for (int num_threads : {1, 3}) {
    set_threads(num_threads);
    run_all_drivers(unsigned(num_threads));
    check_barriers(num_threads);
    check_exceptions(num_threads);
  }
  std::thread second_caller([] { run_all_drivers(7); });  // two callers of one thread pool
  run_all_drivers(8);
  second_caller.join();
  std::printf("%s: every driver ran\n", ISA_NAMES[picked_isa()]);
}
