// Software prefetch of packed weights. The kernels read weights once and in order, and matrices follow each other in a
// list that the driver knows but the CPU's prefetchers do not: past the end of the current weights, prefetching
// continues at the beginning of the next weights. Prefetches are spread evenly, because a CPU drops them when its
// buffers are full.

// How far ahead of its use memory is prefetched: cache lines in a GEMV, spans in a GEMM, and one byte of each page,
// which warms the TLB, because in a large model each page is a TLB miss too.
constexpr int64_t LINE_DISTANCE_BYTES = 4096, SPAN_DISTANCE_BYTES = 6144, PAGE_DISTANCE_BYTES = 16384;
// Memory that will be read soon, prefetched in `steps` calls of fetch(), so that a caller spreads it over its loop.
struct PrefetchRange {
  const uint8_t *at, *end;  // what is still to be prefetched
  int64_t lines_per_call;   // cache lines
  AI explicit PrefetchRange(const uint8_t* begin = nullptr, int64_t bytes = 0, int steps = 1)
      : at(begin), end(begin + bytes), lines_per_call(((bytes + 63) / 64 + steps - 1) / steps) {}
  AI void fetch() {
    const uint8_t* to = at + lines_per_call * 64 < end ? at + lines_per_call * 64 : end;
    for (; at < to; at += 64) __builtin_prefetch(at, 0, 2);
  }
};
// Prefetches weights that end at `end` and continue at `next` (null: the last lines are prefetched again, to no
// effect).
struct Prefetcher {
  const uint8_t* end;
  int64_t jump_bytes;  // from `end` to `next`
  AI Prefetcher(const uint8_t* end, const uint8_t* next)
      : end(end), jump_bytes(next ? next - end : -PAGE_DISTANCE_BYTES) {}
  // Where p really is: addresses past `end` belong to the next weights.
  AI const uint8_t* redirect(const uint8_t* p) const { return p + (p >= end ? jump_bytes : 0); }
  // Prefetches what follows p by LINE_DISTANCE_BYTES, non-temporal. Returns the bytes prefetched: `bytes` rounded up to
  // full lines.
  AI int64_t prefetch_lines(const uint8_t* p, int64_t bytes) const {
    const uint8_t* to = redirect(p + LINE_DISTANCE_BYTES);
    int64_t at = 0;
    for (; at < bytes; at += 64) __builtin_prefetch(to + at, 0, 0);
    return at;
  }
  // The memory SPAN_DISTANCE_BYTES after the span at p, to prefetch in `steps` calls.
  AI PrefetchRange range_of_span(const uint8_t* p, int64_t bytes, int steps) const {
    return PrefetchRange(redirect(p + SPAN_DISTANCE_BYTES), bytes, steps);
  }
  AI void prefetch_page(const uint8_t* p) const { __builtin_prefetch(redirect(p + PAGE_DISTANCE_BYTES), 0, 2); }
};
