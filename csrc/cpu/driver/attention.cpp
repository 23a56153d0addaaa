// A work item is (sequence, KV head, block of queries, part of the keys). The queries of all heads that share a KV head
// form one block, so a key is converted to f32 once for all of them. With too few items for the pool (one token on a
// long context) the keys are split into parts whose partial softmaxes are merged at the end (split-KV). Half-precision
// keys and values are multiplied in bf16 if the instruction set has it.
//
// Letters: c = the call, k = f32 kernels, bf16 = bf16 kernels (or a type), d = columns of a key (dk + dr), t = query
// token, g = query head of a group, p = part of the keys. A row is one query of one head; rows of a block are
// [token][head of the group].
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

// Returns the kernels of the picked instruction set (the table is in the order of Isa). A set without attention kernels
// of its own takes those of another set that the machine has too.
const AttentionKernels& attention_kernels() {
  static const AttentionKernels* const table[] = {&SCALAR_ATTENTION, &SCALAR_ATTENTION, &AVX2_ATTENTION,
      &AVX2_ATTENTION, &AVX512VNNI_ATTENTION, &AVX512VNNI_ATTENTION, &AVX512BF16_ATTENTION, &AVX512BF16_ATTENTION};
  static_assert(std::size(table) == ISA_COUNT);
  return *table[picked_isa()];
}

// The softmax of a row is merged from softmaxes over PART_KEYS keys each, in order, whichever worker computes them. So
// the result has the same bits alone or in a batch, in a long chunk of a prompt or as the last token.
constexpr int PART_KEYS = 8 * BLOCK_KEYS;

// A sequence of the call and its partition: for each KV head (times split), blocks of queries; for each block all parts
// of the keys in one item, or one item per part if there are too few items.
struct SequenceRun {
  Sequence sequence;
  // blocks of queries per head block; parts of the keys: 1 if one item takes them all
  int64_t batch, blocks, parts;
  int64_t first_item, first_partial, first_merge;  // indices in the whole call
};
thread_local std::vector<SequenceRun> runs;

struct AttentionJob {
  const AttentionCall& c;
  const AttentionKernels& k;
  const Bf16Kernels* bf16;  // null: in f32
  int64_t split, group;     // head blocks per KV head, and query heads per head block
  int64_t block_tokens = 0, items = 0, partials = 0, merges = 0;
  const SequenceRun *first_run = nullptr, *last_run = nullptr;
  // [partial][BLOCK_ROWS] (x dv) of sequences with split keys
  float *partial_max = nullptr, *partial_sum = nullptr, *partial_out = nullptr;
  Queue untaken_items{}, untaken_merges{};

  // What a work item computes: query tokens [token, token + tokens) of a sequence, for the query heads of `head_block`
  // (KV head * split + block of its query heads), over the keys of `part`, or over all keys if the sequence has one
  // part.
  struct ItemLocation {
    const SequenceRun* run;
    int64_t head_block, token, tokens, part;
  };
  // Finds the sequence of an item. Its items are numbered by head block, then by block of queries, then by part.
  ItemLocation locate(int64_t item) const {
    const SequenceRun& run = *(std::upper_bound(first_run, last_run, item, [](int64_t i, const SequenceRun& r) {
      return i < r.first_item;
    }) - 1);
    const int64_t index = item - run.first_item, token = index / run.parts % run.blocks * block_tokens;
    return {&run, index / run.parts / run.blocks, token, std::min(block_tokens, run.sequence.queries - token),
        index % run.parts};
  }

  static const uint8_t* at(const Strided& t, int64_t batch, int64_t head, int64_t position) {
    return static_cast<const uint8_t*>(t.data) +
        (batch * t.batch + head * t.head + position * t.position) * int64_t(size_of(t.type));
  }
  // Returns the keys or values from a position on. They are contiguous up to the end of the position's block of
  // BLOCK_KEYS, because a page holds whole blocks.
  const uint8_t* kv_row(const Strided& t, const SequenceRun& run, int64_t head, int64_t position) const {
    if (!c.page) return at(t, run.batch, head, position);
    return at(t, run.sequence.pages[position / c.page], head, position % c.page);
  }

