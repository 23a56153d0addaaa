// A work item is (sequence, KV head, block of queries, part of the keys). The queries of all heads that share a KV head form one block, so a key is
// converted to f32 once for all of them. With too few items for the pool (one token on a long context) the keys are split into parts whose partial
// softmaxes are merged at the end (split-KV). Half-precision keys and values are multiplied in bf16 if the instruction set has it.
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
constexpr float NEG_INF = -std::numeric_limits<float>::infinity();
thread_local Scratch shared_scratch, worker_scratch;

const AttentionKernels& attention_kernels() {
  static const AttentionKernels* const table[] = {&SCALAR_ATTENTION, &SCALAR_ATTENTION, &AVX2_ATTENTION, &AVX2_ATTENTION, &AVX512VNNI_ATTENTION, &AVX512VNNI_ATTENTION, &AVX512BF16_ATTENTION, &AVX512BF16_ATTENTION};
  static_assert(std::size(table) == ISA_COUNT);
  return *table[picked_isa()];
}

// The softmax of a row is merged from softmaxes over PART_KEYS keys each, in order, whichever worker computes them. So the result has the same bits
// alone or in a batch, in a long chunk of a prompt or as the last token.
constexpr int PART_KEYS = 8 * BLOCK_KEYS;

// A sequence of the call and its partition: for each KV head (times split), blocks of queries; for each block all parts of the keys in one item, or one
// item per part if there are too few items.
struct SequenceRun {
  Sequence own;
  int64_t batch, blocks, parts;
  int64_t first_item, first_partial, first_merge;
};
thread_local std::vector<SequenceRun> runs;

struct AttentionJob {
  const AttentionCall& c;
  const AttentionKernels& k;
  const Bf16Kernels* bf16;  // null: in f32
  int64_t split, group;      // blocks per KV head, and query heads per block
  int64_t block_tokens = 0, items = 0, partials = 0, merges = 0;
  const SequenceRun *first_run = nullptr, *last_run = nullptr;
  float *partial_max = nullptr, *partial_sum = nullptr, *partial_out = nullptr;  // [partial][BLOCK_ROWS] (x dv) of sequences with split keys
  Queue queue{}, merge{};

  struct Place { const SequenceRun* run; int64_t kv, token, tokens, part; };  // kv: KV head times split; token: of the sequence
  Place place(int64_t item) const {
    const SequenceRun& run = *(std::upper_bound(first_run, last_run, item, [](int64_t i, const SequenceRun& r) { return i < r.first_item; }) - 1);
    const int64_t own = item - run.first_item, token = own / run.parts % run.blocks * block_tokens;
    return {&run, own / run.parts / run.blocks, token, std::min(block_tokens, run.own.queries - token), own % run.parts};
  }

  static const uint8_t* at(const Strided& t, int64_t batch, int64_t head, int64_t position) {
    return static_cast<const uint8_t*>(t.data) + (batch * t.batch + head * t.head + position * t.position) * int64_t(size_of(t.type));
  }
  // Keys or values from a position on, contiguous up to the end of its block of BLOCK_KEYS.
  const uint8_t* kv_row(const Strided& t, const SequenceRun& run, int64_t head, int64_t position) const {
    if (!c.page) return at(t, run.batch, head, position);
    return at(t, run.own.pages[position / c.page], head, position % c.page);
  }

  // The keys [first, last) that any query of the tokens attends to; `first` is a multiple of BLOCK_KEYS.
  void bounds(const SequenceRun& run, int64_t token, int64_t tokens, int64_t& first, int64_t& last) const {
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
    first = std::max<int64_t>(first, 0) / BLOCK_KEYS * BLOCK_KEYS, last = std::min(last, run.own.keys);
  }

  const int32_t* range(const SequenceRun& run, int64_t token) const { return c.ranges + (run.batch * c.queries + run.own.first + token) * 2; }

