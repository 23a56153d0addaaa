// Every kernel driver on odd shapes, by several threads at once: what `make sanitize` runs under AddressSanitizer and ThreadSanitizer.
// Weights are random bytes of valid blocks' sizes, so results mean nothing; reading or writing where one must not is what is looked for.
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
const int CODES[] = {F32, F16, BF16, F8_E4M3, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q2_K, Q3_K, Q4_K, Q5_K, Q6_K, IQ2_XXS, IQ2_XS, IQ2_S, IQ3_XXS,
                     IQ3_S, IQ1_S, IQ1_M, IQ4_NL, IQ4_XS, MXFP4, TQ1_0, TQ2_0, INT8_128, INT4_64, INT4_128};

struct Random {
  std::mt19937 source{1};
  std::vector<float> floats(int64_t n) {
    std::normal_distribution<float> normal;
    std::vector<float> values(size_t(n), 0.0f);
    for (float& v : values) v = normal(source);
    return values;
  }
  // Exactly as many bytes as the matrices take, on the heap: a read past them is seen.
  std::vector<uint8_t> packed(const Layout& l, int64_t matrices, int64_t n, int64_t k) {
    const size_t size = packed_bytes(l, n, k), row = size_t(k / l.block) * size_t(l.bytes);
    std::vector<uint8_t> rows(size_t(n) * row), data(size * size_t(matrices));
    std::vector<float> scale(size_t((n + 127) / 128 * ((k + 127) / 128)), 1.0f);
    for (int64_t m = 0; m < matrices; ++m) {
      for (uint8_t& byte : rows) byte = uint8_t(source()) & 0x3f;
      pack_rows(l, rows.data(), row, n, k, data.data() + size_t(m) * size, 0, l.code == F8_E4M3 ? scale.data() : nullptr, (k + 127) / 128);
    }
    return data;
  }
};

void linears(Random& random, const Layout& l) {
  const int64_t k = l.block == 1 ? 200 : l.block == 256 ? 512 : 3 * std::max(l.block, 32);
  for (int64_t n : {7, 33, 80}) {
    const std::vector<uint8_t> w = random.packed(l, 1, n, k);
    const std::vector<float> bias = random.floats(n);
    for (int64_t tokens : {1, 2, 5, 8, 9, 13, 40, 85}) {
      const std::vector<float> x = random.floats(tokens * k);
      std::vector<float> y(size_t(tokens * n));
      linear(x.data(), DType::F32, tokens, l, w.data(), n, k, bias.data(), y.data());
    }
  }
  const std::vector<uint8_t> w = random.packed(l, 5, 20, k);
  const std::vector<float> x = random.floats(5 * 3 * k);
  std::vector<float> y(5 * 3 * 20), row(size_t(2 * k));
  linear_batched(x.data(), DType::F32, 5, 3, l, w.data(), 20, k, y.data());
  const int64_t rows[] = {0, 19};
  unpack_rows(l, w.data(), k, rows, 2, row.data());
}

void mixtures(Random& random, const Layout& l, const Layout& down) {
  const int64_t hidden = 256, inner = 768, count = 5, top = 3;
  const std::vector<uint8_t> gate = random.packed(l, count, inner, hidden), up = random.packed(l, count, inner, hidden),
                             last = random.packed(down, count, hidden, inner);
  for (int64_t tokens : {1, 4, 30, 200}) {
    const std::vector<float> x = random.floats(tokens * hidden), weights = random.floats(tokens * top);
    std::vector<int64_t> ids(size_t(tokens * top));
    for (int64_t& id : ids) id = int64_t(random.source() % (count + 2)) - 1;  // some are out of range, some come twice
    std::vector<float> out(size_t(tokens * hidden));
    static int64_t counted[count + 2 + MAX_NODES];  // of all callers
    const ExpertStats counts{counted, counted + count, counted + count + 1, counted + count + 2};
    experts({x.data(), out.data(), DType::F32, ids.data(), weights.data(), tokens, top, hidden, inner, count,
             {&l, gate.data(), nullptr}, {&l, up.data(), nullptr}, {&down, last.data(), nullptr}, SILU, 0, 0, counts});
  }
}

// Rows as a cache keeps them, exactly as many bytes as they take.
std::vector<uint8_t> kept(Random& random, DType type, int64_t rows, int64_t columns) {
  const int64_t bytes = type == DType::Q8_0 ? columns / Q8_BLOCK * Q8_BYTES : columns * int64_t(size_of(type));
  std::vector<uint8_t> data(size_t(rows * bytes));
  for (int64_t r = 0; r < rows; ++r) from_floats(random.floats(columns).data(), type, columns, data.data() + r * bytes);
  return data;
}
Strided places(const std::vector<uint8_t>& data, DType type, int64_t heads, int64_t positions) {
  const int64_t row = int64_t(data.size() / size_of(type)) / heads / positions;
  return {data.data(), type, heads * positions * row, positions * row, row};
}