  // Sets [first, last) to the keys that at least one query of the tokens attends to, so that other keys are not read.
  // `first` is rounded down to a multiple of BLOCK_KEYS. A mask tensor is not searched: all keys are read.
  void visible_keys(const SequenceRun& run, int64_t token, int64_t tokens, int64_t& first, int64_t& last) const {
    first = 0, last = run.sequence.keys;
    if (c.bool_mask || c.additive_mask) return;
    if (!c.key_ranges) {
      last = run.sequence.keys - run.sequence.queries + token + tokens;
      return;
    }
    first = run.sequence.keys, last = 0;
    for (int64_t t = token; t < token + tokens; ++t) {
      const int32_t* begin_end = key_range(run, t);
      if (begin_end[0] < begin_end[1])
        first = std::min<int64_t>(first, begin_end[0]), last = std::max<int64_t>(last, begin_end[1]);
    }
    first = std::max<int64_t>(first, 0) / BLOCK_KEYS * BLOCK_KEYS, last = std::min(last, run.sequence.keys);
  }

  const int32_t* key_range(const SequenceRun& run, int64_t token) const {
    return c.key_ranges + (run.batch * c.queries + run.sequence.first + token) * 2;
  }

  // Applies softcap, then the call's mask (bool, additive, key ranges, or else causal), to one row of scores: scores of
  // the keys [key, key + keys), `step` floats apart. A hidden key gets -inf. An additive mask hides a key with the
  // lowest float, which is mapped to -inf too, because a row without a visible key must be recognized.
  void mask_row(const SequenceRun& run, int64_t head, int64_t token, int64_t key, int keys, float* row,
      int64_t step) const {
    if (c.softcap > 0)
      for (int j = 0; j < keys; ++j) row[j * step] = c.softcap * tanhf(row[j * step] / c.softcap);
    if (c.bool_mask || c.additive_mask) {
      const int64_t base = run.batch * c.mask_batch + head * c.mask_head + token * c.mask_query;
      for (int j = 0; j < keys; ++j) {
        const int64_t i = base + (key + j) * c.mask_key;
        float& score = row[j * step];
        if (c.bool_mask) score = c.bool_mask[i] ? score : NEG_INF;
        else
          score = c.additive_mask[i] > std::numeric_limits<float>::lowest() / 2 ? score + c.additive_mask[i] : NEG_INF;
      }
      return;
    }
    int64_t from = 0, to = run.sequence.keys - run.sequence.queries + token + 1;
    if (c.key_ranges) from = key_range(run, token)[0], to = key_range(run, token)[1];
    for (int64_t j = 0; j < std::min<int64_t>(keys, from - key); ++j) row[j * step] = NEG_INF;
    for (int64_t j = std::max<int64_t>(0, to - key); j < keys; ++j) row[j * step] = NEG_INF;
  }

  // Returns positions [first, first+count) of `a` as dense f32 rows of da columns, in place if they are such rows
  // already. `b` with data: appends its db columns to each row (the RoPE part of MLA keys).
  const float* load_f32_rows(const Strided& a, int64_t da, const Strided& b, int64_t db, const SequenceRun& run,
      int64_t head, int64_t first, int count, float* buffers) const {
    if (!b.data && a.type == DType::F32 && a.position == da)
      return reinterpret_cast<const float*>(kv_row(a, run, head, first));
    for (int i = 0; i < count; ++i) {
      k.convert(kv_row(a, run, head, first + i), a.type, da, buffers + i * (da + db));
      if (b.data) k.convert(kv_row(b, run, head, first + i), b.type, db, buffers + i * (da + db) + da);
    }
    return buffers;
  }

  // Returns positions [first, first+count) of `a` (and `b`, as load_f32_rows) as bf16 rows, `stride` apart. In place
  // only in full tiles of eight rows, because the kernels read whole tiles, and memory after the last position may not
  // be readable.
  const uint16_t* load_bf16_rows(const Strided& a, int64_t da, const Strided& b, int64_t db, const SequenceRun& run,
      int64_t head, int64_t first, int count, uint16_t* buffers, int64_t& stride) const {
    if (!b.data && a.type == DType::BF16 && count % 8 == 0) {
      stride = a.position;
      return reinterpret_cast<const uint16_t*>(kv_row(a, run, head, first));
    }
    stride = da + db;
    for (int i = 0; i < count; ++i) {
      bf16->convert_row(kv_row(a, run, head, first + i), a.type, int(da), buffers + i * stride);
      if (b.data) bf16->convert_row(kv_row(b, run, head, first + i), b.type, int(db), buffers + i * stride + da);
    }
    return buffers;
  }

