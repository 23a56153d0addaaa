// An item of work is (sequence, key/value head, block of queries, part of the keys): the queries of all heads that share the
// key/value head make one block, so a key is converted to f32 once for all of them. When there are too few items for the team (one
// token on a long context), the keys are cut into parts whose partial softmaxes are merged at the end.
#include "attention.h"

#include <math.h>

#include <algorithm>
#include <limits>

#include "attention_kernels.h"
#include "isa.h"
#include "pool.h"
#include "scratch.h"

namespace ktx {
namespace {
constexpr float NOTHING = -std::numeric_limits<float>::infinity();
thread_local Scratch shared_scratch, member_scratch;

const AttentionKernels& attention_kernels() {
  static const AttentionKernels* const table[ISA_COUNT] = {&SCALAR_ATTENTION, &AVX2_ATTENTION, &AVX512VNNI_ATTENTION, &AVX512VBMI_ATTENTION};
  return *table[picked_isa()];
}

const uint8_t* at(const Strided& t, int64_t batch, int64_t head, int64_t position) {
  return static_cast<const uint8_t*>(t.data) + (batch * t.batch + head * t.head + position * t.position) * int64_t(size_of(t.type));
}

struct Work {
  const AttentionCall& c;
  const AttentionKernels& k;
  int64_t split, group;  // blocks a key/value head's query heads make, and heads in each
  int64_t block_tokens = 0, blocks = 0, parts = 0, part_keys = 0, items = 0;
  float *partial_most = nullptr, *partial_sum = nullptr, *partial_out = nullptr;  // [item][QUERIES] (x dv) when parts > 1
  Queue queue{}, merge{};

  struct Place { int64_t batch, kv, token, tokens, part; };  // kv counts key/value heads times split
  Place place(int64_t item) const {
    const int64_t block = item / parts % blocks, rest = item / parts / blocks;
    const int64_t token = block * block_tokens;
    return {rest / (c.kv_heads * split), rest % (c.kv_heads * split), token, std::min(block_tokens, c.queries - token), item % parts};
  }

  // The keys [first, last) that any query of the tokens sees.
  void bounds(int64_t batch, int64_t token, int64_t tokens, int64_t& first, int64_t& last) const {
    first = 0, last = c.keys;
    if (c.seen || c.added) return;
    if (!c.ranges) {
      last = c.keys - c.queries + token + tokens;
      return;
    }
    first = c.keys, last = 0;
    for (int64_t t = token; t < token + tokens; ++t) {
      const int32_t* r = c.ranges + (batch * c.queries + t) * 2;
      if (r[0] < r[1]) first = std::min<int64_t>(first, r[0]), last = std::max<int64_t>(last, r[1]);
    }
    first = std::max<int64_t>(first, 0), last = std::min(last, c.keys);
  }

  void mask_row(int64_t batch, int64_t head, int64_t token, int64_t key, int keys, float* row) const {
    if (c.softcap > 0)
      for (int j = 0; j < keys; ++j) row[j] = c.softcap * tanhf(row[j] / c.softcap);
    if (c.seen || c.added) {
      const int64_t base = batch * c.mask_batch + head * c.mask_head + token * c.mask_query;
      for (int j = 0; j < keys; ++j) {
        const int64_t i = base + (key + j) * c.mask_key;
        if (c.seen) row[j] = c.seen[i] ? row[j] : NOTHING;
        else row[j] = c.added[i] > std::numeric_limits<float>::lowest() / 2 ? row[j] + c.added[i] : NOTHING;
      }
      return;
    }
    int64_t from = 0, to = c.keys - c.queries + token + 1;
    if (c.ranges) from = c.ranges[(batch * c.queries + token) * 2], to = c.ranges[(batch * c.queries + token) * 2 + 1];
    for (int64_t j = 0; j < std::min<int64_t>(keys, from - key); ++j) row[j] = NOTHING;
    for (int64_t j = std::max<int64_t>(0, to - key); j < keys; ++j) row[j] = NOTHING;
  }

  // Keys or values [first, first+count) as dense f32 rows; a second source is appended to each row.
  const float* rows(const Strided& a, int64_t da, const Strided& b, int64_t db, int64_t batch, int64_t head, int64_t first, int count, float* room) const {
    if (!b.data && a.type == Number::F32 && a.position == da) return reinterpret_cast<const float*>(at(a, batch, head, first));
    for (int i = 0; i < count; ++i) {
      k.convert(at(a, batch, head, first + i), a.type, da, room + i * (da + db));
      if (b.data) k.convert(at(b, batch, head, first + i), b.type, db, room + i * (da + db) + da);
    }
    return room;
  }