  // A row's scores, `step` apart.
  void mask_row(const SequenceRun& run, int64_t head, int64_t token, int64_t key, int keys, float* row, int64_t step) const {
    if (c.softcap > 0)
      for (int j = 0; j < keys; ++j) row[j * step] = c.softcap * tanhf(row[j * step] / c.softcap);
    if (c.seen || c.added) {
      const int64_t base = run.batch * c.mask_batch + head * c.mask_head + token * c.mask_query;
      for (int j = 0; j < keys; ++j) {
        const int64_t i = base + (key + j) * c.mask_key;
        float& score = row[j * step];
        if (c.seen) score = c.seen[i] ? score : NEG_INF;
        else score = c.added[i] > std::numeric_limits<float>::lowest() / 2 ? score + c.added[i] : NEG_INF;
      }
      return;
    }
    int64_t from = 0, to = run.own.keys - run.own.queries + token + 1;
    if (c.ranges) from = range(run, token)[0], to = range(run, token)[1];
    for (int64_t j = 0; j < std::min<int64_t>(keys, from - key); ++j) row[j * step] = NEG_INF;
    for (int64_t j = std::max<int64_t>(0, to - key); j < keys; ++j) row[j * step] = NEG_INF;
  }

  // Keys or values [first, first+count) as dense f32 rows; a second source is appended to each row.
  const float* rows(const Strided& a, int64_t da, const Strided& b, int64_t db, const SequenceRun& run, int64_t head, int64_t first, int count, float* buffers) const {
    if (!b.data && a.type == DType::F32 && a.position == da) return reinterpret_cast<const float*>(kv_row(a, run, head, first));
    for (int i = 0; i < count; ++i) {
      k.convert(kv_row(a, run, head, first + i), a.type, da, buffers + i * (da + db));
      if (b.data) k.convert(kv_row(b, run, head, first + i), b.type, db, buffers + i * (da + db) + da);
    }
    return buffers;
  }

  // The same as bf16, rows `stride` apart; in place if they are bf16 in full tiles already.
  const uint16_t* rows_as_bf16(const Strided& a, int64_t da, const Strided& b, int64_t db, const SequenceRun& run, int64_t head, int64_t first, int count,
                            uint16_t* buffers, int64_t& stride) const {
    if (!b.data && a.type == DType::BF16 && count % 8 == 0) {
      stride = a.position;
      return reinterpret_cast<const uint16_t*>(kv_row(a, run, head, first));
    }
    stride = da + db;
    for (int i = 0; i < count; ++i) {
      bf16->row(kv_row(a, run, head, first + i), a.type, int(da), buffers + i * stride);
      if (b.data) bf16->row(kv_row(b, run, head, first + i), b.type, int(db), buffers + i * stride + da);
    }
    return buffers;
  }

  // The address of a later position, to prefetch. Returns `near` past the end or if rows are not contiguous half precision.
  const void* prefetch_address(const Strided& t, int64_t columns, const SequenceRun& run, int64_t head, int64_t position, int64_t last, const void* near) const {
    return position < last && t.position == columns ? kv_row(t, run, head, position) : near;
  }

  // Whether the values are the first columns of the keys' rows.
  bool latent() const {
    return c.v.data == c.k.data && c.v.type == c.k.type && c.v.batch == c.k.batch && c.v.head == c.k.head && c.v.position == c.k.position && c.dv <= c.dk;
  }

  struct Buffers {  // of a worker; k has space for eight more keys; k and v hold bf16 or f32
    float *q, *k, *v, *scores;
    uint32_t *pair_q, *probs;
  };

  // Rows of up to eight keys. Missing rows stay uninitialized: their scores are not used.
  void latent_rows(const SequenceRun& run, int64_t head, int64_t first, int64_t last, uint16_t* to) const {
    for (int64_t i = first; i < std::min(first + 8, last); ++i, to += c.dk + c.dr) {
      bf16->row(kv_row(c.k, run, head, i), c.k.type, int(c.dk), to);
      bf16->row(kv_row(c.k_rope, run, head, i), c.k_rope.type, int(c.dr), to + c.dk);
    }
  }