  // Returns the address of a later position, to prefetch; `fallback`, which is cached already, past the end or if rows
  // are not contiguous half precision.
  const void* prefetch_address(const Strided& t, int64_t columns, const SequenceRun& run, int64_t head,
      int64_t position, int64_t last, const void* fallback) const {
    return position < last && t.position == columns ? kv_row(t, run, head, position) : fallback;
  }

  // Returns whether the values are the first columns of the keys' rows (MLA: both are the latent), so that one
  // conversion serves both.
  bool values_in_keys() const {
    return c.v.data == c.k.data && c.v.type == c.k.type && c.v.batch == c.k.batch && c.v.head == c.k.head &&
        c.v.position == c.k.position && c.dv <= c.dk;
  }

  struct Buffers {  // of a worker; k has space for eight more keys; k and v hold bf16 or f32
    float *q, *k, *v, *scores;
    uint32_t *pair_q, *probs;
  };

  // Converts the latent and RoPE columns of up to eight keys to bf16 rows at `to`. Rows past `last` stay uninitialized:
  // their scores are not used.
  void convert_latent_rows(const SequenceRun& run, int64_t head, int64_t first, int64_t last, uint16_t* to) const {
    for (int64_t i = first; i < std::min(first + 8, last); ++i, to += c.dk + c.dr) {
      bf16->convert_row(kv_row(c.k, run, head, i), c.k.type, int(c.dk), to);
      bf16->convert_row(kv_row(c.k_rope, run, head, i), c.k_rope.type, int(c.dr), to + c.dk);
    }
  }

  // Absorbed MLA: computes the scores of eight keys, the block's keys from `j` on, and converts the next eight rows to
  // bf16 in the same kernel call, which interleaves the two, because that is faster than one after the other. The first
  // eight rows of the next block are converted before the values of this block are used, so they are stored after its
  // end.
  void score_and_convert_latent(const Buffers& buffers, const SequenceRun& run, int64_t head, int row_vectors,
      int64_t key, int j, int64_t last, float* scores) const {
    const int64_t d = c.dk + c.dr, next = key + 8;
    const bool has_next = next + 8 <= last;
    uint16_t* current_rows = reinterpret_cast<uint16_t*>(buffers.k) + j * d;
    // with fewer than eight left: converts this row eight times and discards it
    const int64_t from = has_next ? next : key;
    const int64_t size = int64_t(size_of(c.k.type));
    const LatentConversion conversion{kv_row(c.k, run, head, from), kv_row(c.k_rope, run, head, from),
        has_next ? c.k.position * size : 0, has_next ? c.k_rope.position * size : 0, c.k.type, int(c.dk), int(c.dr),
        current_rows + 8 * d};
    bf16->score_latent(buffers.pair_q, row_vectors, current_rows, conversion, scores);
    if (!has_next) convert_latent_rows(run, head, next, last, current_rows + 8 * d);
  }

