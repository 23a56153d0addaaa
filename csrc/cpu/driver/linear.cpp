#include "cpu/driver/linear.h"

#include <algorithm>
#include <iterator>
#include <vector>

#include "cpu/runtime/isa.h"
#include "cpu/isa/kernels.h"
#include "cpu/runtime/pool.h"
#include "cpu/driver/scratch.h"
#include "cpu/driver/bf16_rows.h"

namespace ktx {
const Kernels& kernels() {
  static const Kernels* const table[] = {&AMXMODEL_KERNELS, &SCALAR_KERNELS, &AVX2_KERNELS, has_vex_vnni() ? &AVXVNNI_KERNELS : &AVX512VL_KERNELS,
                                        &AVX512VNNI_KERNELS, &AVX512VBMI_KERNELS, &AVX512BF16_KERNELS, &AMX_KERNELS};
  static_assert(std::size(table) == ISA_COUNT);
  return *table[picked_isa()];
}

Bf16Rows& bf16_rows() {
  static thread_local Bf16Rows known;
  return known;
}

namespace {
constexpr int64_t MAX_GEMV_SUMS = 4096;  // tokens times row groups per pop: 256 KiB of sums
constexpr int64_t MAX_CALL_TOKENS = 512;  // tokens per pass: their int8 rows stay in the second-level cache while weights stream
thread_local Scratch shared_scratch, worker_scratch;

// A NUMA node's share of a matrix of the call, and the first row of x.
struct MatrixShare {
  const Layout* layout;
  const uint8_t* packed;
  int64_t n;
  const float* bias;
  uint8_t* y;
  int64_t stride, row;  // of y in elements; of x
  int64_t first = 0;    // column of y
  int64_t groups() const { return (n + 15) / 16; }
};
thread_local std::vector<MatrixShare> shares;
thread_local std::vector<int64_t> first_item;  // of each share, and the end
thread_local size_t first_share[MAX_NODES + 1];  // first share of each node, and the end

// Adds the rows of `whole` that `node` holds.
void add_share(const MatrixShare& whole, int64_t k, int node) {
  const int64_t first = node_begin(whole.groups(), node), last = node_begin(whole.groups(), node + 1);
  if (first == last) return;
  MatrixShare mine = whole;
  mine.packed += first * group_bytes(*whole.layout, k), mine.n = std::min(whole.n, last * 16) - first * 16;
  mine.bias = whole.bias ? whole.bias + first * 16 : nullptr, mine.first = whole.first + first * 16;
  shares.push_back(mine);
}

// Matrices with k columns, each times `tokens` rows of x: separate rows, or the same rows for all.
struct Call {
  const Kernels& kernels;
  const std::vector<MatrixShare>& shares;
  const std::vector<int64_t>& first_item;
  int64_t k;
  DType type;
  const uint8_t* x;
  int64_t sets;  // x has sets * tokens rows
  int tokens;
  ActTiles all;    // activations of all sets
  int64_t groups_per_item;
  Queue rows{};
  StealingRange items{};

