// Activations are quantized once; then two phases with a barrier between: (gate, up, activation, quantize) and (down, weighted sum). Each phase is one
// queue of (expert, block of rows). Experts with few tokens take the GEMV kernels, others the GEMM. A NUMA node has a share of the rows of every matrix
// and the part of the queue that reads them.
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
constexpr int64_t MAX_JOB_TOKENS = 2048, MAX_EXPERT_TOKENS = 512;  // per job, and per expert: see MAX_CALL_TOKENS in linear.cpp
constexpr int GATE_UP_GROUPS = 4;  // row groups of gate and up per item: 64 rows are two blocks of 32 columns for down
constexpr int64_t MAX_GEMV_RANGE = 64;  // items per pop with few tokens
// Items per pop with many tokens: adjacent items write the same cache lines of a tile, so four, as long as the sums of a projection fit 256 KiB.
constexpr int64_t MAX_GEMM_RANGE = 4, MAX_SUMS = 4096;
thread_local Scratch shared_scratch, worker_scratch;
thread_local std::vector<int64_t> load_order, id_order;

int64_t now() { return std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

// Atomic, because several threads may add, and readers take no lock.
void add(int64_t& to, int64_t more) { std::atomic_ref<int64_t>(to).fetch_add(more, std::memory_order_relaxed); }

// Items of `groups` row groups of matrices with equal numbers of rows, ordered by NUMA node, then by matrix.
struct RowBlocks {
  int64_t groups = 1, matrices = 0;
  int64_t first[MAX_NODES + 1];  // first group of a node's share
  int64_t begin[MAX_NODES + 1];  // first item of a node's share

  void set(int64_t all_groups, int64_t groups_of_unit, int64_t count) {
    groups = groups_of_unit, matrices = count, begin[0] = 0;
    for (int node = 0; node <= nodes(); ++node) first[node] = node_begin(all_groups, node);
    for (int node = 0; node < nodes(); ++node) begin[node + 1] = begin[node] + blocks_per_matrix(node) * matrices;
  }
  int64_t blocks_per_matrix(int node) const { return (first[node + 1] - first[node] + groups - 1) / groups; }
  int64_t count() const { return begin[nodes()]; }

  struct Place { int64_t matrix, group, last; int node; };  // last: end of the node's share of groups
  Place place(int64_t unit) const {
    int node = 0;
    while (unit >= begin[node + 1]) ++node;
    const int64_t each = blocks_per_matrix(node), at = unit - begin[node];
    return {at / each, first[node] + at % each * groups, first[node + 1], node};
  }
  int64_t end_of_matrix(int64_t unit) const {  // one past the last item of the matrix on this node
    int node = 0;
    while (unit >= begin[node + 1]) ++node;
    const int64_t each = blocks_per_matrix(node);
    return begin[node] + ((unit - begin[node]) / each + 1) * each;
  }
};

struct MoEJob {
  const ExpertsCall& c;
  const Kernels& k;
  int64_t tokens;
  const uint8_t* x;
  uint8_t* out;
  const int64_t* ids;
  const float* weights;
  // slots: the (token, choice) pairs sorted by expert
  int64_t *offset, *slot_token, *slot_of;  // [experts+1], [slots], [tokens*top] (-1: skipped)
  float* slot_weight;
  std::vector<int64_t> &experts_by_load, &experts_by_id;  // experts with tokens: by descending number of tokens, and by id
  ActTiles gate_up_input, down_input;  // activations of all slots: input of gate/up, input of down
  RowBlocks gate_up_blocks, down_blocks;  // gate and up: one matrix per active expert; down: one matrix for all experts
  RowView quantized;  // [tokens] rows
  bool single_token;          // one token, each expert at most once
  int64_t all_tiles;  // tiles of the inputs of all active experts
  Queue rows, tiles;
  StealingRange gate_up_queue, down_queue;
  std::atomic<int64_t> worker_ns[MAX_NODES] = {}, num_workers[MAX_NODES] = {};  // per NUMA node: compute time of its workers, and their number

  int count(int64_t e) const { return int(offset[e + 1] - offset[e]); }
  bool ints_in() const { return gate_up_input.q; }

  void group() {
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
    std::sort(experts_by_load.begin(), experts_by_load.end(), [&](int64_t a, int64_t b) { return count(a) != count(b) ? count(a) > count(b) : a < b; });
  }

  // Quantizes each token once, then fills tiles. A worker fills complete tiles, because two workers that write one cache line would contend for it.
  void quantize_inputs(Scratch& own) {
    float* buffer = own.take<float>(c.hidden);
    if (ints_in()) {
      for (int64_t t; (t = rows.take()) < tokens;) k.quantize(values_of(t, buffer), 16, c.hidden, row_of(t));
      barrier();
    }
    size_t at = 0;  // index of the tile's expert, and the tiles of the experts before it
    for (int64_t tile, before = 0; (tile = tiles.take()) < all_tiles;) {
      while (tile - before >= input(at).tiles) before += input(at++).tiles;
      const ActTiles to = input(at);
      for_tile(to, int(tile - before), [&](int i, TileSlot spot) {
        const int64_t t = slot_token[offset[experts_by_load[at]] + i];
        if (gate_up_input.q) k.scatter(row_of(t), to, spot, 0, c.hidden);
        if (gate_up_input.f || gate_up_input.bf16) k.scatter_floats(values_of(t, buffer), to, spot, 0, c.hidden);
      });
    }
  }
  const float* values_of(int64_t t, float* buffer) const {
    return as_floats(x + t * c.hidden * size_of(c.type), c.type, c.hidden, buffer);
  }
  RowView row_of(int64_t t) const {
    return {quantized.q + t * c.hidden, quantized.scale + t * (c.hidden / 32), quantized.sum16 + t * (c.hidden / 16)};
  }
  ActTiles input(size_t i) const { return slice(gate_up_input, offset[experts_by_load[i]], count(experts_by_load[i]), k); }  // of the i-th expert by load

  // A single token is the same input for all of its experts. Each worker quantizes it, which is faster than waiting for another worker.
  ActTiles single_token_input(Scratch& own) const {
    ActTiles one = slice(take_tokens(own, 1, c.hidden, gate_up_input.q, gate_up_input.f, false), 0, 1, k);
    const float* values = values_of(0, own.take<float>(c.hidden));
    if (one.q) {
      const RowView row = take_row(own, c.hidden);
      k.quantize(values, 16, c.hidden, row), k.scatter(row, one, {0, 1, 0}, 0, c.hidden);
    }
    if (one.f) k.scatter_floats(values, one, {0, 1, 0}, 0, c.hidden);
    return one;
  }

  // Packed order: the rows of all experts on the first node, then on the next.
  const uint8_t* block(const ExpertMatrix& m, int64_t e, const RowBlocks& units, const RowBlocks::Place& p, int64_t columns) const {
    const int64_t first = units.first[p.node], held = units.first[p.node + 1] - first;
    return m.packed + (c.experts * first + e * held + p.group - first) * int64_t(group_bytes(*m.layout, columns));
  }
  const uint8_t* gate_up_weights(const ExpertMatrix& m, int64_t unit) const {
    const RowBlocks::Place p = gate_up_blocks.place(unit);
    return block(m, experts_by_load[p.matrix], gate_up_blocks, p, c.hidden);
  }
  const uint8_t* down_weights(int64_t unit, int64_t e) const { return block(c.down, e, down_blocks, down_blocks.place(unit), c.inner); }
  void project(const ExpertMatrix& m, int64_t e, const uint8_t* packed, int64_t group, int groups, int64_t rows_of, const ActTiles& in, float* sums,
               uint8_t* work, const uint8_t* next) {
    k.multiply(*m.layout, packed, groups, in, sums, work, next);
    if (!m.bias) return;
    const float* bias = m.bias + e * rows_of + group * 16;
    for (int g = 0; g < groups; ++g)
      for (int t = 0; t < in.n; ++t)
        for (int i = 0; i < 16 && (group + g) * 16 + i < rows_of; ++i) sums[(g * in.n + t) * 16 + i] += bias[g * 16 + i];
  }

  // Rows group*16 .. of an expert's activations, into the input of down.
  void quantize_down_input(int64_t e, int64_t group, int groups, const float* h, const RowView& row, float* line) {
    const int n = count(e);
    const ActTiles to = slice(down_input, offset[e], n, k);
    const int64_t first = group * 16, width = std::min<int64_t>(groups * 16, c.inner - first);
    for (int tile = 0; tile < to.tiles; ++tile)
      for_tile(to, tile, [&](int t, TileSlot spot) {
        if (down_input.f || down_input.bf16) {
          for (int64_t i = 0; i < width; ++i) line[i] = h[(i / 16 * n + t) * 16 + i % 16];
          k.scatter_floats(line, to, spot, first, width);
        } else {
          k.quantize(h + t * 16, n * 16, width, row), k.scatter(row, to, spot, first, width);
        }
      });
  }

  void gate_up_phase(Scratch& own, int worker) {
    const int64_t widest = count(experts_by_load.empty() ? 0 : experts_by_load[0]);
    const int64_t most = gate_up_queue.max_length * GATE_UP_GROUPS * 16;
    float *gate = own.take<float>(most * widest), *up = own.take<float>(most * widest), *line = own.take<float>(most);
    const RowView row = take_row(own, most);
    uint8_t* work = own.take<uint8_t>(WORK_BYTES);
    const ActTiles only = single_token ? single_token_input(own) : ActTiles{};
    const Range later = down_queue.peek(worker, [&](int64_t unit) { return down_blocks.end_of_matrix(unit); });
    const uint8_t* after = later.count && !experts_by_load.empty() ? down_weights(later.first, experts_by_id[0]) : nullptr;
    gate_up_queue.for_each([&](int64_t unit) { return gate_up_blocks.end_of_matrix(unit); }, [&](Range run, Range then) {
      const RowBlocks::Place p = gate_up_blocks.place(run.first);
      const int64_t e = experts_by_load[p.matrix];
      const int groups = int(std::min<int64_t>(run.count * GATE_UP_GROUPS, p.last - p.group));
      const ActTiles in = single_token ? only : input(size_t(p.matrix));
      const uint8_t* rows_of_up = gate_up_weights(c.up, run.first);
      project(c.gate, e, gate_up_weights(c.gate, run.first), p.group, groups, c.inner, in, gate, work, rows_of_up);
      project(c.up, e, rows_of_up, p.group, groups, c.inner, in, up, work, then.count ? gate_up_weights(c.gate, then.first) : after);
      k.gated_activation(c.act, c.alpha, c.limit, gate, up, gate, int64_t(groups) * in.n * 16);
      quantize_down_input(e, p.group, groups, gate, row, line);
    });
  }

  void down_phase(Scratch& own) {
    const int64_t widest = count(experts_by_load.empty() ? 0 : experts_by_load[0]), columns = down_queue.max_length * down_blocks.groups * 16;
    float* sums = own.take<float>(columns * std::max<int64_t>(widest, 1));
    float* total = own.take<float>(columns * tokens);
    uint8_t* work = own.take<uint8_t>(WORK_BYTES);
    down_queue.for_each([&](int64_t unit) { return down_blocks.end_of_matrix(unit); }, [&](Range run, Range then) {
      const RowBlocks::Place p = down_blocks.place(run.first);
      const int64_t first = p.group;
      const int groups = int(std::min<int64_t>(run.count * down_blocks.groups, p.last - first));
      std::fill(total, total + columns * tokens, 0.0f);
      for (size_t i = 0; i < experts_by_id.size(); ++i) {  // by id, so that the sum over a token's experts does not depend on the batch
        const int64_t e = experts_by_id[i];
        const uint8_t* next = i + 1 < experts_by_id.size() ? down_weights(run.first, experts_by_id[i + 1])
                                                     : then.count ? down_weights(then.first, experts_by_id[0]) : nullptr;
        const ActTiles in = slice(down_input, offset[e], count(e), k);
        project(c.down, e, block(c.down, e, down_blocks, p, c.inner), first, groups, c.hidden, in, sums, work, next);
        k.add_weighted(sums, in.n, groups, slot_token + offset[e], slot_weight + offset[e], total, columns);
      }
      const int64_t width = std::min<int64_t>(groups * 16, c.hidden - first * 16);
      for (int64_t t = 0; t < tokens; ++t) {
        const float* from = total + t * columns;
        uint8_t* to = out + (t * c.hidden + first * 16) * int64_t(size_of(c.type));
        k.write(from, 16, width / 16, c.type, to);
        if (width % 16) from_floats(from + width / 16 * 16, c.type, width % 16, to + width / 16 * 16 * int64_t(size_of(c.type)));
      }
    });
  }

  int64_t clock() const { return c.stats.activations ? now() : 0; }
  void add_worker_time(int64_t nanoseconds) {
    if (!c.stats.activations) return;
    worker_ns[current_node()].fetch_add(nanoseconds, std::memory_order_relaxed), num_workers[current_node()].fetch_add(1, std::memory_order_relaxed);
  }
  void report_stats() const {
    const ExpertStats& stats = c.stats;
    if (!stats.activations) return;
    for (int64_t e : experts_by_id) add(stats.activations[e], count(e));
    const size_t expert = packed_bytes(*c.gate.layout, c.inner, c.hidden) + packed_bytes(*c.up.layout, c.inner, c.hidden) + packed_bytes(*c.down.layout, c.hidden, c.inner);
    add(*stats.bytes, int64_t(experts_by_id.size() * expert));
    for (int node = 0; node < nodes(); ++node)
      if (const int64_t n = num_workers[node]) add(stats.of_nodes[node], worker_ns[node] / n);
  }
};

void run_job(const ExpertsCall& c, int64_t first, int64_t tokens, bool bf16) {
  const Kernels& k = kernels();
  const bool in_ints = !c.gate.layout->is_float || !c.up.layout->is_float, in_floats = c.gate.layout->is_float || c.up.layout->is_float;
  const bool down_ints = !c.down.layout->is_float;
  const int64_t slots = tokens * c.top, all_groups = (c.hidden + 15) / 16;
  const bool is_gemm = tokens > 16;
  const int pool_size = threads();
  shared_scratch.reset(tokens_bytes(slots, c.hidden, in_ints, in_floats) + tokens_bytes(slots, c.inner, down_ints, !down_ints) +
                       size_t(2 * c.experts + 1 + 2 * slots) * 8 + size_t(slots) * 4 + (in_ints ? size_t(tokens) * c.hidden * 2 : 0) + 2048);
  Scratch& s = shared_scratch;
  MoEJob job{.c = c, .k = k, .tokens = tokens,
              .x = static_cast<const uint8_t*>(c.x) + first * c.hidden * size_of(c.type),
              .out = static_cast<uint8_t*>(c.out) + first * c.hidden * size_of(c.type),
              .ids = c.ids + first * c.top, .weights = c.weights + first * c.top,
              .offset = s.take<int64_t>(c.experts + 1), .slot_token = s.take<int64_t>(slots),
              .slot_of = s.take<int64_t>(slots + c.experts), .slot_weight = s.take<float>(slots), .experts_by_load = load_order, .experts_by_id = id_order,
              .gate_up_input = take_tokens(s, slots, c.hidden, in_ints, in_floats, bf16), .down_input = take_tokens(s, slots, c.inner, down_ints, !down_ints, bf16),
              .gate_up_blocks = {}, .down_blocks = {},
              .quantized = {}, .single_token = false, .all_tiles = 0, .rows = {}, .tiles = {}, .gate_up_queue = {}, .down_queue = {}};
  if (job.gate_up_input.q) job.quantized = {s.take<int8_t>(tokens * c.hidden), s.take<float>(tokens * (c.hidden / 32)), s.take<int32_t>(tokens * (c.hidden / 16))};
  job.group();
  for (size_t i = 0; i < job.experts_by_load.size(); ++i) job.all_tiles += job.input(i).tiles;
  job.gate_up_queue.num_workers = job.down_queue.num_workers = pool_size;
  const int64_t widest = job.experts_by_load.empty() ? 0 : job.count(job.experts_by_load[0]);
  job.gate_up_queue.max_length = is_gemm ? std::clamp<int64_t>(MAX_SUMS / (std::max<int64_t>(widest, 1) * GATE_UP_GROUPS), 1, MAX_GEMM_RANGE) : MAX_GEMV_RANGE;
  job.down_queue.max_length = is_gemm ? 1 : MAX_GEMV_RANGE;
  job.gate_up_blocks.set((c.inner + 15) / 16, GATE_UP_GROUPS, int64_t(job.experts_by_load.size()));
  job.down_blocks.set(all_groups, is_gemm ? std::clamp<int64_t>(all_groups / (4 * pool_size), 2, 4) : 1, 1);
  for (int node = 0; node < nodes(); ++node) {
    job.gate_up_queue.set_share(node, job.gate_up_blocks.begin[node], job.gate_up_blocks.begin[node + 1]);
    job.down_queue.set_share(node, job.down_blocks.begin[node], job.down_blocks.begin[node + 1]);
  }
  job.single_token = tokens == 1 && widest == 1 && !bf16;
  const int64_t gate_up_rows = job.gate_up_queue.max_length * GATE_UP_GROUPS * 16, down_rows = job.down_queue.max_length * job.down_blocks.groups * 16;
  const size_t own = row_bytes(c.hidden) + tokens_bytes(1, c.hidden, in_ints, in_floats) + row_bytes(gate_up_rows) +
                     size_t(2 * gate_up_rows * widest) * 4 + size_t(down_rows) * (widest + tokens) * 4 + WORK_BYTES + 8192;
  parallel([&](int worker) {
    worker_scratch.reset(own);
    if (!job.single_token) {
      job.quantize_inputs(worker_scratch);
      barrier();
      worker_scratch.reset(own);
    }
    const int64_t start = job.clock();
    job.gate_up_phase(worker_scratch, worker);
    const int64_t end = job.clock();
    barrier();
    worker_scratch.reset(own);
    const int64_t again = job.clock();
    job.down_phase(worker_scratch);
    job.add_worker_time(job.clock() - again + end - start);
  });
  job.report_stats();
}
}  // namespace

void experts(const ExpertsCall& call) {
  const int64_t start = call.stats.activations ? now() : 0;
  const int64_t job = std::min(MAX_JOB_TOKENS, std::max<int64_t>(1, call.experts / std::max<int64_t>(call.top, 1)) * MAX_EXPERT_TOKENS);
  for_bf16_ranges(call.tokens, false, [&](int64_t first, int64_t count, bool bf16) {
    for (int64_t t = first; t < first + count; t += job) run_job(call, t, std::min(job, first + count - t), bf16);
  });
  if (call.stats.activations) add(*call.stats.nanoseconds, now() - start);
}
}  // namespace ktx