  // Computes the unnormalized softmax of a block of queries over the keys [first, last) of one part: per block of keys
  // scores, mask, online softmax, and accumulation of probabilities times values into `state`. Keys up to `end` follow
  // in later parts; they are only prefetched.
  void attend_part(const ItemLocation& at, const Buffers& buffers, int64_t first, int64_t last, int64_t end,
      SoftmaxState state) const {
    const auto [run_of_item, head_block, token, tokens, part] = at;
    const SequenceRun& run = *run_of_item;
    const int num_rows = int(tokens * group), row_vectors = (num_rows + 15) / 16;
    const int64_t d = c.dk + c.dr;
    std::fill(state.row_max, state.row_max + row_vectors * 16, NEG_INF);
    std::fill(state.sum, state.sum + row_vectors * 16, 0.0f);
    std::fill(state.out, state.out + num_rows * c.dv, 0.0f);
    // Scores are [row][BLOCK_KEYS] in f32 and [key][row_vectors * 16 rows] in bf16.
    const int64_t row_stride = bf16 ? 1 : BLOCK_KEYS, key_stride = bf16 ? row_vectors * 16 : 1;
    const auto mask_scores = [&](int64_t key, int keys) {
      for (int64_t t = 0; t < tokens; ++t)
        for (int64_t g = 0; g < group; ++g)
          mask_row(run, head_block * group + g, token + t, key, keys, buffers.scores + (t * group + g) * row_stride,
              key_stride);
    };
    const Strided none{};
    const bool fused_latent = bf16 && values_in_keys() && c.k_rope.type == c.k.type && row_vectors <= 2 &&
        c.dk % 32 == 0 && c.dr % 32 == 0 && c.dr;
    uint16_t* const k_buffer = reinterpret_cast<uint16_t*>(buffers.k);
    if (fused_latent) convert_latent_rows(run, head_block / split, first, last, k_buffer);
    for (int64_t key = first; key < last; key += BLOCK_KEYS) {
      const int keys = int(std::min<int64_t>(BLOCK_KEYS, last - key));
      if (fused_latent && key > first) std::copy_n(k_buffer + BLOCK_KEYS * d, 8 * d, k_buffer);
      if (bf16) {
        int64_t stride = d, v_stride = d;
        const uint16_t *k_rows = k_buffer, *v_rows = k_buffer;
        if (!fused_latent)
          k_rows = load_bf16_rows(c.k, c.dk, c.k_rope, c.dr, run, head_block / split, key, keys, k_buffer, stride);
        for (int j = 0; j < keys; j += 8) {
          float* scores = buffers.scores + j * row_vectors * 16;
          if (fused_latent) {
            score_and_convert_latent(buffers, run, head_block / split, row_vectors, key + j, j, last, scores);
            continue;
          }
          const int64_t next_key = key + BLOCK_KEYS + j;
          const void* next[2] = {prefetch_address(c.k, c.dk, run, head_block / split, next_key, end, buffers.scores),
              prefetch_address(c.v, c.dv, run, head_block / split, next_key, end, buffers.scores)};
          bf16->score(buffers.pair_q, row_vectors, k_rows + j * stride, stride, std::min(8, keys - j), int(d), scores,
              next);
        }
        mask_scores(key, keys);
        bf16->online_softmax(buffers.scores, row_vectors, num_rows, keys, int(c.dv), state, buffers.probs);
        if (values_in_keys()) v_stride = stride, v_rows = k_rows;
        else
          v_rows = load_bf16_rows(c.v, c.dv, none, 0, run, head_block / split, key, keys,
              reinterpret_cast<uint16_t*>(buffers.v), v_stride);
        bf16->accumulate_pv(buffers.probs, row_vectors, v_rows, v_stride, num_rows, keys, int(c.dv), state.out);
        continue;
      }
      const float* keys_f = load_f32_rows(c.k, c.dk, c.k_rope, c.dr, run, head_block / split, key, keys, buffers.k);
      const float* values = load_f32_rows(c.v, c.dv, none, 0, run, head_block / split, key, keys, buffers.v);
      k.score(buffers.q, keys_f, num_rows, keys, int(d), buffers.scores);
      mask_scores(key, keys);
      k.online_softmax(buffers.scores, num_rows, keys, int(c.dv), state);
      k.accumulate_pv(buffers.scores, values, num_rows, keys, int(c.dv), state.out);
    }
  }