  // Scores of eight keys from `j` of the block on, and the converted rows of the next eight. The first rows of the next block are converted before the
  // values of this block are used, and stored behind its end.
  void latent_step(const Buffers& buffers, const SequenceRun& run, int64_t head, int lanes, int64_t key, int j, int64_t last, float* scores) const {
    const int64_t d = c.dk + c.dr, next = key + 8;
    const bool whole = next + 8 <= last;
    uint16_t* these = reinterpret_cast<uint16_t*>(buffers.k) + j * d;
    const int64_t from = whole ? next : key;  // with fewer than eight left: converts this row eight times and discards it
    const int64_t size = int64_t(size_of(c.k.type));
    const LatentConversion step{kv_row(c.k, run, head, from), kv_row(c.k_rope, run, head, from), whole ? c.k.position * size : 0, whole ? c.k_rope.position * size : 0,
                          c.k.type, int(c.dk), int(c.dr), these + 8 * d};
    bf16->latent(buffers.pair_q, lanes, these, step, scores);
    if (!whole) latent_rows(run, head, next, last, these + 8 * d);
  }

  // Attention of a block of queries to the keys [first, last) of one part; keys up to `end` follow.
  void attend_part(const Place& at, const Buffers& buffers, int64_t first, int64_t last, int64_t end, SoftmaxState state) const {
    const auto [of, kv, token, tokens, part] = at;
    const SequenceRun& run = *of;
    const int rows_here = int(tokens * group), lanes = (rows_here + 15) / 16;
    const int64_t d = c.dk + c.dr;
    std::fill(state.row_max, state.row_max + lanes * 16, NEG_INF);
    std::fill(state.sum, state.sum + lanes * 16, 0.0f);
    std::fill(state.out, state.out + rows_here * c.dv, 0.0f);
    const int64_t of_row = bf16 ? 1 : BLOCK_KEYS, of_key = bf16 ? lanes * 16 : 1;
    const auto mask = [&](int64_t key, int keys) {
      for (int64_t t = 0; t < tokens; ++t)
        for (int64_t g = 0; g < group; ++g) mask_row(run, kv * group + g, token + t, key, keys, buffers.scores + (t * group + g) * of_row, of_key);
    };
    const Strided none{};
    const bool mixed = bf16 && latent() && c.k_rope.type == c.k.type && lanes <= 2 && c.dk % 32 == 0 && c.dr % 32 == 0 && c.dr;
    uint16_t* const rows_of_k = reinterpret_cast<uint16_t*>(buffers.k);
    if (mixed) latent_rows(run, kv / split, first, last, rows_of_k);
    for (int64_t key = first; key < last; key += BLOCK_KEYS) {
      const int keys = int(std::min<int64_t>(BLOCK_KEYS, last - key));
      if (mixed && key > first) std::copy_n(rows_of_k + BLOCK_KEYS * d, 8 * d, rows_of_k);
      if (bf16) {
        int64_t stride = d, v_stride = d;
        const uint16_t *of_k = rows_of_k, *of_v = rows_of_k;
        if (!mixed) of_k = rows_as_bf16(c.k, c.dk, c.k_rope, c.dr, run, kv / split, key, keys, rows_of_k, stride);
        for (int j = 0; j < keys; j += 8) {
          float* scores = buffers.scores + j * lanes * 16;
          if (mixed) {
            latent_step(buffers, run, kv / split, lanes, key + j, j, last, scores);
            continue;
          }
          const int64_t then = key + BLOCK_KEYS + j;
          const void* next[2] = {prefetch_address(c.k, c.dk, run, kv / split, then, end, buffers.scores), prefetch_address(c.v, c.dv, run, kv / split, then, end, buffers.scores)};
          bf16->score(buffers.pair_q, lanes, of_k + j * stride, stride, std::min(8, keys - j), int(d), scores, next);
        }
        mask(key, keys);
        bf16->online_softmax(buffers.scores, lanes, rows_here, keys, int(c.dv), state, buffers.probs);
        if (latent()) v_stride = stride, of_v = of_k;
        else of_v = rows_as_bf16(c.v, c.dv, none, 0, run, kv / split, key, keys, reinterpret_cast<uint16_t*>(buffers.v), v_stride);
        bf16->accumulate_pv(buffers.probs, lanes, of_v, v_stride, rows_here, keys, int(c.dv), state.out);
        continue;
      }
      const float* keys_f = rows(c.k, c.dk, c.k_rope, c.dr, run, kv / split, key, keys, buffers.k);
      const float* values = rows(c.v, c.dv, none, 0, run, kv / split, key, keys, buffers.v);
      k.score(buffers.q, keys_f, rows_here, keys, int(d), buffers.scores);
      mask(key, keys);
      k.online_softmax(buffers.scores, rows_here, keys, int(c.dv), state);
      k.accumulate_pv(buffers.scores, values, rows_here, keys, int(c.dv), state.out);
    }
  }

