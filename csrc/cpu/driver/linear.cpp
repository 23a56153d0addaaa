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
// Returns the kernels of the picked instruction set (the table is in the order of Isa); for AVXVNNI those in the
// encoding that the machine has.
const Kernels& kernels() {
  static const Kernels* const table[] = {&AMXMODEL_KERNELS, &SCALAR_KERNELS, &AVX2_KERNELS,
      has_vex_vnni() ? &AVXVNNI_KERNELS : &AVX512VL_KERNELS, &AVX512VNNI_KERNELS, &AVX512VBMI_KERNELS,
      &AVX512BF16_KERNELS, &AMX_KERNELS};
  static_assert(std::size(table) == ISA_COUNT);
  return *table[picked_isa()];
}

Bf16Rows& bf16_rows() {
  static thread_local Bf16Rows known;
  return known;
}

namespace {
constexpr int MAX_GEMV_TOKENS = 16;  // more tokens are a large batch, whose items are long enough to pop one at a time
constexpr int64_t MAX_GEMV_SUMS = 4096;  // tokens times row groups per pop: 256 KiB of sums
// tokens per pass: their int8 rows stay in the second-level cache while weights stream
constexpr int64_t MAX_PASS_TOKENS = 512;
thread_local Scratch shared_scratch, worker_scratch;

// Letters: k = columns of the weights, n = their rows, t = token, g = group of 16 rows, p = a MatrixShare.

// The rows of one matrix that a NUMA node holds, with where they read x and write y.
struct MatrixShare {
  const Layout* layout;
  const uint8_t* packed;
  int64_t n;
  const float* bias;
  uint8_t* y;
  int64_t stride;  // elements of y from one token's row to the next
  int64_t first_row_of_x;
  int64_t first = 0;  // column of y that the first row of the share computes
  int64_t groups() const { return (n + 15) / 16; }
};
thread_local std::vector<MatrixShare> shares;
thread_local std::vector<int64_t> first_item;            // of each share, and the end
thread_local size_t first_share_of_node[MAX_NODES + 1];  // and the end

// Appends the rows of `matrix` that `node` holds to `shares`; nothing if the node holds none of them (matrices with few
// rows).
void add_share(const MatrixShare& matrix, int64_t k, int node) {
  const int64_t first = node_begin(matrix.groups(), node), last = node_begin(matrix.groups(), node + 1);
  if (first == last) return;
  MatrixShare share = matrix;
  share.packed += first * group_bytes(*matrix.layout, k), share.n = std::min(matrix.n, last * 16) - first * 16;
  share.bias = matrix.bias ? matrix.bias + first * 16 : nullptr, share.first = matrix.first + first * 16;
  shares.push_back(share);
}

// Matrices with k columns, each times `tokens` rows of x: its own set of rows, or the same set for all.
struct LinearJob {
  const Kernels& kernels;
  const std::vector<MatrixShare>& shares;
  const std::vector<int64_t>& first_item;
  int64_t k;
  DType type;
  const uint8_t* x;
  int64_t sets;  // x has sets * tokens rows
  int tokens;
  ActTiles all;             // activations of all sets
  int64_t groups_per_item;  // groups of 16 rows
  Queue input_tiles{};      // tiles of `all` that workers fill
  StealingRange items{};    // row groups of the matrices that workers multiply