  void attend(int64_t item, float* q, float* kf, float* vf, float* scores, Running state) const {
    const auto [batch, kv, token, tokens, part] = place(item);
    const int queries = int(tokens * group);
    const int64_t d = c.dk + c.dr;
    for (int64_t t = 0; t < tokens; ++t)
      for (int64_t g = 0; g < group; ++g) {
        float* row = q + (t * group + g) * d;
        k.convert(at(c.q, batch, kv * group + g, token + t), c.q.type, c.dk, row);
        if (c.dr) k.convert(at(c.q_rope, batch, kv * group + g, token + t), c.q_rope.type, c.dr, row + c.dk);
        for (int64_t i = 0; i < d; ++i) row[i] *= c.scale;
      }
    std::fill(state.most, state.most + queries, NOTHING);
    std::fill(state.sum, state.sum + queries, 0.0f);
    std::fill(state.out, state.out + queries * c.dv, 0.0f);
    int64_t first, last;
    bounds(batch, token, tokens, first, last);
    first = std::max(first, part * part_keys), last = std::min(last, (part + 1) * part_keys);
    const Strided none{};
    for (int64_t key = first; key < last; key += KEYS) {
      const int keys = int(std::min<int64_t>(KEYS, last - key));
      const float* keys_f = rows(c.k, c.dk, c.k_rope, c.dr, batch, kv / split, key, keys, kf);
      const float* values = rows(c.v, c.dv, none, 0, batch, kv / split, key, keys, vf);
      k.score(q, keys_f, queries, keys, int(d), scores);
      for (int64_t t = 0; t < tokens; ++t)
        for (int64_t g = 0; g < group; ++g) mask_row(batch, kv * group + g, token + t, key, keys, scores + (t * group + g) * KEYS);
      k.soften(scores, queries, keys, int(c.dv), state);
      k.gather(scores, values, queries, keys, int(c.dv), state.out);
    }
  }

  void write(int64_t item, Running state) const {
    const auto [batch, kv, token, tokens, part] = place(item);
    for (int64_t t = 0; t < tokens; ++t)
      for (int64_t g = 0; g < group; ++g) {
        const int64_t row = t * group + g, head = kv * group + g;
        float total = state.sum[row];
        if (c.sinks && state.most[row] > NOTHING) total += expf(c.sinks[head] - state.most[row]);
        const float share = total > 0 ? 1 / total : 0;
        float* out = state.out + row * c.dv;
        for (int64_t i = 0; i < c.dv; ++i) out[i] *= share;
        const int64_t to = ((batch * c.queries + token + t) * c.heads + head) * c.dv;
        from_floats(out, c.out_type, c.dv, static_cast<uint8_t*>(c.out) + to * int64_t(size_of(c.out_type)));
      }
  }

  void merge_parts(int64_t first_item) const {  // items first_item .. + parts are one block
    const int64_t queries = place(first_item).tokens * group;
    Running all{partial_most + first_item * QUERIES, partial_sum + first_item * QUERIES, partial_out + first_item * QUERIES * c.dv};
    for (int64_t p = 1; p < parts; ++p)
      for (int64_t r = 0; r < queries; ++r) {
        const float most = partial_most[(first_item + p) * QUERIES + r], sum = partial_sum[(first_item + p) * QUERIES + r];
        if (most == NOTHING) continue;
        const float *from = partial_out + ((first_item + p) * QUERIES + r) * c.dv, top = std::max(all.most[r], most);
        const float a = all.most[r] == NOTHING ? 0 : expf(all.most[r] - top), b = expf(most - top);
        for (int64_t i = 0; i < c.dv; ++i) all.out[r * c.dv + i] = all.out[r * c.dv + i] * a + from[i] * b;
        all.sum[r] = all.sum[r] * a + sum * b, all.most[r] = top;
      }
    write(first_item, all);
  }

  void member() {
    Scratch& own = member_scratch;
    const int64_t d = c.dk + c.dr;
    own.reset(size_t(QUERIES + KEYS) * d * 4 + size_t(KEYS + QUERIES) * c.dv * 4 + (QUERIES * KEYS + 2 * QUERIES) * 4 + 1024);
    float *q = own.take<float>(QUERIES * d), *kf = own.take<float>(KEYS * d), *vf = own.take<float>(KEYS * c.dv);
    float* scores = own.take<float>(QUERIES * KEYS);
    const Running mine{own.take<float>(QUERIES), own.take<float>(QUERIES), own.take<float>(QUERIES * c.dv)};
    for (int64_t item; (item = queue.take()) < items;) {
      const Running state = parts == 1 ? mine : Running{partial_most + item * QUERIES, partial_sum + item * QUERIES, partial_out + item * QUERIES * c.dv};
      attend(item, q, kf, vf, scores, state);
      if (parts == 1) write(item, state);
    }
    if (parts == 1) return;
    barrier();
    for (int64_t block; (block = merge.take()) < items / parts;) merge_parts(block * parts);
  }
};
}  // namespace

void attention(const AttentionCall& c) {
  const int64_t shared_by = c.heads / c.kv_heads;
  int64_t split = (shared_by + QUERIES - 1) / QUERIES;  // more heads on one key/value head than a block holds: several blocks
  while (shared_by % split) ++split;
  Work work{.c = c, .k = attention_kernels(), .split = split, .group = shared_by / split};
  work.block_tokens = std::max<int64_t>(1, QUERIES / work.group);
  work.blocks = (c.queries + work.block_tokens - 1) / work.block_tokens;
  const int64_t whole = c.batches * c.kv_heads * split * work.blocks, team = threads();
  const int64_t most_parts = (c.keys + 4 * KEYS - 1) / (4 * KEYS);  // a part of less than four blocks is not worth its merge
  work.parts = whole >= team ? 1 : std::clamp<int64_t>((2 * team + whole - 1) / whole, 1, std::max<int64_t>(1, most_parts));
  work.part_keys = (c.keys + work.parts - 1) / work.parts;
  work.items = whole * work.parts;
  if (work.parts > 1) {
    shared_scratch.reset(size_t(work.items) * QUERIES * (2 + c.dv) * 4 + 256);
    work.partial_most = shared_scratch.take<float>(work.items * QUERIES);
    work.partial_sum = shared_scratch.take<float>(work.items * QUERIES);
    work.partial_out = shared_scratch.take<float>(work.items * QUERIES * c.dv);
  }
  parallel([&](int) { work.member(); });
}
}  // namespace ktx
