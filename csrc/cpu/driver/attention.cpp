// An item of work is (sequence, key/value head, block of queries, part of the keys): the queries of all heads that share the
// key/value head make one block, so a key is converted to f32 once for all of them. When there are too few items for the team (one
// token on a long context), the keys are cut into parts whose partial softmaxes are merged at the end. Keys and values kept in half precision are
// multiplied in bf16 where the machine can.
#include "cpu/driver/attention.h"

#include <math.h>

#include <algorithm>
#include <iterator>
#include <limits>
#include <vector>

#include "cpu/isa/attention_kernels.h"
#include "cpu/runtime/isa.h"
#include "cpu/runtime/pool.h"
#include "cpu/driver/scratch.h"

namespace ktx {
namespace {
constexpr float NOTHING = -std::numeric_limits<float>::infinity();
thread_local Scratch shared_scratch, member_scratch;

const AttentionKernels& attention_kernels() {
  static const AttentionKernels* const table[] = {&SCALAR_ATTENTION, &SCALAR_ATTENTION, &AVX2_ATTENTION, &AVX2_ATTENTION, &AVX512VNNI_ATTENTION, &AVX512VNNI_ATTENTION, &AVX512BF16_ATTENTION, &AVX512BF16_ATTENTION};
  static_assert(std::size(table) == ISA_COUNT);
  return *table[picked_isa()];
}

// A row's softmax is made of softmaxes over PART keys each, merged in their order, whoever computes them: its result is the same bits alone or beside others,
// in a long piece of a prompt or as the last token.
constexpr int PART = 8 * KEYS;

// A sequence of the call and how it is cut: for each key/value head (times split), blocks of queries, and for each of them all parts of the keys, or where
// that makes too few items each part alone.
struct Run {
  Sequence own;
  int64_t batch, blocks, parts;
  int64_t first_item, first_partial, first_merge;
};
thread_local std::vector<Run> runs;

struct Work {
  const AttentionCall& c;
  const AttentionKernels& k;
  const PairKernels* pairs;  // null: in f32
  int64_t split, group;      // blocks a key/value head's query heads make, and heads in each
  int64_t block_tokens = 0, items = 0, partials = 0, merges = 0;
  const Run *first_run = nullptr, *last_run = nullptr;
  float *partial_most = nullptr, *partial_sum = nullptr, *partial_out = nullptr;  // [partial][ROWS] (x dv) of sequences whose keys are cut
  Queue queue{}, merge{};

  struct Place { const Run* run; int64_t kv, token, tokens, part; };  // kv counts key/value heads times split, token those of the sequence
  Place place(int64_t item) const {
    const Run& run = *(std::upper_bound(first_run, last_run, item, [](int64_t i, const Run& r) { return i < r.first_item; }) - 1);
    const int64_t own = item - run.first_item, token = own / run.parts % run.blocks * block_tokens;
    return {&run, own / run.parts / run.blocks, token, std::min(block_tokens, run.own.queries - token), own % run.parts};
  }

  static const uint8_t* at(const Strided& t, int64_t batch, int64_t head, int64_t position) {
    return static_cast<const uint8_t*>(t.data) + (batch * t.batch + head * t.head + position * t.position) * int64_t(size_of(t.type));
  }
  // Keys or values from a position on: up to the end of its block of KEYS they lie in one piece.
  const uint8_t* kept_at(const Strided& t, const Run& run, int64_t head, int64_t position) const {
    if (!c.page) return at(t, run.batch, head, position);
    return at(t, run.own.pages[position / c.page], head, position % c.page);
  }

  // The keys [first, last) that any query of the tokens sees; whole blocks before them.
  void bounds(const Run& run, int64_t token, int64_t tokens, int64_t& first, int64_t& last) const {
    first = 0, last = run.own.keys;
    if (c.seen || c.added) return;
    if (!c.ranges) {
      last = run.own.keys - run.own.queries + token + tokens;
      return;
    }
    first = run.own.keys, last = 0;
    for (int64_t t = token; t < token + tokens; ++t) {
      const int32_t* r = range(run, t);
      if (r[0] < r[1]) first = std::min<int64_t>(first, r[0]), last = std::max<int64_t>(last, r[1]);
    }
    first = std::max<int64_t>(first, 0) / KEYS * KEYS, last = std::min(last, run.own.keys);
  }