  // One item: a single part, or all parts and the result.
  void attend(int64_t item, const Buffers& buffers, SoftmaxState all, SoftmaxState piece, float* ordered) const {
    const Place here = place(item);
    const SequenceRun& run = *here.run;
    const int rows_here = int(here.tokens * group);
    const int64_t d = c.dk + c.dr;
    for (int64_t t = 0; t < here.tokens; ++t)
      for (int64_t g = 0; g < group; ++g) {
        float* row = buffers.q + (t * group + g) * d;
        k.convert(at(c.q, run.batch, here.kv * group + g, run.own.first + here.token + t), c.q.type, c.dk, row);
        if (c.dr) k.convert(at(c.q_rope, run.batch, here.kv * group + g, run.own.first + here.token + t), c.q_rope.type, c.dr, row + c.dk);
        for (int64_t i = 0; i < d; ++i) row[i] *= c.scale;
      }
    if (bf16) bf16->queries(buffers.q, rows_here, int(d), (rows_here + 15) / 16, buffers.pair_q);
    int64_t first, last;
    bounds(run, here.token, here.tokens, first, last);
    const auto part = [&](int64_t p, SoftmaxState state) { attend_part(here, buffers, std::max(first, p * PART_KEYS), std::min(last, (p + 1) * PART_KEYS), last, state); };
    if (run.parts > 1) return part(here.part, partial(run.first_partial + item - run.first_item));
    part(first / PART_KEYS, all);
    for (int64_t p = first / PART_KEYS + 1; p * PART_KEYS < last; ++p) part(p, piece), merge_partials(all, piece, rows_here);
    write(item, all, ordered);
  }

  // Merges the softmaxes of two consecutive key ranges.
  void merge_partials(SoftmaxState all, SoftmaxState more, int rows_here) const {
    for (int r = 0; r < rows_here; ++r) {
      if (more.row_max[r] == NEG_INF) continue;
      const float top = std::max(all.row_max[r], more.row_max[r]);
      const float a = all.row_max[r] == NEG_INF ? 0 : expf(all.row_max[r] - top), b = expf(more.row_max[r] - top), *from = more.out + r * c.dv;
      float* to = all.out + r * c.dv;
      for (int64_t i = 0; i < c.dv; ++i) to[i] = to[i] * a + from[i] * b;
      all.sum[r] = all.sum[r] * a + more.sum[r] * b, all.row_max[r] = top;
    }
  }

  void write(int64_t item, SoftmaxState state, float* ordered) const {
    const auto [run, kv, token, tokens, part] = place(item);
    for (int64_t t = 0; t < tokens; ++t)
      for (int64_t g = 0; g < group; ++g) {
        const int64_t row = t * group + g, head = kv * group + g;
        float total = state.sum[row];
        if (c.sinks && state.row_max[row] > NEG_INF) total += expf(c.sinks[head] - state.row_max[row]);
        const float prob = total > 0 ? 1 / total : 0;
        float *from = state.out + row * c.dv, *out = bf16 ? ordered : from;
        for (int64_t i = 0; i < c.dv; ++i) out[bf16 ? i / 32 * 32 + bf16->column_order[i % 32] : i] = from[i] * prob;
        const int64_t to = ((run->batch * c.queries + run->own.first + token + t) * c.heads + head) * c.dv;
        from_floats(out, c.out_type, c.dv, static_cast<uint8_t*>(c.out) + to * int64_t(size_of(c.out_type)));
      }
  }

  SoftmaxState partial(int64_t i) const { return {partial_max + i * BLOCK_ROWS, partial_sum + i * BLOCK_ROWS, partial_out + i * BLOCK_ROWS * c.dv}; }

  void merge_parts(int64_t index, float* ordered) const {  // of one block of queries
    const SequenceRun* run = first_run;
    while (run->parts == 1 || index >= run->first_merge + c.kv_heads * split * run->blocks) ++run;
    const int64_t block = index - run->first_merge, parts = run->parts, item = run->first_item + block * parts, first = run->first_partial + block * parts;
    const SoftmaxState all = partial(first);
    for (int64_t p = 1; p < parts; ++p) merge_partials(all, partial(first + p), int(place(item).tokens * group));
    write(item, all, ordered);
  }