  void prepare(Scratch& own) {  // complete tiles per worker, because two workers that write one cache line would contend for it
    float* buffer = own.take<float>(k);
    const RowView row = all.q ? take_row(own, k) : RowView{};
    const int tiles = slice(all, 0, tokens, kernels).tiles;
    for (int64_t tile; (tile = rows.take()) < sets * tiles;) {
      const int64_t first = tile / tiles * tokens;
      const ActTiles mine = slice(all, first, tokens, kernels);
      for_tile(mine, int(tile % tiles), [&](int t, TileSlot at) { scatter_row(mine, at, first + t, row, buffer); });
    }
  }
  void scatter_row(const ActTiles& to, TileSlot t, int64_t row_of_x, const RowView& row, float* buffer) const {
    const float* values = as_floats(x + row_of_x * k * size_of(type), type, k, buffer);
    if (to.f || to.bf16) kernels.scatter_floats(values, to, t, 0, k);
    if (to.q) kernels.quantize(values, 16, k, row), kernels.scatter(row, to, t, 0, k);
  }
  // Each worker quantizes a single token itself, which is faster than waiting for another worker.
  ActTiles single_token_input(Scratch& own) const {
    const ActTiles one = slice(take_tokens(own, 1, k, all.q, all.f, false), 0, 1, kernels);
    scatter_row(one, {0, 1, 0}, 0, all.q ? take_row(own, k) : RowView{}, own.take<float>(k));
    return one;
  }
  // Groups of [token][16] -> y, with bias. Row by row, because each row of y is on another page.
  void finish(const MatrixShare& p, int64_t group, int64_t count, const float* sums) const {
    const int64_t row = group * 16, whole = std::min(count, (p.n - row) / 16);
    for (int t = 0; t < tokens; ++t, sums += 16) {
      uint8_t* y = p.y + (t * p.stride + p.first + row) * int64_t(size_of(type));
      if (!p.bias) kernels.write(sums, tokens * 16, whole, type, y);
      for (int64_t g = p.bias ? 0 : whole; g < count; ++g) {
        const int64_t width = std::min<int64_t>(16, p.n - row - g * 16);
        float v[16];
        for (int64_t i = 0; i < width; ++i) v[i] = sums[g * tokens * 16 + i] + (p.bias ? p.bias[row + g * 16 + i] : 0.0f);
        from_floats(v, type, width, y + g * 16 * int64_t(size_of(type)));
      }
    }
  }
  const MatrixShare& share_of_item(int64_t item, int64_t& group) const {
    const size_t at = size_t(std::upper_bound(first_item.begin(), first_item.end(), item) - first_item.begin()) - 1;
    group = (item - first_item[at]) * groups_per_item;
    return shares[at];
  }
  const uint8_t* weights(int64_t item) const {
    int64_t group;
    const MatrixShare& p = share_of_item(item, group);
    return p.packed + group * group_bytes(*p.layout, k);
  }
  void multiply(Scratch& own, const ActTiles* single_token) {
    float* sums = own.take<float>(items.max_length * groups_per_item * tokens * 16);
    uint8_t* work = own.take<uint8_t>(WORK_BYTES);
    const auto segment_end = [&](int64_t item) { return *std::upper_bound(first_item.begin(), first_item.end(), item); };
    items.for_each(segment_end, [&](Range run, Range then) {
      int64_t first;
      const MatrixShare& p = share_of_item(run.first, first);
      const int64_t count = std::min(run.count * groups_per_item, p.groups() - first);
      const ActTiles mine = single_token ? *single_token : slice(all, p.row, tokens, kernels);
      kernels.multiply(*p.layout, weights(run.first), int(count), mine, sums, work, then.count ? weights(then.first) : nullptr);
      finish(p, first, count, sums);
    });
  }
};

// `shares` on x [sets][tokens][k].
void multiply_shares(const void* x, DType type, int64_t sets, int tokens, int64_t k, bool bf16) {
  bool ints = false, floats = false;
  int64_t groups = 0;
  for (const MatrixShare& p : shares) (p.layout->is_float ? floats : ints) = true, groups += p.groups();
  const int pool_size = threads();
  const int64_t rows = sets * tokens;
  const int64_t groups_per_item = tokens > 16 && groups >= 64 * pool_size ? 8 : groups >= 8 * pool_size ? 2 : 1;  // a GEMM tile has two groups; eight are written to y at once
  const int64_t max_length = tokens > 16 ? 1 : MAX_GEMV_SUMS / (tokens * groups_per_item);
  first_item.assign(1, 0);
  for (const MatrixShare& p : shares) first_item.push_back(first_item.back() + (p.groups() + groups_per_item - 1) / groups_per_item);
  shared_scratch.reset(tokens_bytes(rows, k, ints, floats));
  Call call{.kernels = kernels(), .shares = shares, .first_item = first_item, .k = k, .type = type, .x = static_cast<const uint8_t*>(x),
            .sets = sets, .tokens = tokens, .all = take_tokens(shared_scratch, rows, k, ints, floats, bf16), .groups_per_item = groups_per_item, .rows = {},
            .items = {.max_length = max_length, .num_workers = pool_size, .shares = {}}};
  for (int node = 0; node < nodes(); ++node) call.items.set_share(node, first_item[first_share[node]], first_item[first_share[node + 1]]);
  parallel([&](int) {
    worker_scratch.reset(row_bytes(k) + tokens_bytes(1, k, ints, floats) + size_t(max_length * groups_per_item) * tokens * 64 + WORK_BYTES + 1024);
    if (rows == 1 && !bf16) {
      const ActTiles one = call.single_token_input(worker_scratch);
      call.multiply(worker_scratch, &one);
      return;
    }
    call.prepare(worker_scratch);
    barrier();
    call.multiply(worker_scratch, nullptr);
  });
}
}  // namespace

void linear_parts(const void* x, DType type, int64_t tokens, int64_t k, const LinearPart* parts, int count, bool all_bf16) {
  const int64_t size = int64_t(size_of(type));
  for_bf16_ranges(tokens, all_bf16, [&](int64_t first, int64_t some, bool bf16) {
    for (int64_t t = first; t < first + some; t += MAX_CALL_TOKENS) {
      shares.clear();
      for (int node = 0; node < nodes(); ++node) {
        first_share[node] = shares.size();
        for (const LinearPart* p = parts; p < parts + count; ++p)
          add_share({p->layout, p->packed, p->n, p->bias, static_cast<uint8_t*>(p->y) + t * p->stride * size, p->stride, 0}, k, node);
      }
      first_share[nodes()] = shares.size();
      multiply_shares(static_cast<const uint8_t*>(x) + t * k * size, type, 1, int(std::min(MAX_CALL_TOKENS, first + some - t)), k, bf16);
    }
  });
}

void linear(const void* x, DType type, int64_t tokens, const Layout& layout, const uint8_t* packed, int64_t n, int64_t k,
            const float* bias, void* y, bool all_bf16) {
  const LinearPart part{&layout, packed, n, bias, y, n};
  linear_parts(x, type, tokens, k, &part, 1, all_bf16);
}

void linear_batched(const void* x, DType type, int64_t matrices, int64_t tokens, const Layout& layout, const uint8_t* packed, int64_t n,
                    int64_t k, void* y) {
  const size_t matrix = packed_bytes(layout, n, k);
  const int64_t size = int64_t(size_of(type)), at_once = tokens > MAX_CALL_TOKENS ? 1 : 16 * MAX_CALL_TOKENS / std::max<int64_t>(tokens, 1);
  for (int64_t m = 0; m < matrices; m += at_once) {
    const int64_t count = std::min(at_once, matrices - m);
    const uint8_t* from = static_cast<const uint8_t*>(x) + m * tokens * k * size;
    uint8_t* to = static_cast<uint8_t*>(y) + m * tokens * n * size;
    if (tokens > MAX_CALL_TOKENS) {
      linear(from, type, tokens, layout, packed + m * matrix, n, k, nullptr, to);
      continue;
    }
    shares.clear();
    for (int64_t i = 0; i < count; ++i)
      shares.push_back({&layout, packed + (m + i) * matrix, n, nullptr, to + i * tokens * n * size, n, i * tokens});
    for (int node = 0; node <= nodes(); ++node) first_share[node] = size_t(std::clamp<int64_t>(matrices * node / nodes() - m, 0, count));
    multiply_shares(from, type, count, int(tokens), k, false);
  }
}

void quantize_rows(const Layout& layout, const float* x, int64_t count, int64_t k, uint8_t* out) {
  for (int64_t block = 0; block < count * k / layout.block; ++block)
    kernels().quantize_block(x + block * layout.block, layout.block, layout.code != INT8_128 && layout.code != Q8_0, out + block * layout.bytes);
}

void unpack_rows(const Layout& layout, const uint8_t* packed, int64_t k, const int64_t* rows, int64_t count, float* out) {
  const size_t stride = group_bytes(layout, k);
  std::vector<int64_t> runs;  // starts of runs of rows in one group: a group is unpacked once per run
  for (int64_t i = 0; i < count; ++i)
    if (!i || rows[i] / 16 != rows[i - 1] / 16) runs.push_back(i);
  runs.push_back(count);
  Queue queue;
  parallel([&](int) {
    worker_scratch.reset(size_t(k) * 64 + 64);
    float* lanes = worker_scratch.take<float>(k * 16);
    for (int64_t run; (run = queue.take()) + 1 < int64_t(runs.size());) {
      kernels().unpack(layout, packed + rows[runs[run]] / 16 * stride, k, lanes);
      for (int64_t from = 0; from < k; from += 128)  // the lanes of 128 columns stay in the first-level cache
        for (int64_t i = runs[run]; i < runs[run + 1]; ++i)
          for (int64_t c = from; c < std::min(k, from + 128); ++c) out[i * k + c] = lanes[c * 16 + rows[i] % 16];
    }
  });
}
}  // namespace ktx