  const int32_t* range(const Run& run, int64_t token) const { return c.ranges + (run.batch * c.queries + run.own.first + token) * 2; }

  // A row's scores, `step` apart.
  void mask_row(const Run& run, int64_t head, int64_t token, int64_t key, int keys, float* row, int64_t step) const {
    if (c.softcap > 0)
      for (int j = 0; j < keys; ++j) row[j * step] = c.softcap * tanhf(row[j * step] / c.softcap);
    if (c.seen || c.added) {
      const int64_t base = run.batch * c.mask_batch + head * c.mask_head + token * c.mask_query;
      for (int j = 0; j < keys; ++j) {
        const int64_t i = base + (key + j) * c.mask_key;
        float& score = row[j * step];
        if (c.seen) score = c.seen[i] ? score : NOTHING;
        else score = c.added[i] > std::numeric_limits<float>::lowest() / 2 ? score + c.added[i] : NOTHING;
      }
      return;
    }
    int64_t from = 0, to = run.own.keys - run.own.queries + token + 1;
    if (c.ranges) from = range(run, token)[0], to = range(run, token)[1];
    for (int64_t j = 0; j < std::min<int64_t>(keys, from - key); ++j) row[j * step] = NOTHING;
    for (int64_t j = std::max<int64_t>(0, to - key); j < keys; ++j) row[j * step] = NOTHING;
  }

  // Keys or values [first, first+count) as dense f32 rows; a second source is appended to each row.
  const float* rows(const Strided& a, int64_t da, const Strided& b, int64_t db, const Run& run, int64_t head, int64_t first, int count, float* room) const {
    if (!b.data && a.type == Number::F32 && a.position == da) return reinterpret_cast<const float*>(kept_at(a, run, head, first));
    for (int i = 0; i < count; ++i) {
      k.convert(kept_at(a, run, head, first + i), a.type, da, room + i * (da + db));
      if (b.data) k.convert(kept_at(b, run, head, first + i), b.type, db, room + i * (da + db) + da);
    }
    return room;
  }

  // The same as bf16 with columns `stride` apart; where they lie, if they are bf16 in whole tiles already.
  const uint16_t* half_rows(const Strided& a, int64_t da, const Strided& b, int64_t db, const Run& run, int64_t head, int64_t first, int count,
                            uint16_t* room, int64_t& stride) const {
    if (!b.data && a.type == Number::BF16 && count % 8 == 0) {
      stride = a.position;
      return reinterpret_cast<const uint16_t*>(kept_at(a, run, head, first));
    }
    stride = da + db;
    for (int i = 0; i < count; ++i) {
      pairs->row(kept_at(a, run, head, first + i), a.type, int(da), room + i * stride);
      if (b.data) pairs->row(kept_at(b, run, head, first + i), b.type, int(db), room + i * stride + da);
    }
    return room;
  }

  // Where positions lie that come up soon: a block is read once, and from memory. Past the end or if they are not one stretch of half precision, something
  // near.
  const void* soon(const Strided& t, int64_t columns, const Run& run, int64_t head, int64_t position, int64_t last, const void* near) const {
    return position < last && t.position == columns ? kept_at(t, run, head, position) : near;
  }

  // Whether the values are the first columns of the keys' rows.
  bool latent() const {
    return c.v.data == c.k.data && c.v.type == c.k.type && c.v.batch == c.k.batch && c.v.head == c.k.head && c.v.position == c.k.position && c.dv <= c.dk;
  }

  struct Room {  // of a member; k has room for eight keys more, and holds bf16 as well as f32, v too
    float *q, *k, *v, *scores;
    uint32_t *pair_q, *shares;
  };

