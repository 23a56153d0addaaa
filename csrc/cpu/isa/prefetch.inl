// Software prefetch of packed weights.
// Distances of prefetches. One byte 16 KiB ahead warms the TLB, because in a large model each page is a TLB miss too. Past the end of the current
// weights, prefetching continues at the beginning of the next weights. Prefetches are spread, because a CPU drops them when its buffers are full.
constexpr int64_t LINE_DISTANCE_BYTES = 4096, SPAN_DISTANCE_BYTES = 6144, PAGE_DISTANCE_BYTES = 16384;
struct PrefetchRange {  // memory that will be read soon, prefetched in `steps` calls
  const uint8_t *at, *end;
  int64_t lines_per_call;  // per call
  AI explicit PrefetchRange(const uint8_t* begin = nullptr, int64_t bytes = 0, int steps = 1)
      : at(begin), end(begin + bytes), lines_per_call(((bytes + 63) / 64 + steps - 1) / steps) {}
  AI void fetch() {
    const uint8_t* to = at + lines_per_call * 64 < end ? at + lines_per_call * 64 : end;
    for (; at < to; at += 64) __builtin_prefetch(at, 0, 2);
  }
};
struct Prefetcher {
  const uint8_t* end;
  int64_t jump_bytes;
  AI Prefetcher(const uint8_t* end, const uint8_t* next) : end(end), jump_bytes(next ? next - end : -PAGE_DISTANCE_BYTES) {}
  AI const uint8_t* redirect(const uint8_t* p) const { return p + (p >= end ? jump_bytes : 0); }
  AI int64_t prefetch_lines(const uint8_t* p, int64_t bytes) const {  // non-temporal; returns the bytes that were prefetched, in full lines
    const uint8_t* to = redirect(p + LINE_DISTANCE_BYTES);
    int64_t at = 0;
    for (; at < bytes; at += 64) __builtin_prefetch(to + at, 0, 0);
    return at;
  }
  AI PrefetchRange range_of_span(const uint8_t* p, int64_t bytes, int steps) const { return PrefetchRange(redirect(p + SPAN_DISTANCE_BYTES), bytes, steps); }
  AI void prefetch_page(const uint8_t* p) const { __builtin_prefetch(redirect(p + PAGE_DISTANCE_BYTES), 0, 2); }
};

