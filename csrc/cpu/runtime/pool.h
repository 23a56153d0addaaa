// One team of threads for every kernel: the caller is member 0, the others are pinned to cores of their own.
#pragma once
#include <atomic>
#include <cstdint>
#include <utility>

#include "cpu/runtime/numa.h"

namespace ktx {
int threads();            // size of the team, caller included
double idle_seconds();    // since the last run; 0 inside one
void set_threads(int n);  // 1..1024; takes effect for the next run

// Calls fn(context, member) on the caller and on every member that comes while the caller works, and returns when these are done. Work is
// therefore shared by queues and never by a member's number. The first exception is rethrown here.
// Calls from several threads are served one after another; a call from inside a run is an error.
void run(void (*fn)(void* context, int worker), void* context);
void barrier();  // inside a run, at most 500 times: returns when all who have come are at it, or behind it, or have failed

template <class F>
void parallel(F&& f) {
  run([](void* context, int worker) { (*static_cast<F*>(context))(worker); }, &f);
}

// Items 0, 1, 2, ... handed out to whoever asks first.
struct Queue {
  std::atomic<int64_t> next{0};
  int64_t take() { return next.fetch_add(1, std::memory_order_relaxed); }
};

int current_node();  // of the member that asks

// RowBlocks of work handed out in runs of neighbours, long ones first: a member reads long stretches of memory, and all end together. Each memory node
// has a share of the units; its members take from that, and when nothing is left from the others'. They always know the run after the present one, so that they can
// fetch its weights ahead.
struct Range { int64_t first, count; };  // count 0: nothing is left

struct StealingRange {
  struct Share {
    int64_t begin = 0, end = 0;
    alignas(64) std::atomic<int64_t> next{0};
  };
  int64_t max_length = 1;
  int num_workers = 1;
  Share shares[MAX_NODES];

  void share(int node, int64_t begin, int64_t end) {
    shares[node].begin = begin, shares[node].end = end;
    shares[node].next.store(begin, std::memory_order_relaxed);
  }
  int64_t length(const Share& s, int64_t at, int64_t segment_end) const {  // of the run that begins at `at`; `segment_end`: where its stretch of memory ends
    const int64_t part = (s.end - at) * nodes() / (4 * num_workers), most = part < max_length ? part : max_length;
    return most < 1 ? 1 : most < segment_end - at ? most : segment_end - at;
  }
  template <class B>  // border(unit): the end of the stretch that the unit lies in
  Range take(int node, B&& segment_end) {
    for (int i = 0; i < nodes(); ++i) {
      Share& s = shares[(node + i) % nodes()];
      int64_t at = s.next.load(std::memory_order_relaxed);
      while (at < s.end) {
        const int64_t n = length(s, at, segment_end(at));
        if (!s.next.compare_exchange_weak(at, at + n, std::memory_order_relaxed)) continue;
        if (nodes() > 1) record_units(i == 0, n);
        return {at, n};
      }
    }
    return {0, 0};
  }
  template <class B>  // what a member probably gets first
  Range peek(int worker, B&& segment_end) const {
    const Share& s = shares[current_node()];
    int64_t at = s.begin;
    for (int turn = worker / nodes(); turn > 0 && at < s.end; --turn) at += length(s, at, segment_end(at));
    return at < s.end ? Range{at, length(s, at, segment_end(at))} : Range{0, 0};
  }
  template <class B, class F>  // f(run, the one after it)
  void for_each(B&& segment_end, F&& f) {
    const int node = current_node();
    for (Range run = take(node, segment_end); run.count;) {
      const Range then = take(node, segment_end);
      f(run, then);
      run = then;
    }
  }
};
}  // namespace ktx
