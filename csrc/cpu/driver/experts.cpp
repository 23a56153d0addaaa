// Activations are quantized once; then two phases with a barrier between: (gate, up, activation, quantize) and (down,
// weighted sum). Each phase is one queue of (expert, block of rows). Experts with few tokens take the GEMV kernels,
// others the GEMM. A NUMA node has a share of the rows of every matrix and the part of the queue that reads them.
//
// Letters: c = the call, k = kernels, e = expert id, t = token, g = group of 16 rows. A slot is one (token, expert)
// pair.
#include "cpu/driver/experts.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <vector>

#include "cpu/runtime/pool.h"
#include "cpu/driver/scratch.h"
#include "cpu/driver/bf16_rows.h"

namespace ktx {
namespace {
// per job, and per expert: see MAX_PASS_TOKENS in linear.cpp
constexpr int64_t MAX_JOB_TOKENS = 2048, MAX_EXPERT_TOKENS = 512;
constexpr int GATE_UP_GROUPS = 4;  // row groups of gate and up per item: 64 rows are two blocks of 32 columns for down
constexpr int64_t MAX_GEMV_TOKENS = 16;  // more tokens are a large batch: short ranges
constexpr int64_t MAX_GEMV_RANGE = 64;   // items per pop with few tokens
// Items per pop with many tokens: adjacent items write the same cache lines of a tile, so four, as long as the sums of
// a projection fit 256 KiB.
constexpr int64_t MAX_GEMM_RANGE = 4, MAX_SUMS = 4096;
thread_local Scratch shared_scratch, worker_scratch;
thread_local std::vector<int64_t> load_order, id_order;

int64_t now_ns() {
  const auto since_epoch = std::chrono::steady_clock::now().time_since_epoch();
  return std::chrono::duration_cast<std::chrono::nanoseconds>(since_epoch).count();
}

// Atomic, because several threads may add, and readers take no lock.
void add_relaxed(int64_t& to, int64_t more) { std::atomic_ref<int64_t>(to).fetch_add(more, std::memory_order_relaxed); }

// The items of a phase: blocks of `groups` row groups of matrices with equal numbers of rows, ordered by NUMA node,
// then by matrix. A node's items are contiguous, so that its workers read its own memory.
struct RowBlocks {
  int64_t groups = 1, matrices = 0;
  int64_t first[MAX_NODES + 1];  // first group of a node's share
  int64_t begin[MAX_NODES + 1];  // first item of a node's share

  // Cuts `num_matrices` matrices of num_groups row groups into items of `groups_per_item` groups, node by node.
  void partition(int64_t num_groups, int64_t groups_per_item, int64_t num_matrices) {
    groups = groups_per_item, matrices = num_matrices, begin[0] = 0;
    for (int node = 0; node <= nodes(); ++node) first[node] = node_begin(num_groups, node);
    for (int node = 0; node < nodes(); ++node) begin[node + 1] = begin[node] + blocks_per_matrix(node) * matrices;
  }
  int64_t blocks_per_matrix(int node) const { return (first[node + 1] - first[node] + groups - 1) / groups; }
  int64_t count() const { return begin[nodes()]; }