  void run_worker() {
    Scratch& own = worker_scratch;
    const int64_t d = c.dk + c.dr;
    own.reset(size_t(2 * BLOCK_ROWS + BLOCK_KEYS + 8) * d * 4 + size_t(BLOCK_KEYS + 2 * BLOCK_ROWS + 1) * c.dv * 4 + (2 * BLOCK_ROWS * BLOCK_KEYS + 4 * BLOCK_ROWS) * 4 + 1024);
    const Buffers buffers{own.take<float>(BLOCK_ROWS * d), own.take<float>((BLOCK_KEYS + 8) * d), own.take<float>(BLOCK_KEYS * c.dv), own.take<float>(BLOCK_ROWS * BLOCK_KEYS),
                    own.take<uint32_t>(BLOCK_ROWS * d), own.take<uint32_t>(BLOCK_ROWS * BLOCK_KEYS)};
    const SoftmaxState all{own.take<float>(BLOCK_ROWS), own.take<float>(BLOCK_ROWS), own.take<float>(BLOCK_ROWS * c.dv)};
    const SoftmaxState piece{own.take<float>(BLOCK_ROWS), own.take<float>(BLOCK_ROWS), own.take<float>(BLOCK_ROWS * c.dv)};
    float* ordered = own.take<float>(c.dv);
    for (int64_t item; (item = queue.take()) < items;) attend(item, buffers, all, piece, ordered);
    if (!merges) return;
    barrier();
    for (int64_t index; (index = merge.take()) < merges;) merge_parts(index, ordered);
  }

  void add(const Sequence& own, int64_t batch) {
    SequenceRun run{own, batch, 0, 1, items, partials, merges};
    run.blocks = (own.queries + block_tokens - 1) / block_tokens;
    const int64_t whole = c.kv_heads * split * run.blocks;
    if (whole < threads()) run.parts = std::max<int64_t>(1, (own.keys + PART_KEYS - 1) / PART_KEYS);
    items += whole * run.parts;
    if (run.parts > 1) partials += whole * run.parts, merges += whole;
    runs.push_back(run);
  }
};
}  // namespace

void attention(const AttentionCall& c) {
  const AttentionKernels& kernels = attention_kernels();
  const int64_t shared_by = c.heads / c.kv_heads;
  const bool in_half = c.k.type != DType::F32 && c.v.type != DType::F32 && (!c.dr || c.k_rope.type != DType::F32) && c.dk % 2 == 0 && c.dr % 2 == 0 && c.dv % 32 == 0;
  const Bf16Kernels* bf16 = in_half ? kernels.bf16 : nullptr;
  const int64_t max_rows = bf16 ? BLOCK_ROWS : F32_BLOCK_ROWS;
  int64_t split = (shared_by + max_rows - 1) / max_rows;  // more heads on one key/value head than a block holds: several blocks
  while (shared_by % split) ++split;
  AttentionJob job{.c = c, .k = kernels, .bf16 = bf16, .split = split, .group = shared_by / split};
  job.block_tokens = std::max<int64_t>(1, max_rows / job.group);
  runs.clear();
  for (int64_t i = 0; i < (c.sequences ? c.sequence_count : c.batches); ++i) {
    if (c.sequences) job.add(c.sequences[i], 0);
    else job.add({0, c.queries, c.keys, nullptr}, i);
  }
  job.first_run = runs.data(), job.last_run = runs.data() + runs.size();
  if (job.merges) {
    shared_scratch.reset(size_t(job.partials) * BLOCK_ROWS * (2 + c.dv) * 4 + 256);
    job.partial_max = shared_scratch.take<float>(job.partials * BLOCK_ROWS);
    job.partial_sum = shared_scratch.take<float>(job.partials * BLOCK_ROWS);
    job.partial_out = shared_scratch.take<float>(job.partials * BLOCK_ROWS * c.dv);
  }
  parallel([&](int) { job.run_worker(); });
}
}  // namespace ktx