  // Computes one item: loads and scales its queries, then computes the partial softmax of a single part, which
  // merge_query_block merges later, or all parts of the keys and the output. `all`, `part_state` and `reordered` are
  // buffers of the worker.
  void attend(int64_t item, const Buffers& buffers, SoftmaxState all, SoftmaxState part_state, float* reordered) const {
    const ItemLocation at_item = locate(item);
    const SequenceRun& run = *at_item.run;
    const int num_rows = int(at_item.tokens * group);
    const int64_t d = c.dk + c.dr;
    for (int64_t t = 0; t < at_item.tokens; ++t)
      for (int64_t g = 0; g < group; ++g) {
        float* row = buffers.q + (t * group + g) * d;
        k.convert(at(c.q, run.batch, at_item.head_block * group + g, run.sequence.first + at_item.token + t), c.q.type,
            c.dk, row);
        if (c.dr)
          k.convert(at(c.q_rope, run.batch, at_item.head_block * group + g, run.sequence.first + at_item.token + t),
              c.q_rope.type, c.dr, row + c.dk);
        for (int64_t i = 0; i < d; ++i) row[i] *= c.scale;
      }
    if (bf16) bf16->pack_queries(buffers.q, num_rows, int(d), (num_rows + 15) / 16, buffers.pair_q);
    int64_t first, last;
    visible_keys(run, at_item.token, at_item.tokens, first, last);
    // Attends to the visible keys of part p.
    const auto attend_to = [&](int64_t p, SoftmaxState state) {
      attend_part(at_item, buffers, std::max(first, p * PART_KEYS), std::min(last, (p + 1) * PART_KEYS), last, state);
    };
    if (run.parts > 1) return attend_to(at_item.part, partial(run.first_partial + item - run.first_item));
    attend_to(first / PART_KEYS, all);
    for (int64_t p = first / PART_KEYS + 1; p * PART_KEYS < last; ++p)
      attend_to(p, part_state), merge_partials(all, part_state, num_rows);
    write_output(item, all, reordered);
  }

  // Merges the softmax `more` into `all`: both are rescaled to the larger of the two row maxima. Called in the order of
  // the parts, so that the result does not depend on which worker computed them.
  void merge_partials(SoftmaxState all, SoftmaxState more, int num_rows) const {
    for (int r = 0; r < num_rows; ++r) {
      if (more.row_max[r] == NEG_INF) continue;
      const float new_max = std::max(all.row_max[r], more.row_max[r]);
      const float scale_all = all.row_max[r] == NEG_INF ? 0 : expf(all.row_max[r] - new_max),
                  scale_more = expf(more.row_max[r] - new_max), *from = more.out + r * c.dv;
      float* to = all.out + r * c.dv;
      for (int64_t i = 0; i < c.dv; ++i) to[i] = to[i] * scale_all + from[i] * scale_more;
      all.sum[r] = all.sum[r] * scale_all + more.sum[r] * scale_more, all.row_max[r] = new_max;
    }
  }

  // Divides the accumulated rows of an item by their softmax sums (plus the sink of the head) and stores them in c.out.
  // The bf16 kernels accumulate columns in another order, which `reordered` undoes. A row without a visible key is
  // zero.
  void write_output(int64_t item, SoftmaxState state, float* reordered) const {
    const auto [run, head_block, token, tokens, part] = locate(item);
    for (int64_t t = 0; t < tokens; ++t)
      for (int64_t g = 0; g < group; ++g) {
        const int64_t row = t * group + g, head = head_block * group + g;
        float total = state.sum[row];
        if (c.sinks && state.row_max[row] > NEG_INF) total += expf(c.sinks[head] - state.row_max[row]);
        const float inverse = total > 0 ? 1 / total : 0;
        float *from = state.out + row * c.dv, *out = bf16 ? reordered : from;
        for (int64_t i = 0; i < c.dv; ++i) out[bf16 ? i / 32 * 32 + bf16->column_order[i % 32] : i] = from[i] * inverse;
        const int64_t to = ((run->batch * c.queries + run->sequence.first + token + t) * c.heads + head) * c.dv;
        from_floats(out, c.out_type, c.dv, static_cast<uint8_t*>(c.out) + to * int64_t(size_of(c.out_type)));
      }
  }

  SoftmaxState partial(int64_t i) const {
    return {partial_max + i * BLOCK_ROWS, partial_sum + i * BLOCK_ROWS, partial_out + i * BLOCK_ROWS * c.dv};
  }

  // Merges the partial softmaxes of a block of queries whose keys several workers computed, and stores the output.
  // `index`: of the block among all blocks with split keys, which finds its sequence.
  void merge_query_block(int64_t index, float* reordered) const {
    const SequenceRun* run = first_run;
    while (run->parts == 1 || index >= run->first_merge + c.kv_heads * split * run->blocks) ++run;
    const int64_t block = index - run->first_merge, parts = run->parts, item = run->first_item + block * parts,
                  first = run->first_partial + block * parts;
    const SoftmaxState all = partial(first);
    for (int64_t p = 1; p < parts; ++p) merge_partials(all, partial(first + p), int(locate(item).tokens * group));
    write_output(item, all, reordered);
  }