  // Where an item is; group: the item's first; last: end of the node's share of groups
  struct Location {
    int64_t matrix, group, last;
    int node;
  };
  Location locate(int64_t item) const {
    int node = 0;
    while (item >= begin[node + 1]) ++node;
    const int64_t per_matrix = blocks_per_matrix(node), at = item - begin[node];
    return {at / per_matrix, first[node] + at % per_matrix * groups, first[node + 1], node};
  }
  int64_t end_of_matrix(int64_t item) const {  // one past the last item of the matrix on this node
    int node = 0;
    while (item >= begin[node + 1]) ++node;
    const int64_t per_matrix = blocks_per_matrix(node);
    return begin[node] + ((item - begin[node]) / per_matrix + 1) * per_matrix;
  }
};

// One pass over at most MAX_JOB_TOKENS tokens.
struct MoEJob {
  const ExpertsCall& c;
  const Kernels& k;
  int64_t tokens;
  const uint8_t* x;
  uint8_t* out;
  const int64_t* ids;
  const float* weights;
  // Slots are the (token, choice) pairs sorted by expert.
  int64_t* offset;      // [experts+1] first slot of each expert, and the end
  int64_t* slot_token;  // [slots]
  int64_t* slot_of;     // [tokens*top] slot of each pair (-1: skipped), then [experts] counters of group_by_expert
  float* slot_weight;   // [slots]
  // experts with tokens: by descending number of tokens, and by id
  std::vector<int64_t>& experts_by_load;
  std::vector<int64_t>& experts_by_id;
  ActTiles gate_up_input, down_input;     // activations of all slots: input of gate/up, input of down
  RowBlocks gate_up_blocks, down_blocks;  // gate and up: one matrix per active expert; down: one matrix for all experts
  RowView quantized;                      // [tokens] rows
  bool single_token;                      // one token, each expert at most once
  int64_t all_tiles;                      // tiles of the inputs of all active experts
  Queue tokens_to_quantize, input_tiles;  // for workers of quantize_inputs
  StealingRange gate_up_queue, down_queue;
  // per NUMA node: compute time of its workers, and their number
  std::atomic<int64_t> worker_ns[MAX_NODES] = {}, num_workers[MAX_NODES] = {};

  // Number of tokens of expert e.
  int count(int64_t e) const { return int(offset[e + 1] - offset[e]); }
  bool quantizes_input() const { return gate_up_input.q; }

  // Sorts the (token, choice) pairs by expert with a counting sort, so that each expert's tokens are consecutive slots
  // and its weights are read once. Pairs with an id out of range get no slot.
  void group_by_expert() {
    std::fill(offset, offset + c.experts + 1, 0);
    const int64_t pairs = tokens * c.top;
    for (int64_t i = 0; i < pairs; ++i)
      if (ids[i] >= 0 && ids[i] < c.experts) ++offset[ids[i] + 1];
    for (int64_t e = 0; e < c.experts; ++e) offset[e + 1] += offset[e];
    int64_t* next = slot_of + pairs;  // one counter per expert
    std::copy(offset, offset + c.experts, next);
    for (int64_t i = 0; i < pairs; ++i) {
      const bool valid = ids[i] >= 0 && ids[i] < c.experts;
      const int64_t slot = slot_of[i] = valid ? next[ids[i]]++ : -1;
      if (valid) slot_token[slot] = i / c.top, slot_weight[slot] = weights[i];
    }
    experts_by_id.clear();
    for (int64_t e = 0; e < c.experts; ++e)
      if (count(e)) experts_by_id.push_back(e);
    experts_by_load = experts_by_id;
    std::sort(experts_by_load.begin(), experts_by_load.end(),
        [&](int64_t a, int64_t b) { return count(a) != count(b) ? count(a) > count(b) : a < b; });
  }

  // Quantizes each token once, then copies it to the tiles of all of its experts. A worker fills complete tiles,
  // because two workers that write one cache line would contend for it.
  void quantize_inputs(Scratch& own) {
    float* buffer = own.take<float>(c.hidden);
    if (quantizes_input()) {
      for (int64_t t; (t = tokens_to_quantize.take()) < tokens;)
        k.quantize(values_of(t, buffer), 16, c.hidden, quantized_row(t));
      barrier();
    }
    size_t index = 0;  // of the tile's expert in experts_by_load; `tiles_before`: tiles of the experts before it
    for (int64_t tile, tiles_before = 0; (tile = input_tiles.take()) < all_tiles;) {
      while (tile - tiles_before >= gate_up_tiles(index).tiles) tiles_before += gate_up_tiles(index++).tiles;
      const ActTiles to = gate_up_tiles(index);
      for_tile(to, int(tile - tiles_before), [&](int i, TileSlot slot_in_tile) {
        const int64_t t = slot_token[offset[experts_by_load[index]] + i];
        if (gate_up_input.q) k.scatter(quantized_row(t), to, slot_in_tile, 0, c.hidden);
        if (gate_up_input.f || gate_up_input.bf16)
          k.scatter_floats(values_of(t, buffer), to, slot_in_tile, 0, c.hidden);
      });
    }
  }
  const float* values_of(int64_t t, float* buffer) const {
    return as_floats(x + t * c.hidden * size_of(c.type), c.type, c.hidden, buffer);
  }
  RowView quantized_row(int64_t t) const {
    return {quantized.q + t * c.hidden, quantized.scale + t * (c.hidden / 32), quantized.sum16 + t * (c.hidden / 16)};
  }
  // The input of gate and up of the i-th expert by load.
  ActTiles gate_up_tiles(size_t i) const {
    return slice(gate_up_input, offset[experts_by_load[i]], count(experts_by_load[i]), k);
  }