  // Writes x, `sets` sets of `tokens` rows, in the forms and tiles that the kernels read: int8 (all.q), floats or bf16.
  // Workers take tile after tile of all sets. One worker fills a tile, because two that write one cache line would
  // contend for it.
  void quantize_inputs(Scratch& own) {
    float* buffer = own.take<float>(k);
    const RowView quantized_row = all.q ? take_row(own, k) : RowView{};
    const int tiles_per_set = slice(all, 0, tokens, kernels).tiles;
    for (int64_t tile; (tile = input_tiles.take()) < sets * tiles_per_set;) {
      const int64_t first = tile / tiles_per_set * tokens;
      const ActTiles tiles_of_set = slice(all, first, tokens, kernels);
      for_tile(tiles_of_set, int(tile % tiles_per_set),
          [&](int t, TileSlot at) { scatter_row(tiles_of_set, at, first + t, quantized_row, buffer); });
    }
  }
  // Writes one row of x to `slot` of a tile, in the forms that the weights need: quantized (to.q), floats or bf16.
  // `quantized_row` and `buffer` (k floats) are scratch.
  void scatter_row(const ActTiles& to, TileSlot slot, int64_t row_of_x, const RowView& quantized_row,
      float* buffer) const {
    const float* values = as_floats(x + row_of_x * k * size_of(type), type, k, buffer);
    if (to.f || to.bf16) kernels.scatter_floats(values, to, slot, 0, k);
    if (to.q) kernels.quantize(values, 16, k, quantized_row), kernels.scatter(quantized_row, to, slot, 0, k);
  }
  // Each worker quantizes a single token itself, which is faster than waiting for another worker.
  ActTiles single_token_input(Scratch& own) const {
    const ActTiles one = slice(take_activations(own, 1, k, all.q, all.f, /*bf16=*/false), 0, 1, kernels);
    scatter_row(one, {0, 1, 0}, 0, all.q ? take_row(own, k) : RowView{}, own.take<float>(k));
    return one;
  }
  // Writes sums [group][token][16] of an item to y, with bias. Row by row, because each row of y is on another page.
  // Full groups without bias take the vector kernel, others go value by value.
  void write_output(const MatrixShare& p, int64_t group, int64_t count, const float* sums) const {
    const int64_t row = group * 16, full_groups = std::min(count, (p.n - row) / 16);
    for (int t = 0; t < tokens; ++t, sums += 16) {
      uint8_t* y = p.y + (t * p.stride + p.first + row) * int64_t(size_of(type));
      if (!p.bias) kernels.write(sums, tokens * 16, full_groups, type, y);
      for (int64_t g = p.bias ? 0 : full_groups; g < count; ++g) {
        const int64_t width = std::min<int64_t>(16, p.n - row - g * 16);
        float v[16];
        for (int64_t i = 0; i < width; ++i)
          v[i] = sums[g * tokens * 16 + i] + (p.bias ? p.bias[row + g * 16 + i] : 0.0f);
        from_floats(v, type, width, y + g * 16 * int64_t(size_of(type)));
      }
    }
  }
  // Returns the share that an item belongs to, and sets `group` to the item's first group in the share.
  const MatrixShare& share_of_item(int64_t item, int64_t& group) const {
    const size_t at = size_t(std::upper_bound(first_item.begin(), first_item.end(), item) - first_item.begin()) - 1;
    group = (item - first_item[at]) * groups_per_item;
    return shares[at];
  }
  const uint8_t* weights_of_item(int64_t item) const {
    int64_t group;
    const MatrixShare& p = share_of_item(item, group);
    return p.packed + group * group_bytes(*p.layout, k);
  }
  // Multiplies: takes items (row groups of a matrix) until none are left, and writes their part of y. Each product
  // prefetches the weights of the worker's next item. `own_input`: x as this worker quantized it for itself (a single
  // token), or null to read the shared `all`.
  void multiply(Scratch& own, const ActTiles* own_input) {
    float* sums = own.take<float>(items.max_length * groups_per_item * tokens * 16);
    uint8_t* work = own.take<uint8_t>(WORK_BYTES);
    const auto segment_end = [&](int64_t item) {
      return *std::upper_bound(first_item.begin(), first_item.end(), item);
    };
    // Multiplies one range of items, adjacent row groups of one matrix.
    items.for_each(segment_end, [&](Range range, Range next_range) {
      int64_t first;
      const MatrixShare& p = share_of_item(range.first, first);
      const int64_t count = std::min(range.count * groups_per_item, p.groups() - first);
      const ActTiles input = own_input ? *own_input : slice(all, p.first_row_of_x, tokens, kernels);
      kernels.multiply(*p.layout, weights_of_item(range.first), int(count), input, sums, work,
          next_range.count ? weights_of_item(next_range.first) : nullptr);
      write_output(p, first, count, sums);
    });
  }
};

// Multiplies x [sets][tokens][k] by all matrices in `shares`: cuts their rows into items, and runs quantization and
// products in the pool. `bf16`: as AMX bf16 tiles.
void multiply_shares(const void* x, DType type, int64_t sets, int tokens, int64_t k, bool bf16) {
  bool ints = false, floats = false;
  int64_t groups = 0;
  for (const MatrixShare& p : shares) (p.layout->is_float ? floats : ints) = true, groups += p.groups();
  const int pool_size = threads();
  const int64_t rows = sets * tokens;
  // A GEMM tile has two groups, and eight are written to y at once; small matrices take fewer, so that every worker has
  // items.
  const bool is_gemm = tokens > MAX_GEMV_TOKENS;
  const int64_t groups_per_item = is_gemm && groups >= 64 * pool_size ? 8 : groups >= 8 * pool_size ? 2 : 1;
  const int64_t max_length = is_gemm ? 1 : MAX_GEMV_SUMS / (tokens * groups_per_item);
  first_item.assign(1, 0);
  for (const MatrixShare& p : shares)
    first_item.push_back(first_item.back() + (p.groups() + groups_per_item - 1) / groups_per_item);
  shared_scratch.reset(activation_bytes(rows, k, ints, floats));
  LinearJob job{.kernels = kernels(),
      .shares = shares,
      .first_item = first_item,
      .k = k,
      .type = type,
      .x = static_cast<const uint8_t*>(x),
      .sets = sets,
      .tokens = tokens,
      .all = take_activations(shared_scratch, rows, k, ints, floats, bf16),
      .groups_per_item = groups_per_item,
      .input_tiles = {},
      .items = {.max_length = max_length, .num_workers = pool_size, .shares = {}}};
  for (int node = 0; node < nodes(); ++node)
    job.items.set_share(node, first_item[first_share_of_node[node]], first_item[first_share_of_node[node + 1]]);
  // Each worker: writes tiles of the input, waits for the others, then multiplies. A single row is quantized by each
  // worker for itself, without a barrier.
  parallel([&](int) {
    worker_scratch.reset(row_bytes(k) + activation_bytes(1, k, ints, floats) +
        size_t(max_length * groups_per_item) * tokens * 64 + WORK_BYTES + 1024);
    if (rows == 1 && !bf16) {
      const ActTiles one = job.single_token_input(worker_scratch);
      job.multiply(worker_scratch, &one);
      return;
    }
    job.quantize_inputs(worker_scratch);
    barrier();
    job.multiply(worker_scratch, nullptr);
  });
}
}  // namespace