  // Rows of up to eight keys; room for those that are missing is left as it is: their scores are not used.
  void latent_rows(const Run& run, int64_t head, int64_t first, int64_t last, uint16_t* to) const {
    for (int64_t i = first; i < std::min(first + 8, last); ++i, to += c.dk + c.dr) {
      pairs->row(kept_at(c.k, run, head, i), c.k.type, int(c.dk), to);
      pairs->row(kept_at(c.k_rope, run, head, i), c.k_rope.type, int(c.dr), to + c.dk);
    }
  }

  // Scores of the eight keys of a block whose rows are there, from `j` of the block on, and the rows of the eight that follow. The first rows of the
  // next block are made before this block's values are used: they wait behind its end.
  void latent_step(const Room& room, const Run& run, int64_t head, int lanes, int64_t key, int j, int64_t last, float* scores) const {
    const int64_t d = c.dk + c.dr, next = key + 8;
    const bool whole = next + 8 <= last;
    uint16_t* these = reinterpret_cast<uint16_t*>(room.k) + j * d;
    const int64_t from = whole ? next : key;  // without eight more, one of these is converted eight times and thrown away
    const int64_t size = int64_t(size_of(c.k.type));
    const LatentStep step{kept_at(c.k, run, head, from), kept_at(c.k_rope, run, head, from), whole ? c.k.position * size : 0, whole ? c.k_rope.position * size : 0,
                          c.k.type, int(c.dk), int(c.dr), these + 8 * d};
    pairs->latent(room.pair_q, lanes, these, step, scores);
    if (!whole) latent_rows(run, head, next, last, these + 8 * d);
  }

  // What a block of queries sees of the keys [first, last) of one part; those up to `end` come after it.
  void attend_part(const Place& at, const Room& room, int64_t first, int64_t last, int64_t end, Running state) const {
    const auto [of, kv, token, tokens, part] = at;
    const Run& run = *of;
    const int rows_here = int(tokens * group), lanes = (rows_here + 15) / 16;
    const int64_t d = c.dk + c.dr;
    std::fill(state.most, state.most + lanes * 16, NOTHING);
    std::fill(state.sum, state.sum + lanes * 16, 0.0f);
    std::fill(state.out, state.out + rows_here * c.dv, 0.0f);
    const int64_t of_row = pairs ? 1 : KEYS, of_key = pairs ? lanes * 16 : 1;
    const auto mask = [&](int64_t key, int keys) {
      for (int64_t t = 0; t < tokens; ++t)
        for (int64_t g = 0; g < group; ++g) mask_row(run, kv * group + g, token + t, key, keys, room.scores + (t * group + g) * of_row, of_key);
    };
    const Strided none{};
    const bool mixed = pairs && latent() && c.k_rope.type == c.k.type && lanes <= 2 && c.dk % 32 == 0 && c.dr % 32 == 0 && c.dr;
    uint16_t* const rows_of_k = reinterpret_cast<uint16_t*>(room.k);
    if (mixed) latent_rows(run, kv / split, first, last, rows_of_k);
    for (int64_t key = first; key < last; key += KEYS) {
      const int keys = int(std::min<int64_t>(KEYS, last - key));
      if (mixed && key > first) std::copy_n(rows_of_k + KEYS * d, 8 * d, rows_of_k);
      if (pairs) {
        int64_t stride = d, v_stride = d;
        const uint16_t *of_k = rows_of_k, *of_v = rows_of_k;
        if (!mixed) of_k = half_rows(c.k, c.dk, c.k_rope, c.dr, run, kv / split, key, keys, rows_of_k, stride);
        for (int j = 0; j < keys; j += 8) {
          float* scores = room.scores + j * lanes * 16;
          if (mixed) {
            latent_step(room, run, kv / split, lanes, key + j, j, last, scores);
            continue;
          }
          const int64_t then = key + KEYS + j;
          const void* next[2] = {soon(c.k, c.dk, run, kv / split, then, end, room.scores), soon(c.v, c.dv, run, kv / split, then, end, room.scores)};
          pairs->score(room.pair_q, lanes, of_k + j * stride, stride, std::min(8, keys - j), int(d), scores, next);
        }
        mask(key, keys);
        pairs->soften(room.scores, lanes, rows_here, keys, int(c.dv), state, room.shares);
        if (latent()) v_stride = stride, of_v = of_k;
        else of_v = half_rows(c.v, c.dv, none, 0, run, kv / split, key, keys, reinterpret_cast<uint16_t*>(room.v), v_stride);
        pairs->gather(room.shares, lanes, of_v, v_stride, rows_here, keys, int(c.dv), state.out);
        continue;
      }
      const float* keys_f = rows(c.k, c.dk, c.k_rope, c.dr, run, kv / split, key, keys, room.k);
      const float* values = rows(c.v, c.dv, none, 0, run, kv / split, key, keys, room.v);
      k.score(room.q, keys_f, rows_here, keys, int(d), room.scores);
      mask(key, keys);
      k.soften(room.scores, rows_here, keys, int(c.dv), state);
      k.gather(room.scores, values, rows_here, keys, int(c.dv), state.out);
    }
  }