  // Returns the input of gate and up for a single token, which is the same for all of its experts. Each worker
  // quantizes it, which is faster than waiting for another worker.
  ActTiles single_token_input(Scratch& own) const {
    constexpr TileSlot ONLY_TOKEN{.first = 0, .count = 1, .at = 0};
    ActTiles one = slice(take_activations(own, 1, c.hidden, gate_up_input.q, gate_up_input.f, /*bf16=*/false), 0, 1, k);
    const float* values = values_of(0, own.take<float>(c.hidden));
    if (one.q) {
      const RowView row = take_row(own, c.hidden);
      k.quantize(values, /*step=*/16, c.hidden, row), k.scatter(row, one, ONLY_TOKEN, /*from=*/0, c.hidden);
    }
    if (one.f) k.scatter_floats(values, one, ONLY_TOKEN, /*from=*/0, c.hidden);
    return one;
  }

  // Returns the packed rows of expert e at `location`. Packed order: the rows of all experts on the first node, then on
  // the next.
  const uint8_t* packed_rows(const ExpertMatrix& matrix, int64_t e, const RowBlocks& blocks,
      const RowBlocks::Location& location, int64_t columns) const {
    const int64_t first = blocks.first[location.node], node_groups = blocks.first[location.node + 1] - first;
    return matrix.packed +
        (c.experts * first + e * node_groups + location.group - first) * int64_t(group_bytes(*matrix.layout, columns));
  }
  const uint8_t* gate_up_weights(const ExpertMatrix& matrix, int64_t item) const {
    const RowBlocks::Location location = gate_up_blocks.locate(item);
    return packed_rows(matrix, experts_by_load[location.matrix], gate_up_blocks, location, c.hidden);
  }
  const uint8_t* down_weights(int64_t item, int64_t e) const {
    return packed_rows(c.down, e, down_blocks, down_blocks.locate(item), c.inner);
  }
  // sums[group][token][16] = rows [group*16, (group+groups)*16) of expert e's matrix times every token of `in`, plus
  // the bias. `next`: the weights to prefetch, or null.
  void multiply_and_bias(const ExpertMatrix& matrix, int64_t e, const uint8_t* packed, int64_t group, int groups,
      int64_t rows_per_expert, const ActTiles& in, float* sums, uint8_t* work, const uint8_t* next) {
    k.multiply(*matrix.layout, packed, groups, in, sums, work, next);
    if (!matrix.bias) return;
    const float* bias = matrix.bias + e * rows_per_expert + group * 16;
    for (int g = 0; g < groups; ++g)
      for (int t = 0; t < in.n; ++t)
        for (int i = 0; i < 16 && (group + g) * 16 + i < rows_per_expert; ++i)
          sums[(g * in.n + t) * 16 + i] += bias[g * 16 + i];
  }

  // Quantizes the activations of one item, rows group*16 and on of expert e, into the input tiles of down. The rows of
  // gate and up are the columns of down, and the products are [group][token][16]: so each token's columns are collected
  // with a stride of the number of tokens. Done here, while the values are cached; down starts with its input complete.
  void quantize_down_input(int64_t e, int64_t group, int groups, const float* activations, const RowView& row,
      float* columns_buffer) {
    const int n = count(e);
    const ActTiles to = slice(down_input, offset[e], n, k);
    const int64_t first = group * 16, width = std::min<int64_t>(groups * 16, c.inner - first);
    for (int tile = 0; tile < to.tiles; ++tile)
      for_tile(to, tile, [&](int t, TileSlot slot_in_tile) {
        if (down_input.f || down_input.bf16) {
          for (int64_t i = 0; i < width; ++i) columns_buffer[i] = activations[(i / 16 * n + t) * 16 + i % 16];
          k.scatter_floats(columns_buffer, to, slot_in_tile, first, width);
        } else {
          k.quantize(activations + t * 16, n * 16, width, row), k.scatter(row, to, slot_in_tile, first, width);
        }
      });
  }