// Computes y = x W^T + bias for each part. Ranges of rows in bf16 and in int8 follow one another, each in passes of
// MAX_PASS_TOKENS rows, whose int8 copy stays in the second-level cache. Each pass lists the shares node by node, then
// multiplies.
void linear_parts(const void* x, DType type, int64_t tokens, int64_t k, const LinearPart* parts, int count,
    bool all_bf16) {
  const int64_t bytes_per_value = int64_t(size_of(type));
  // Multiplies one range of rows of x, all in bf16 or all in int8, pass by pass.
  for_bf16_ranges(tokens, all_bf16, [&](int64_t first, int64_t num_rows, bool bf16) {
    for (int64_t t = first; t < first + num_rows; t += MAX_PASS_TOKENS) {
      shares.clear();
      for (int node = 0; node < nodes(); ++node) {
        first_share_of_node[node] = shares.size();
        for (const LinearPart* p = parts; p < parts + count; ++p)
          add_share({.layout = p->layout,
                        .packed = p->packed,
                        .n = p->n,
                        .bias = p->bias,
                        .y = static_cast<uint8_t*>(p->y) + t * p->stride * bytes_per_value,
                        .stride = p->stride,
                        .first_row_of_x = 0},
              k, node);
      }
      first_share_of_node[nodes()] = shares.size();
      multiply_shares(static_cast<const uint8_t*>(x) + t * k * bytes_per_value, type, /*sets=*/1,
          int(std::min(MAX_PASS_TOKENS, first + num_rows - t)), k, bf16);
    }
  });
}

