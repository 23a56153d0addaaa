// One team of threads for every kernel: the caller is member 0, the others are pinned to cores of their own.
#pragma once
#include <atomic>
#include <cstdint>
#include <utility>

namespace ktx {
int threads();            // size of the team, caller included
void set_threads(int n);  // 1..1024; takes effect for the next run

// Calls fn(context, member) on every member and returns when all are done. The first exception is rethrown here.
// Calls from several threads are served one after another; a call from inside a run is an error.
void run(void (*fn)(void* context, int member), void* context);
void barrier();  // inside a run: returns when every member has reached it

template <class F>
void parallel(F&& f) {
  run([](void* context, int member) { (*static_cast<F*>(context))(member); }, &f);
}

// Items 0, 1, 2, ... handed out to whoever asks first.
struct Queue {
  std::atomic<int64_t> next{0};
  int64_t take() { return next.fetch_add(1, std::memory_order_relaxed); }
};

// Units 0, 1, 2, ... of work handed out in runs of neighbours, long ones first: a member reads long stretches of memory, and all end
// together. Members always know the run after the present one, so that they can fetch its weights ahead.
struct Run { int64_t first, count; };  // count 0: nothing is left

struct Line {
  int64_t count = 0, longest = 1;
  int team = 1;
  std::atomic<int64_t> next{0};

  int64_t length(int64_t at, int64_t border) const {  // of the run that begins at `at`; `border`: where its stretch of memory ends
    const int64_t share = (count - at) / (4 * team), most = share < longest ? share : longest;
    return most < 1 ? 1 : most < border - at ? most : border - at;
  }
  template <class B>  // border(unit): the end of the stretch that the unit lies in
  Run take(B&& border) {
    int64_t at = next.load(std::memory_order_relaxed);
    while (at < count) {
      const int64_t n = length(at, border(at));
      if (next.compare_exchange_weak(at, at + n, std::memory_order_relaxed)) return {at, n};
    }
    return {count, 0};
  }
  template <class B>  // what the `turn`-th caller of take gets
  Run foresee(int turn, B&& border) const {
    int64_t at = 0;
    for (; turn > 0 && at < count; --turn) at += length(at, border(at));
    return at < count ? Run{at, length(at, border(at))} : Run{count, 0};
  }
  template <class B, class F>  // f(run, the one after it)
  void walk(B&& border, F&& f) {
    for (Run run = take(border); run.count;) {
      const Run then = take(border);
      f(run, then);
      run = then;
    }
  }
};
}  // namespace ktx