  // Runs a worker in the first phase, per item: gate and up products of some rows of one expert, activation,
  // quantization of the result as the input of down. Each product prefetches the weights of the next one; the last item
  // prefetches the first weights of the down phase.
  void gate_up_phase(Scratch& own, int worker) {
    const int64_t max_tokens = count(experts_by_load.empty() ? 0 : experts_by_load[0]);
    const int64_t max_rows = gate_up_queue.max_length * GATE_UP_GROUPS * 16;
    float *gate = own.take<float>(max_rows * max_tokens), *up = own.take<float>(max_rows * max_tokens),
          *columns_buffer = own.take<float>(max_rows);
    const RowView row = take_row(own, max_rows);
    uint8_t* work = own.take<uint8_t>(WORK_BYTES);
    const ActTiles single_input = single_token ? single_token_input(own) : ActTiles{};
    const Range first_down = down_queue.peek(worker, [&](int64_t item) { return down_blocks.end_of_matrix(item); });
    const uint8_t* down_start = first_down.count && !experts_by_load.empty()
        ? down_weights(first_down.first, experts_by_id[0])
        : nullptr;
    // Computes one range of items, adjacent rows of one expert: gate, up, activation, input of down.
    gate_up_queue.for_each([&](int64_t item) { return gate_up_blocks.end_of_matrix(item); },
        [&](Range range, Range next_range) {
      const RowBlocks::Location location = gate_up_blocks.locate(range.first);
      const int64_t e = experts_by_load[location.matrix];
      const int groups = int(std::min<int64_t>(range.count * GATE_UP_GROUPS, location.last - location.group));
      const ActTiles in = single_token ? single_input : gate_up_tiles(size_t(location.matrix));
      const uint8_t* up_weights = gate_up_weights(c.up, range.first);
      multiply_and_bias(c.gate, e, gate_up_weights(c.gate, range.first), location.group, groups, c.inner, in, gate,
          work, up_weights);
      multiply_and_bias(c.up, e, up_weights, location.group, groups, c.inner, in, up, work,
          next_range.count ? gate_up_weights(c.gate, next_range.first) : down_start);
      k.gated_activation(c.act, c.alpha, c.limit, gate, up, gate, int64_t(groups) * in.n * 16);
      quantize_down_input(e, location.group, groups, gate, row, columns_buffer);
    });
  }

  // Runs a worker in the second phase, per item: some rows of down of every expert with tokens, summed per token by
  // router weight, and written to the output. An item covers all experts, so no two workers add to one output row.
  void down_phase(Scratch& own) {
    const int64_t max_tokens = count(experts_by_load.empty() ? 0 : experts_by_load[0]),
                  columns = down_queue.max_length * down_blocks.groups * 16;
    float* sums = own.take<float>(columns * std::max<int64_t>(max_tokens, 1));
    float* total = own.take<float>(columns * tokens);
    uint8_t* work = own.take<uint8_t>(WORK_BYTES);
    // Computes one range of items: the same adjacent rows of every expert's down matrix, summed into `total` [token].
    down_queue.for_each([&](int64_t item) { return down_blocks.end_of_matrix(item); },
        [&](Range range, Range next_range) {
      const RowBlocks::Location location = down_blocks.locate(range.first);
      const int64_t first = location.group;
      const int groups = int(std::min<int64_t>(range.count * down_blocks.groups, location.last - first));
      std::fill(total, total + columns * tokens, 0.0f);
      // by id, so that the sum over a token's experts does not depend on the batch
      for (size_t i = 0; i < experts_by_id.size(); ++i) {
        const int64_t e = experts_by_id[i];
        const uint8_t* next = i + 1 < experts_by_id.size() ? down_weights(range.first, experts_by_id[i + 1])
            : next_range.count                             ? down_weights(next_range.first, experts_by_id[0])
                                                           : nullptr;
        const ActTiles in = slice(down_input, offset[e], count(e), k);
        multiply_and_bias(c.down, e, packed_rows(c.down, e, down_blocks, location, c.inner), first, groups, c.hidden,
            in, sums, work, next);
        k.add_weighted(sums, in.n, groups, slot_token + offset[e], slot_weight + offset[e], total, columns);
      }
      const int64_t width = std::min<int64_t>(groups * 16, c.hidden - first * 16);
      for (int64_t t = 0; t < tokens; ++t) {
        const float* from = total + t * columns;
        uint8_t* to = out + (t * c.hidden + first * 16) * int64_t(size_of(c.type));
        k.write(from, 16, width / 16, c.type, to);
        if (width % 16)
          from_floats(from + width / 16 * 16, c.type, width % 16, to + width / 16 * 16 * int64_t(size_of(c.type)));
      }
    });
  }