void linear(const void* x, DType type, int64_t tokens, const Layout& layout, const uint8_t* packed, int64_t n,
    int64_t k, const float* bias, void* y, bool all_bf16) {
  const LinearPart part{&layout, packed, n, bias, y, n};
  linear_parts(x, type, tokens, k, &part, 1, all_bf16);
}

// Multiplies each matrix by its own tokens. Whole matrices are distributed over the nodes, in order. A pass takes as
// many matrices as fit 16 * MAX_PASS_TOKENS rows of x; with more than MAX_PASS_TOKENS tokens one matrix follows
// another.
void linear_batched(const void* x, DType type, int64_t matrices, int64_t tokens, const Layout& layout,
    const uint8_t* packed, int64_t n, int64_t k, void* y) {
  const size_t matrix_bytes = packed_bytes(layout, n, k);
  const int64_t bytes_per_value = int64_t(size_of(type)),
                matrices_per_pass = tokens > MAX_PASS_TOKENS ? 1 : 16 * MAX_PASS_TOKENS / std::max<int64_t>(tokens, 1);
  for (int64_t m = 0; m < matrices; m += matrices_per_pass) {
    const int64_t count = std::min(matrices_per_pass, matrices - m);
    const uint8_t* from = static_cast<const uint8_t*>(x) + m * tokens * k * bytes_per_value;
    uint8_t* to = static_cast<uint8_t*>(y) + m * tokens * n * bytes_per_value;
    if (tokens > MAX_PASS_TOKENS) {
      linear(from, type, tokens, layout, packed + m * matrix_bytes, n, k, nullptr, to);
      continue;
    }
    shares.clear();
    for (int64_t i = 0; i < count; ++i)
      shares.push_back({.layout = &layout,
          .packed = packed + (m + i) * matrix_bytes,
          .n = n,
          .bias = nullptr,
          .y = to + i * tokens * n * bytes_per_value,
          .stride = n,
          .first_row_of_x = i * tokens});
    for (int node = 0; node <= nodes(); ++node)
      first_share_of_node[node] = size_t(std::clamp<int64_t>(matrices * node / nodes() - m, 0, count));
    multiply_shares(from, type, count, int(tokens), k, /*bf16=*/false);
  }
}

void quantize_rows(const Layout& layout, const float* x, int64_t count, int64_t k, uint8_t* out) {
  const bool four_bits = layout.code != INT8_128 && layout.code != Q8_0;
  for (int64_t block = 0; block < count * k / layout.block; ++block)
    kernels().quantize_block(x + block * layout.block, layout.block, four_bits, out + block * layout.bytes);
}

// Dequantizes rows to f32 (embedding look-ups). The kernel dequantizes a group of 16 rows at once, transposed
// ([column][16]), so rows of one group that follow each other share that work.
void unpack_rows(const Layout& layout, const uint8_t* packed, int64_t k, const int64_t* rows, int64_t count,
    float* out) {
  const size_t bytes_per_group = group_bytes(layout, k);
  std::vector<int64_t> runs;  // starts of runs of rows in one group: a group is unpacked once per run
  for (int64_t i = 0; i < count; ++i)
    if (!i || rows[i] / 16 != rows[i - 1] / 16) runs.push_back(i);
  runs.push_back(count);
  Queue untaken_runs;
  // Each worker takes runs (requested rows that follow each other in one group of 16): dequantizes the run's group to
  // [column][16] and copies its requested rows, transposed, to `out`.
  parallel([&](int) {
    worker_scratch.reset(size_t(k) * 64 + 64);
    float* columns = worker_scratch.take<float>(k * 16);
    for (int64_t run; (run = untaken_runs.take()) + 1 < int64_t(runs.size());) {
      const int64_t begin = runs[run], end = runs[run + 1];
      kernels().unpack(layout, packed + rows[begin] / 16 * bytes_per_group, k, columns);
      for (int64_t from = 0; from < k; from += 128)  // 128 columns of 16 rows stay in the first-level cache
        for (int64_t i = begin; i < end; ++i)
          for (int64_t c = from; c < std::min(k, from + 128); ++c) out[i * k + c] = columns[c * 16 + rows[i] % 16];
    }
  });
}
}  // namespace ktx
