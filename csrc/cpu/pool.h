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

// The same for members that always know the item after the present one, so that they can fetch its weights ahead.
struct Line {
  int64_t count = 0;
  Queue queue{};
  template <class F>  // f(item, the one after it or -1)
  void walk(F&& f) {
    for (int64_t item = queue.take(); item < count;) {
      const int64_t then = queue.take();
      f(item, then < count ? then : -1);
      item = then;
    }
  }
};
}  // namespace ktx
