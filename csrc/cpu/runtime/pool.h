// The thread pool of all kernels: the caller is worker 0, the other workers are pinned to one core each.
#pragma once
#include <atomic>
#include <cstdint>
#include <utility>

#include "cpu/runtime/numa.h"

namespace ktx {
int threads();            // pool size, caller included
double idle_seconds();    // since the last run; 0 during a run
void set_threads(int n);  // 1..1024; applies to the next run

// Calls fn(context, worker) on the caller and on every worker that joins while the caller works, and returns when all
// of them are done. A worker may not join at all, so work is shared by queues and never by worker index. Rethrows the
// first exception. Calls of several threads run one after another; a call from inside a run is an error.
void run(void (*fn)(void* context, int worker), void* context);
// Ends a phase: returns when every worker that joined the run has arrived, passed, or failed. At most 500 calls a run,
// because the pool counts phases in nine bits.
void barrier();

template <class F>  // run() for a callable f(worker)
void parallel(F&& f) {
  run([](void* context, int worker) { (*static_cast<F*>(context))(worker); }, &f);
}

// Items 0, 1, 2, ... in the order of requests.
struct Queue {
  std::atomic<int64_t> next{0};
  int64_t take() { return next.fetch_add(1, std::memory_order_relaxed); }
};

int current_node();  // NUMA node of the calling worker

// A work-stealing range of items. A pop returns consecutive items, long runs first and shorter ones towards the end, so
// that reads are long and all workers end together. Each NUMA node has a share; its workers take from it, and steal
// from other shares when it is empty. for_each pops one range ahead, so that a worker can prefetch the weights of its
// next range.
struct Range {
  int64_t first, count;
};  // count 0: the queue is empty

struct StealingRange {
  struct Share {
    int64_t begin = 0, end = 0;
    alignas(64) std::atomic<int64_t> next{0};
  };
  int64_t max_length = 1;
  int num_workers = 1;
  Share shares[MAX_NODES];

  // Sets the items of a node's share, before the run.
  void set_share(int node, int64_t begin, int64_t end) {
    shares[node].begin = begin, shares[node].end = end;
    shares[node].next.store(begin, std::memory_order_relaxed);
  }
  // Returns the number of items to pop at `at`: a quarter of an equal split of the items that remain, at most
  // max_length, and never past `segment_end`, the end of the contiguous memory of item `at`.
  int64_t range_length(const Share& s, int64_t at, int64_t segment_end) const {
    const int64_t part = (s.end - at) * nodes() / (4 * num_workers), max_part = part < max_length ? part : max_length;
    return max_part < 1 ? 1 : max_part < segment_end - at ? max_part : segment_end - at;
  }
  // Pops a range from the share of `node`, or from another node's share if that is empty. segment_end(item) returns the
  // end of the contiguous memory of the item.
  template <class B>
  Range take(int node, B&& segment_end) {
    for (int distance = 0; distance < nodes(); ++distance) {
      Share& s = shares[(node + distance) % nodes()];
      int64_t at = s.next.load(std::memory_order_relaxed);
      while (at < s.end) {
        const int64_t n = range_length(s, at, segment_end(at));
        if (!s.next.compare_exchange_weak(at, at + n, std::memory_order_relaxed)) continue;
        if (nodes() > 1) record_items(distance == 0, n);
        return {at, n};
      }
    }
    return {0, 0};
  }
  // Returns the range that `worker` probably pops first, so that it can prefetch this range before the phase begins.
  // Assumes that the workers of a node pop once each, in the order of their indices.
  template <class B>
  Range peek(int worker, B&& segment_end) const {
    const Share& s = shares[current_node()];
    int64_t at = s.begin;
    for (int turn = worker / nodes(); turn > 0 && at < s.end; --turn) at += range_length(s, at, segment_end(at));
    return at < s.end ? Range{at, range_length(s, at, segment_end(at))} : Range{0, 0};
  }
  // Pops ranges until the queue is empty, and calls f(range, the next range of this worker).
  template <class B, class F>
  void for_each(B&& segment_end, F&& f) {
    const int node = current_node();
    for (Range range = take(node, segment_end); range.count;) {
      const Range next = take(node, segment_end);
      f(range, next);
      range = next;
    }
  }
};
}  // namespace ktx