void attentions(Random& random) {
  for (DType type : {DType::F32, DType::F16, DType::BF16, DType::Q8_0})
    for (int64_t queries : {1, 3, 50})
      for (int64_t d : {20, 64, 128}) {
        if (type == DType::Q8_0 && d % Q8_BLOCK) continue;
        const int64_t heads = 6, kv = 2, keys = 300;
        const std::vector<float> q = random.floats(heads * queries * d);
        const std::vector<uint8_t> k = kept(random, type, kv * keys, d), v = kept(random, type, kv * keys, d);
        std::vector<float> out(size_t(heads * queries * d));
        AttentionCall c{};
        c.q = {q.data(), DType::F32, heads * queries * d, queries * d, d}, c.k = places(k, type, kv, keys), c.v = places(v, type, kv, keys);
        c.batches = 1, c.heads = heads, c.kv_heads = kv, c.queries = queries, c.keys = keys, c.dk = c.dv = d, c.scale = 0.1f;
        c.out = out.data(), c.out_type = DType::F32;
        attention(c);
      }
  for (DType type : {DType::F32, DType::F16, DType::BF16, DType::Q8_0})
    for (int64_t heads : {3, 16, 40})
      for (int64_t keys : {1, 13, 700}) {
        const int64_t rank = 96, turned = 32;
        const std::vector<float> q = random.floats(heads * rank), q_rope = random.floats(heads * turned);
        const std::vector<uint8_t> latent = kept(random, type, keys, rank), rope = kept(random, type, keys, turned);
        std::vector<float> out(size_t(heads * rank));
        AttentionCall c{};
        c.q = {q.data(), DType::F32, heads * rank, rank, rank}, c.q_rope = {q_rope.data(), DType::F32, heads * turned, turned, turned};
        c.k = c.v = places(latent, type, 1, keys), c.k_rope = places(rope, type, 1, keys);
        c.batches = 1, c.heads = heads, c.kv_heads = 1, c.queries = 1, c.keys = keys, c.dk = c.dv = rank, c.dr = turned, c.scale = 0.1f;
        c.out = out.data(), c.out_type = DType::F32;
        attention(c);
      }
}

// Sequences beside each other, their keys on pages in any order.
void sequences_on_pages(Random& random) {
  const int64_t heads = 6, kv = 2, d = 64, page = 64, all = 16, long_one = 700;
  const std::vector<int32_t> first{15, 3, 9, 1, 0, 14, 2, 8, 7, 5, 4}, second{6}, third{10, 11};
  const std::vector<Sequence> own{{0, 1, long_one, first.data()}, {1, 64, 64, second.data()}, {65, 3, 70, third.data()}};
  const int64_t queries = 68;
  for (DType type : {DType::F32, DType::F16, DType::BF16, DType::Q8_0}) {
    const std::vector<float> q = random.floats(heads * queries * d);
    const std::vector<uint8_t> k = kept(random, type, all * kv * page, d), v = kept(random, type, all * kv * page, d);
    const int64_t row = int64_t(k.size() / size_of(type)) / (all * kv * page);
    std::vector<float> out(size_t(heads * queries * d));
    AttentionCall c{};
    c.q = {q.data(), DType::F32, heads * queries * d, queries * d, d};
    c.k = {k.data(), type, kv * page * row, page * row, row}, c.v = {v.data(), type, kv * page * row, page * row, row};
    c.batches = 1, c.heads = heads, c.kv_heads = kv, c.queries = queries, c.keys = page, c.dk = c.dv = d, c.scale = 0.1f;
    c.sequences = own.data(), c.sequence_count = int64_t(own.size()), c.page = page;
    c.out = out.data(), c.out_type = DType::F32;
    attention(c);
  }
}

// Three phases of shared work: each unit once, and nobody in a phase before the one behind it is whole. Members come when the system wakes them.
void phases(int team) {
  constexpr int64_t UNITS = 40;
  for (int turn = 0; turn < 2000; ++turn) {
    Queue queues[3];
    int64_t done[3][UNITS] = {}, others = 0;  // plain words: ThreadSanitizer sees what no barrier orders
    std::atomic<int> came{0};
    parallel([&](int member) {
      ++came;
      if (turn % 7 == 0 && member == turn % team) std::this_thread::sleep_for(std::chrono::microseconds(turn % 300));
      for (int phase = 0; phase < 3; ++phase) {
        if (phase) barrier();
        for (int64_t unit; (unit = queues[phase].take()) < UNITS;) {
          for (int64_t i = 0; phase && i < UNITS; ++i)
            if (done[phase - 1][i] != 1) throw std::logic_error("a phase began before the one before it was done");
          ++done[phase][unit];
        }
      }
    });
    for (const auto& units : done)
      for (int64_t times : units) others += times != 1;
    if (others || came < 1 || came > team) throw std::logic_error("a unit of work was left out or done twice");
  }
}

// Whoever takes the unit that fails, in front of a barrier or behind it, all others come to an end and the caller hears of it.
void exceptions(int team) {
  for (int turn = 0; turn < 200; ++turn) {
    bool caught = false;
    Queue queue, last;
    try {
      parallel([&](int) {
        for (int64_t unit; (unit = queue.take()) < 2 * team;)
          if (unit == turn % (3 * team)) throw std::runtime_error("expected");
        barrier();
        for (int64_t unit; (unit = last.take()) < team;)
          if (unit + 2 * team == turn % (3 * team)) throw std::runtime_error("expected");
        barrier();
      });
    } catch (const std::runtime_error&) {
      caught = true;
    }
    if (!caught) throw std::logic_error("an exception of a member was lost");
  }
}

void everything(unsigned seed) {
  Random random;
  random.source.seed(seed);
  for (int code : CODES) linears(random, *find_layout(code));
  mixtures(random, *find_layout(Q4_K), *find_layout(Q5_0));
  mixtures(random, *find_layout(IQ2_S), *find_layout(IQ4_XS));
  mixtures(random, *find_layout(BF16), *find_layout(Q8_0));
  mixtures(random, *find_layout(INT4_128), *find_layout(F8_E4M3));
  attentions(random);
  sequences_on_pages(random);
}
}  // namespace

int main() {
  for (int team : {1, 3}) {
    set_threads(team);
    everything(unsigned(team));
    phases(team);
    exceptions(team);
  }
  std::thread other([] { everything(7); });  // two callers of one team
  everything(8);
  other.join();
  std::printf("%s: every driver ran\n", ISA_NAMES[picked_isa()]);
}