  // An item: its part alone, or all parts and the result.
  void attend(int64_t item, const Room& room, Running all, Running piece, float* ordered) const {
    const Place here = place(item);
    const Run& run = *here.run;
    const int rows_here = int(here.tokens * group);
    const int64_t d = c.dk + c.dr;
    for (int64_t t = 0; t < here.tokens; ++t)
      for (int64_t g = 0; g < group; ++g) {
        float* row = room.q + (t * group + g) * d;
        k.convert(at(c.q, run.batch, here.kv * group + g, run.own.first + here.token + t), c.q.type, c.dk, row);
        if (c.dr) k.convert(at(c.q_rope, run.batch, here.kv * group + g, run.own.first + here.token + t), c.q_rope.type, c.dr, row + c.dk);
        for (int64_t i = 0; i < d; ++i) row[i] *= c.scale;
      }
    if (pairs) pairs->queries(room.q, rows_here, int(d), (rows_here + 15) / 16, room.pair_q);
    int64_t first, last;
    bounds(run, here.token, here.tokens, first, last);
    const auto part = [&](int64_t p, Running state) { attend_part(here, room, std::max(first, p * PART), std::min(last, (p + 1) * PART), last, state); };
    if (run.parts > 1) return part(here.part, partial(run.first_partial + item - run.first_item));
    part(first / PART, all);
    for (int64_t p = first / PART + 1; p * PART < last; ++p) part(p, piece), add_up(all, piece, rows_here);
    write(item, all, ordered);
  }

  // The softmax of all keys of two that follow one another.
  void add_up(Running all, Running more, int rows_here) const {
    for (int r = 0; r < rows_here; ++r) {
      if (more.most[r] == NOTHING) continue;
      const float top = std::max(all.most[r], more.most[r]);
      const float a = all.most[r] == NOTHING ? 0 : expf(all.most[r] - top), b = expf(more.most[r] - top), *from = more.out + r * c.dv;
      float* to = all.out + r * c.dv;
      for (int64_t i = 0; i < c.dv; ++i) to[i] = to[i] * a + from[i] * b;
      all.sum[r] = all.sum[r] * a + more.sum[r] * b, all.most[r] = top;
    }
  }

  void write(int64_t item, Running state, float* ordered) const {
    const auto [run, kv, token, tokens, part] = place(item);
    for (int64_t t = 0; t < tokens; ++t)
      for (int64_t g = 0; g < group; ++g) {
        const int64_t row = t * group + g, head = kv * group + g;
        float total = state.sum[row];
        if (c.sinks && state.most[row] > NOTHING) total += expf(c.sinks[head] - state.most[row]);
        const float share = total > 0 ? 1 / total : 0;
        float *from = state.out + row * c.dv, *out = pairs ? ordered : from;
        for (int64_t i = 0; i < c.dv; ++i) out[pairs ? i / 32 * 32 + pairs->order[i % 32] : i] = from[i] * share;
        const int64_t to = ((run->batch * c.queries + run->own.first + token + t) * c.heads + head) * c.dv;
        from_floats(out, c.out_type, c.dv, static_cast<uint8_t*>(c.out) + to * int64_t(size_of(c.out_type)));
      }
  }