  // 0 without statistics, because reading the clock costs time.
  int64_t clock_ns() const { return c.stats.activations ? now_ns() : 0; }
  void add_worker_time(int64_t nanoseconds) {
    if (!c.stats.activations) return;
    worker_ns[current_node()].fetch_add(nanoseconds, std::memory_order_relaxed),
        num_workers[current_node()].fetch_add(1, std::memory_order_relaxed);
  }
  // Adds this job to the layer's counters, which Python reads for statistics: tokens per expert, weight bytes, and mean
  // compute time per node.
  void report_stats() const {
    const ExpertStats& stats = c.stats;
    if (!stats.activations) return;
    for (int64_t e : experts_by_id) add_relaxed(stats.activations[e], count(e));
    const size_t bytes_per_expert = packed_bytes(*c.gate.layout, c.inner, c.hidden) +
        packed_bytes(*c.up.layout, c.inner, c.hidden) + packed_bytes(*c.down.layout, c.hidden, c.inner);
    add_relaxed(*stats.bytes, int64_t(experts_by_id.size() * bytes_per_expert));
    for (int node = 0; node < nodes(); ++node)
      if (const int64_t n = num_workers[node]) add_relaxed(stats.of_nodes[node], worker_ns[node] / n);
  }
};

// Runs `tokens` tokens of the call from `first` on, all in bf16 or none: reserves memory, sorts tokens by expert, cuts
// both phases into items, and runs quantization, gate/up and down in the pool with a barrier between them.
void run_job(const ExpertsCall& c, int64_t first, int64_t tokens, bool bf16) {
  const Kernels& k = kernels();
  const bool in_ints = !c.gate.layout->is_float || !c.up.layout->is_float,
             in_floats = c.gate.layout->is_float || c.up.layout->is_float;
  const bool down_in_ints = !c.down.layout->is_float;
  const int64_t slots = tokens * c.top, num_groups = (c.hidden + 15) / 16;
  const bool is_gemm = tokens > MAX_GEMV_TOKENS;
  const int pool_size = threads();
  shared_scratch.reset(activation_bytes(slots, c.hidden, in_ints, in_floats) +
      activation_bytes(slots, c.inner, down_in_ints, !down_in_ints) + size_t(2 * c.experts + 1 + 2 * slots) * 8 +
      size_t(slots) * 4 + (in_ints ? size_t(tokens) * c.hidden * 2 : 0) + 2048);
  Scratch& s = shared_scratch;
  MoEJob job{.c = c,
      .k = k,
      .tokens = tokens,
      .x = static_cast<const uint8_t*>(c.x) + first * c.hidden * size_of(c.type),
      .out = static_cast<uint8_t*>(c.out) + first * c.hidden * size_of(c.type),
      .ids = c.ids + first * c.top,
      .weights = c.weights + first * c.top,
      .offset = s.take<int64_t>(c.experts + 1),
      .slot_token = s.take<int64_t>(slots),
      .slot_of = s.take<int64_t>(slots + c.experts),
      .slot_weight = s.take<float>(slots),
      .experts_by_load = load_order,
      .experts_by_id = id_order,
      .gate_up_input = take_activations(s, slots, c.hidden, in_ints, in_floats, bf16),
      .down_input = take_activations(s, slots, c.inner, down_in_ints, !down_in_ints, bf16),
      .gate_up_blocks = {},
      .down_blocks = {},
      .quantized = {},
      .single_token = false,
      .all_tiles = 0,
      .tokens_to_quantize = {},
      .input_tiles = {},
      .gate_up_queue = {},
      .down_queue = {}};
  if (job.gate_up_input.q)
    job.quantized = {s.take<int8_t>(tokens * c.hidden), s.take<float>(tokens * (c.hidden / 32)),
        s.take<int32_t>(tokens * (c.hidden / 16))};
  job.group_by_expert();
  for (size_t i = 0; i < job.experts_by_load.size(); ++i) job.all_tiles += job.gate_up_tiles(i).tiles;
  job.gate_up_queue.num_workers = job.down_queue.num_workers = pool_size;
  const int64_t max_tokens = job.experts_by_load.empty() ? 0 : job.count(job.experts_by_load[0]);
  job.gate_up_queue.max_length = !is_gemm
      ? MAX_GEMV_RANGE
      : std::clamp<int64_t>(MAX_SUMS / (std::max<int64_t>(max_tokens, 1) * GATE_UP_GROUPS), 1, MAX_GEMM_RANGE);
  job.down_queue.max_length = is_gemm ? 1 : MAX_GEMV_RANGE;
  job.gate_up_blocks.partition((c.inner + 15) / 16, GATE_UP_GROUPS, int64_t(job.experts_by_load.size()));
  job.down_blocks.partition(num_groups, is_gemm ? std::clamp<int64_t>(num_groups / (4 * pool_size), 2, 4) : 1, 1);
  for (int node = 0; node < nodes(); ++node) {
    job.gate_up_queue.set_share(node, job.gate_up_blocks.begin[node], job.gate_up_blocks.begin[node + 1]);
    job.down_queue.set_share(node, job.down_blocks.begin[node], job.down_blocks.begin[node + 1]);
  }
  job.single_token = tokens == 1 && max_tokens == 1 && !bf16;
  const int64_t gate_up_rows = job.gate_up_queue.max_length * GATE_UP_GROUPS * 16,
                down_rows = job.down_queue.max_length * job.down_blocks.groups * 16;
  const size_t worker_bytes = row_bytes(c.hidden) + activation_bytes(1, c.hidden, in_ints, in_floats) +
      row_bytes(gate_up_rows) + size_t(2 * gate_up_rows * max_tokens) * 4 +
      size_t(down_rows) * (max_tokens + tokens) * 4 + WORK_BYTES + 8192;
  // Each worker takes part in three phases: quantization, gate and up, down. A barrier separates them, because a phase
  // reads what all workers wrote in the one before; each reuses the worker's scratch memory.
  parallel([&](int worker) {
    worker_scratch.reset(worker_bytes);
    if (!job.single_token) {
      job.quantize_inputs(worker_scratch);
      barrier();
      worker_scratch.reset(worker_bytes);
    }
    const int64_t gate_up_start = job.clock_ns();
    job.gate_up_phase(worker_scratch, worker);
    const int64_t gate_up_end = job.clock_ns();
    barrier();
    worker_scratch.reset(worker_bytes);
    const int64_t down_start = job.clock_ns();
    job.down_phase(worker_scratch);
    job.add_worker_time(job.clock_ns() - down_start + gate_up_end - gate_up_start);
  });
  job.report_stats();
}
}  // namespace

// Cuts the tokens of a call into ranges in bf16 and int8, and these into jobs of bounded memory, and runs the jobs one
// after another.
void experts(const ExpertsCall& call) {
  const int64_t start = call.stats.activations ? now_ns() : 0;
  // Bounds the tokens of a job, and the tokens that one expert gets with balanced routing.
  const int64_t job_tokens = std::min(MAX_JOB_TOKENS,
      std::max<int64_t>(1, call.experts / std::max<int64_t>(call.top, 1)) * MAX_EXPERT_TOKENS);
  for_bf16_ranges(call.tokens, /*all_bf16=*/false, [&](int64_t first, int64_t count, bool bf16) {
    for (int64_t t = first; t < first + count; t += job_tokens)
      run_job(call, t, std::min(job_tokens, first + count - t), bf16);
  });
  if (call.stats.activations) add_relaxed(*call.stats.nanoseconds, now_ns() - start);
}
}  // namespace ktx