  // Runs one worker of the pool: reserves its buffers, takes items, then, if keys are split, waits until all items are
  // done and takes merges.
  void run_worker() {
    Scratch& own = worker_scratch;
    const int64_t d = c.dk + c.dr;
    // The bytes of what is taken below, with some to spare for alignment.
    own.reset(size_t(2 * BLOCK_ROWS + BLOCK_KEYS + 8) * d * 4 + size_t(BLOCK_KEYS + 2 * BLOCK_ROWS + 1) * c.dv * 4 +
        (2 * BLOCK_ROWS * BLOCK_KEYS + 4 * BLOCK_ROWS) * 4 + 1024);
    const Buffers buffers{own.take<float>(BLOCK_ROWS * d), own.take<float>((BLOCK_KEYS + 8) * d),
        own.take<float>(BLOCK_KEYS * c.dv), own.take<float>(BLOCK_ROWS * BLOCK_KEYS),
        own.take<uint32_t>(BLOCK_ROWS * d), own.take<uint32_t>(BLOCK_ROWS * BLOCK_KEYS)};
    const SoftmaxState all{own.take<float>(BLOCK_ROWS), own.take<float>(BLOCK_ROWS),
        own.take<float>(BLOCK_ROWS * c.dv)};
    const SoftmaxState part_state{own.take<float>(BLOCK_ROWS), own.take<float>(BLOCK_ROWS),
        own.take<float>(BLOCK_ROWS * c.dv)};
    float* reordered = own.take<float>(c.dv);
    for (int64_t item; (item = untaken_items.take()) < items;) attend(item, buffers, all, part_state, reordered);
    if (!merges) return;
    barrier();
    for (int64_t index; (index = untaken_merges.take()) < merges;) merge_query_block(index, reordered);
  }

  // Adds the work items of a sequence to the job, and counts the partial softmaxes and merges that they need. Its keys
  // are split only if its blocks of queries alone would leave workers idle.
  void add_sequence(const Sequence& sequence, int64_t batch) {
    SequenceRun run{sequence, batch, 0, 1, items, partials, merges};
    run.blocks = (sequence.queries + block_tokens - 1) / block_tokens;
    const int64_t query_blocks = c.kv_heads * split * run.blocks;
    if (query_blocks < threads()) run.parts = std::max<int64_t>(1, (sequence.keys + PART_KEYS - 1) / PART_KEYS);
    items += query_blocks * run.parts;
    if (run.parts > 1) partials += query_blocks * run.parts, merges += query_blocks;
    runs.push_back(run);
  }
};
}  // namespace

// Chooses bf16 or f32 kernels, cuts the call into work items, and runs them in the pool. bf16 needs half-precision keys
// and values with column counts that the kernels take.
void attention(const AttentionCall& c) {
  const AttentionKernels& kernels = attention_kernels();
  const int64_t heads_per_kv_head = c.heads / c.kv_heads;
  const bool is_half = c.k.type != DType::F32 && c.v.type != DType::F32 && (!c.dr || c.k_rope.type != DType::F32) &&
      c.dk % 2 == 0 && c.dr % 2 == 0 && c.dv % 32 == 0;
  const Bf16Kernels* bf16 = is_half ? kernels.bf16 : nullptr;
  const int64_t max_rows = bf16 ? BLOCK_ROWS : F32_BLOCK_ROWS;
  // more heads on one key/value head than a block holds: several blocks
  int64_t split = (heads_per_kv_head + max_rows - 1) / max_rows;
  while (heads_per_kv_head % split) ++split;
  AttentionJob job{.c = c, .k = kernels, .bf16 = bf16, .split = split, .group = heads_per_kv_head / split};
  job.block_tokens = std::max<int64_t>(1, max_rows / job.group);
  runs.clear();
  for (int64_t i = 0; i < (c.sequences ? c.sequence_count : c.batches); ++i) {
    if (c.sequences) job.add_sequence(c.sequences[i], 0);
    else job.add_sequence({0, c.queries, c.keys, nullptr}, i);
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