  Running partial(int64_t i) const { return {partial_most + i * ROWS, partial_sum + i * ROWS, partial_out + i * ROWS * c.dv}; }

  void merge_parts(int64_t index, float* ordered) const {  // of one block of queries
    const Run* run = first_run;
    while (run->parts == 1 || index >= run->first_merge + c.kv_heads * split * run->blocks) ++run;
    const int64_t block = index - run->first_merge, parts = run->parts, item = run->first_item + block * parts, first = run->first_partial + block * parts;
    const Running all = partial(first);
    for (int64_t p = 1; p < parts; ++p) add_up(all, partial(first + p), int(place(item).tokens * group));
    write(item, all, ordered);
  }

  void member() {
    Scratch& own = member_scratch;
    const int64_t d = c.dk + c.dr;
    own.reset(size_t(2 * ROWS + KEYS + 8) * d * 4 + size_t(KEYS + 2 * ROWS + 1) * c.dv * 4 + (2 * ROWS * KEYS + 4 * ROWS) * 4 + 1024);
    const Room room{own.take<float>(ROWS * d), own.take<float>((KEYS + 8) * d), own.take<float>(KEYS * c.dv), own.take<float>(ROWS * KEYS),
                    own.take<uint32_t>(ROWS * d), own.take<uint32_t>(ROWS * KEYS)};
    const Running all{own.take<float>(ROWS), own.take<float>(ROWS), own.take<float>(ROWS * c.dv)};
    const Running piece{own.take<float>(ROWS), own.take<float>(ROWS), own.take<float>(ROWS * c.dv)};
    float* ordered = own.take<float>(c.dv);
    for (int64_t item; (item = queue.take()) < items;) attend(item, room, all, piece, ordered);
    if (!merges) return;
    barrier();
    for (int64_t index; (index = merge.take()) < merges;) merge_parts(index, ordered);
  }

  void add(const Sequence& own, int64_t batch) {
    Run run{own, batch, 0, 1, items, partials, merges};
    run.blocks = (own.queries + block_tokens - 1) / block_tokens;
    const int64_t whole = c.kv_heads * split * run.blocks;
    if (whole < threads()) run.parts = std::max<int64_t>(1, (own.keys + PART - 1) / PART);
    items += whole * run.parts;
    if (run.parts > 1) partials += whole * run.parts, merges += whole;
    runs.push_back(run);
  }
};
}  // namespace

void attention(const AttentionCall& c) {
  const AttentionKernels& kernels = attention_kernels();
  const int64_t shared_by = c.heads / c.kv_heads;
  const bool in_half = c.k.type != Number::F32 && c.v.type != Number::F32 && (!c.dr || c.k_rope.type != Number::F32) && c.dk % 2 == 0 && c.dr % 2 == 0 && c.dv % 32 == 0;
  const PairKernels* pairs = in_half ? kernels.pairs : nullptr;
  const int64_t most = pairs ? ROWS : SINGLE;
  int64_t split = (shared_by + most - 1) / most;  // more heads on one key/value head than a block holds: several blocks
  while (shared_by % split) ++split;
  Work work{.c = c, .k = kernels, .pairs = pairs, .split = split, .group = shared_by / split};
  work.block_tokens = std::max<int64_t>(1, most / work.group);
  runs.clear();
  for (int64_t i = 0; i < (c.sequences ? c.sequence_count : c.batches); ++i) {
    if (c.sequences) work.add(c.sequences[i], 0);
    else work.add({0, c.queries, c.keys, nullptr}, i);
  }
  work.first_run = runs.data(), work.last_run = runs.data() + runs.size();
  if (work.merges) {
    shared_scratch.reset(size_t(work.partials) * ROWS * (2 + c.dv) * 4 + 256);
    work.partial_most = shared_scratch.take<float>(work.partials * ROWS);
    work.partial_sum = shared_scratch.take<float>(work.partials * ROWS);
    work.partial_out = shared_scratch.take<float>(work.partials * ROWS * c.dv);
  }
  parallel([&](int) { work.member(); });
}
}  // namespace ktx
