// Two phases with a barrier after each: (gate, up, activation, requantise) and (down, weighted sum), after the activations have
// been quantised once. Work is one queue of (expert, block of rows); an expert with few tokens takes the fused kernels, one with
// many the tiles. A memory node has a share of the rows of every matrix, and a share of the queue that reads them.
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
constexpr int64_t CHUNK = 2048, FEW = 512;  // tokens at once, and how many of them for one expert: see linear.cpp
constexpr int INNER_GROUPS = 4;  // row groups of gate and up in a unit of work: 64 rows, so two blocks of 32 for down
constexpr int64_t LONG_RUN = 64;  // units of few tokens that a member takes at once
// Of many tokens: neighbours in the rows of a tile that two members write share lines, so four, while a projection's sums are no more than 256 KiB.
constexpr int64_t SHORT_RUN = 4, SUMS = 4096;
thread_local Scratch shared_scratch, member_scratch;
thread_local std::vector<int64_t> order, by_number;

int64_t now() { return std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

// Callers may be several, and readers do not ask.
void add(int64_t& to, int64_t more) { std::atomic_ref<int64_t>(to).fetch_add(more, std::memory_order_relaxed); }

// Units of `groups` row groups of matrices that share their number of rows, node by node: of each matrix in turn those that a node holds.
struct Units {
  int64_t groups = 1, matrices = 0;
  int64_t first[MAX_NODES + 1];  // group where a node's share begins
  int64_t begin[MAX_NODES + 1];  // its first unit

  void set(int64_t all_groups, int64_t groups_of_unit, int64_t count) {
    groups = groups_of_unit, matrices = count, begin[0] = 0;
    for (int node = 0; node <= nodes(); ++node) first[node] = share_of(all_groups, node);
    for (int node = 0; node < nodes(); ++node) begin[node + 1] = begin[node] + of_matrix(node) * matrices;
  }
  int64_t of_matrix(int node) const { return (first[node + 1] - first[node] + groups - 1) / groups; }
  int64_t count() const { return begin[nodes()]; }

  struct Place { int64_t matrix, group, last; int node; };  // last: end of the node's share of groups
  Place place(int64_t unit) const {
    int node = 0;
    while (unit >= begin[node + 1]) ++node;
    const int64_t each = of_matrix(node), at = unit - begin[node];
    return {at / each, first[node] + at % each * groups, first[node + 1], node};
  }
  int64_t end_of_matrix(int64_t unit) const {  // the unit after a matrix's last on this node
    int node = 0;
    while (unit >= begin[node + 1]) ++node;
    const int64_t each = of_matrix(node);
    return begin[node] + ((unit - begin[node]) / each + 1) * each;
  }
};

struct Chunk {
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
  std::vector<int64_t> &active, &present;  // experts with tokens: most tokens first, and by number
  Tokens xs, hs;  // activations of all slots: input of gate/up, input of down
  Units gates, downs;  // of gate and up: matrices are active experts; of down: one matrix stands for all experts
  RowView quantised;  // [tokens] rows
  bool lone;          // one token, at most once an expert
  int64_t all_tiles;  // of all active experts' inputs
  Queue rows, tiles;
  Line inner, outer;
  std::atomic<int64_t> busy[MAX_NODES] = {}, members[MAX_NODES] = {};  // of a memory node: nanoseconds of its members, and how many these are

  int count(int64_t e) const { return int(offset[e + 1] - offset[e]); }
  bool ints_in() const { return xs.q; }

  void group() {
    std::fill(offset, offset + c.experts + 1, 0);
    const int64_t pairs = tokens * c.top;
    for (int64_t i = 0; i < pairs; ++i)
      if (ids[i] >= 0 && ids[i] < c.experts) ++offset[ids[i] + 1];
    for (int64_t e = 0; e < c.experts; ++e) offset[e + 1] += offset[e];
    int64_t* next = slot_of + pairs;  // room for one counter an expert
    std::copy(offset, offset + c.experts, next);
    for (int64_t i = 0; i < pairs; ++i) {
      const bool valid = ids[i] >= 0 && ids[i] < c.experts;
      const int64_t slot = slot_of[i] = valid ? next[ids[i]]++ : -1;
      if (valid) slot_token[slot] = i / c.top, slot_weight[slot] = weights[i];
    }
    present.clear();
    for (int64_t e = 0; e < c.experts; ++e)
      if (count(e)) present.push_back(e);
    active = present;
    std::sort(active.begin(), active.end(), [&](int64_t a, int64_t b) { return count(a) != count(b) ? count(a) > count(b) : a < b; });
  }

  // Every token once, into rows; then whole tiles of slots, because two members that write words of one line would fight for it.
  void quantise_inputs(Scratch& own) {
    float* room = own.take<float>(c.hidden);
    if (ints_in()) {
      for (int64_t t; (t = rows.take()) < tokens;) k.quantise(values_of(t, room), 16, c.hidden, row_of(t));
      barrier();
    }
    size_t at = 0;  // the expert of the tile, and how many tiles the experts before it have
    for (int64_t tile, before = 0; (tile = tiles.take()) < all_tiles;) {
      while (tile - before >= input(at).tiles) before += input(at++).tiles;
      const Tokens to = input(at);
      for_tile(to, int(tile - before), [&](int i, Spot spot) {
        const int64_t t = slot_token[offset[active[at]] + i];
        if (xs.q) k.place(row_of(t), to, spot, 0, c.hidden);
        if (xs.f || xs.wide) k.place_floats(values_of(t, room), to, spot, 0, c.hidden);
      });
    }
  }
  const float* values_of(int64_t t, float* room) const {
    return as_floats(x + t * c.hidden * size_of(c.type), c.type, c.hidden, room);
  }
  RowView row_of(int64_t t) const {
    return {quantised.q + t * c.hidden, quantised.scale + t * (c.hidden / 32), quantised.sum16 + t * (c.hidden / 16)};
  }
  Tokens input(size_t i) const { return slice(xs, offset[active[i]], count(active[i]), k); }  // of the i-th active expert

  // A lone token is the same input for all of its experts, and quantising it takes less time than waiting for somebody else's.
  Tokens lone_input(Scratch& own) const {
    Tokens one = slice(take_tokens(own, 1, c.hidden, xs.q, xs.f, false), 0, 1, k);
    const float* values = values_of(0, own.take<float>(c.hidden));
    if (one.q) {
      const RowView row = take_row(own, c.hidden);
      k.quantise(values, 16, c.hidden, row), k.place(row, one, {0, 1, 0}, 0, c.hidden);
    }
    if (one.f) k.place_floats(values, one, {0, 1, 0}, 0, c.hidden);
    return one;
  }

  // A node's rows of all experts, then the next node's.
  const uint8_t* block(const ExpertMatrix& m, int64_t e, const Units& units, const Units::Place& p, int64_t columns) const {
    const int64_t first = units.first[p.node], held = units.first[p.node + 1] - first;
    return m.packed + (c.experts * first + e * held + p.group - first) * int64_t(group_bytes(*m.layout, columns));
  }
  const uint8_t* inner_weights(const ExpertMatrix& m, int64_t unit) const {
    const Units::Place p = gates.place(unit);
    return block(m, active[p.matrix], gates, p, c.hidden);
  }
  const uint8_t* outer_weights(int64_t unit, int64_t e) const { return block(c.down, e, downs, downs.place(unit), c.inner); }
  void project(const ExpertMatrix& m, int64_t e, const uint8_t* packed, int64_t group, int groups, int64_t rows_of, const Tokens& in, float* sums,
               uint8_t* work, const uint8_t* next) {
    k.multiply(*m.layout, packed, groups, in, sums, work, next);
    if (!m.bias) return;
    const float* bias = m.bias + e * rows_of + group * 16;
    for (int g = 0; g < groups; ++g)
      for (int t = 0; t < in.n; ++t)
        for (int i = 0; i < 16 && (group + g) * 16 + i < rows_of; ++i) sums[(g * in.n + t) * 16 + i] += bias[g * 16 + i];
  }

  // Rows group*16 .. of one expert's inner activations, into down's input.
  void hand_over(int64_t e, int64_t group, int groups, const float* h, const RowView& row, float* line) {
    const int n = count(e);
    const Tokens to = slice(hs, offset[e], n, k);
    const int64_t first = group * 16, width = std::min<int64_t>(groups * 16, c.inner - first);
    for (int tile = 0; tile < to.tiles; ++tile)
      for_tile(to, tile, [&](int t, Spot spot) {
        if (hs.f || hs.wide) {
          for (int64_t i = 0; i < width; ++i) line[i] = h[(i / 16 * n + t) * 16 + i % 16];
          k.place_floats(line, to, spot, first, width);
        } else {
          k.quantise(h + t * 16, n * 16, width, row), k.place(row, to, spot, first, width);
        }
      });
  }

  void inner_phase(Scratch& own, int member) {
    const int64_t widest = count(active.empty() ? 0 : active[0]);
    const int64_t most = inner.longest * INNER_GROUPS * 16;
    float *gate = own.take<float>(most * widest), *up = own.take<float>(most * widest), *line = own.take<float>(most);
    const RowView row = take_row(own, most);
    uint8_t* work = own.take<uint8_t>(WORK_BYTES);
    const Tokens only = lone ? lone_input(own) : Tokens{};
    const Run later = outer.foresee(member, [&](int64_t unit) { return downs.end_of_matrix(unit); });
    const uint8_t* after = later.count && !active.empty() ? outer_weights(later.first, present[0]) : nullptr;
    inner.walk([&](int64_t unit) { return gates.end_of_matrix(unit); }, [&](Run run, Run then) {
      const Units::Place p = gates.place(run.first);
      const int64_t e = active[p.matrix];
      const int groups = int(std::min<int64_t>(run.count * INNER_GROUPS, p.last - p.group));
      const Tokens in = lone ? only : input(size_t(p.matrix));
      const uint8_t* rows_of_up = inner_weights(c.up, run.first);
      project(c.gate, e, inner_weights(c.gate, run.first), p.group, groups, c.inner, in, gate, work, rows_of_up);
      project(c.up, e, rows_of_up, p.group, groups, c.inner, in, up, work, then.count ? inner_weights(c.gate, then.first) : after);
      k.gate(c.act, c.alpha, c.limit, gate, up, gate, int64_t(groups) * in.n * 16);
      hand_over(e, p.group, groups, gate, row, line);
    });
  }

  void outer_phase(Scratch& own) {
    const int64_t widest = count(active.empty() ? 0 : active[0]), columns = outer.longest * downs.groups * 16;
    float* sums = own.take<float>(columns * std::max<int64_t>(widest, 1));
    float* total = own.take<float>(columns * tokens);
    uint8_t* work = own.take<uint8_t>(WORK_BYTES);
    outer.walk([&](int64_t unit) { return downs.end_of_matrix(unit); }, [&](Run run, Run then) {
      const Units::Place p = downs.place(run.first);
      const int64_t first = p.group;
      const int groups = int(std::min<int64_t>(run.count * downs.groups, p.last - first));
      std::fill(total, total + columns * tokens, 0.0f);
      for (size_t i = 0; i < present.size(); ++i) {  // a token's experts are added up in one order, whoever else asks for them
        const int64_t e = present[i];
        const uint8_t* next = i + 1 < present.size() ? outer_weights(run.first, present[i + 1])
                                                     : then.count ? outer_weights(then.first, present[0]) : nullptr;
        const Tokens in = slice(hs, offset[e], count(e), k);
        project(c.down, e, block(c.down, e, downs, p, c.inner), first, groups, c.hidden, in, sums, work, next);
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

  int64_t clock() const { return c.counts.activations ? now() : 0; }
  void worked(int64_t nanoseconds) {
    if (!c.counts.activations) return;
    busy[own_node()].fetch_add(nanoseconds, std::memory_order_relaxed), members[own_node()].fetch_add(1, std::memory_order_relaxed);
  }
  void tell() const {
    const Counts& counts = c.counts;
    if (!counts.activations) return;
    for (int64_t e : present) add(counts.activations[e], count(e));
    const size_t expert = packed_bytes(*c.gate.layout, c.inner, c.hidden) + packed_bytes(*c.up.layout, c.inner, c.hidden) + packed_bytes(*c.down.layout, c.hidden, c.inner);
    add(*counts.bytes, int64_t(present.size() * expert));
    for (int node = 0; node < nodes(); ++node)
      if (const int64_t n = members[node]) add(counts.of_nodes[node], busy[node] / n);
  }
};

void run_chunk(const ExpertsCall& c, int64_t first, int64_t tokens, bool wide) {
  const Kernels& k = kernels();
  const bool in_ints = !c.gate.layout->is_float || !c.up.layout->is_float, in_floats = c.gate.layout->is_float || c.up.layout->is_float;
  const bool down_ints = !c.down.layout->is_float;
  const int64_t slots = tokens * c.top, all_groups = (c.hidden + 15) / 16;
  const bool many = tokens > 16;
  const int team = threads();
  shared_scratch.reset(tokens_bytes(slots, c.hidden, in_ints, in_floats) + tokens_bytes(slots, c.inner, down_ints, !down_ints) +
                       size_t(2 * c.experts + 1 + 2 * slots) * 8 + size_t(slots) * 4 + (in_ints ? size_t(tokens) * c.hidden * 2 : 0) + 2048);
  Scratch& s = shared_scratch;
  Chunk chunk{.c = c, .k = k, .tokens = tokens,
              .x = static_cast<const uint8_t*>(c.x) + first * c.hidden * size_of(c.type),
              .out = static_cast<uint8_t*>(c.out) + first * c.hidden * size_of(c.type),
              .ids = c.ids + first * c.top, .weights = c.weights + first * c.top,
              .offset = s.take<int64_t>(c.experts + 1), .slot_token = s.take<int64_t>(slots),
              .slot_of = s.take<int64_t>(slots + c.experts), .slot_weight = s.take<float>(slots), .active = order, .present = by_number,
              .xs = take_tokens(s, slots, c.hidden, in_ints, in_floats, wide), .hs = take_tokens(s, slots, c.inner, down_ints, !down_ints, wide),
              .gates = {}, .downs = {},
              .quantised = {}, .lone = false, .all_tiles = 0, .rows = {}, .tiles = {}, .inner = {}, .outer = {}};
  if (chunk.xs.q) chunk.quantised = {s.take<int8_t>(tokens * c.hidden), s.take<float>(tokens * (c.hidden / 32)), s.take<int32_t>(tokens * (c.hidden / 16))};
  chunk.group();
  for (size_t i = 0; i < chunk.active.size(); ++i) chunk.all_tiles += chunk.input(i).tiles;
  chunk.inner.team = chunk.outer.team = team;
  const int64_t widest = chunk.active.empty() ? 0 : chunk.count(chunk.active[0]);
  chunk.inner.longest = many ? std::clamp<int64_t>(SUMS / (std::max<int64_t>(widest, 1) * INNER_GROUPS), 1, SHORT_RUN) : LONG_RUN;
  chunk.outer.longest = many ? 1 : LONG_RUN;
  chunk.gates.set((c.inner + 15) / 16, INNER_GROUPS, int64_t(chunk.active.size()));
  chunk.downs.set(all_groups, many ? std::clamp<int64_t>(all_groups / (4 * team), 2, 4) : 1, 1);
  for (int node = 0; node < nodes(); ++node) {
    chunk.inner.share(node, chunk.gates.begin[node], chunk.gates.begin[node + 1]);
    chunk.outer.share(node, chunk.downs.begin[node], chunk.downs.begin[node + 1]);
  }
  chunk.lone = tokens == 1 && widest == 1 && !wide;
  const int64_t inner_rows = chunk.inner.longest * INNER_GROUPS * 16, outer_rows = chunk.outer.longest * chunk.downs.groups * 16;
  const size_t own = row_bytes(c.hidden) + tokens_bytes(1, c.hidden, in_ints, in_floats) + row_bytes(inner_rows) +
                     size_t(2 * inner_rows * widest) * 4 + size_t(outer_rows) * (widest + tokens) * 4 + WORK_BYTES + 8192;
  parallel([&](int member) {
    member_scratch.reset(own);
    if (!chunk.lone) {
      chunk.quantise_inputs(member_scratch);
      barrier();
      member_scratch.reset(own);
    }
    const int64_t start = chunk.clock();
    chunk.inner_phase(member_scratch, member);
    const int64_t end = chunk.clock();
    barrier();
    member_scratch.reset(own);
    const int64_t again = chunk.clock();
    chunk.outer_phase(member_scratch);
    chunk.worked(chunk.clock() - again + end - start);
  });
  chunk.tell();
}
}  // namespace

void experts(const ExpertsCall& call) {
  const int64_t start = call.counts.activations ? now() : 0;
  const int64_t chunk = std::min(CHUNK, std::max<int64_t>(1, call.experts / std::max<int64_t>(call.top, 1)) * FEW);
  for_widths(call.tokens, false, [&](int64_t first, int64_t count, bool wide) {
    for (int64_t t = first; t < first + count; t += chunk) run_chunk(call, t, std::min(chunk, first + count - t), wide);
  });
  if (call.counts.activations) add(*call.counts.nanoseconds, now() - start);
}
}  // namespace ktx
