#include "cpu/runtime/pool.h"

#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <climits>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <memory>
#include <mutex>
#include <new>
#include <stdexcept>
#include <thread>
#include <vector>

namespace ktx {
namespace {
// Spinning is bounded, because on a busy machine an endless spin costs up to forty times the work itself. Python runs between two kernels of a
// token, which takes longer than a wait inside a kernel, and waking a sleeping thread costs 50 us.
constexpr int SPINS_IN_RUN = 4000, SPINS_BETWEEN_RUNS = 20000;  // pause instructions: about 50 and 250 us

void relax() { __builtin_ia32_pause(); }

void futex_wait(std::atomic<uint32_t>& word, uint32_t seen) {
  syscall(SYS_futex, reinterpret_cast<uint32_t*>(&word), FUTEX_WAIT_PRIVATE, seen, nullptr, nullptr, 0);
}
void futex_wake(std::atomic<uint32_t>& word) {
  syscall(SYS_futex, reinterpret_cast<uint32_t*>(&word), FUTEX_WAKE_PRIVATE, INT_MAX, nullptr, nullptr, 0);
}

// A futex word: waiters spin for a while, then sleep.
struct Signal {
  std::atomic<uint32_t> value{0};
  std::atomic<int> sleepers{0};
  void raise() {
    value.fetch_add(1, std::memory_order_seq_cst);
    if (sleepers.load(std::memory_order_seq_cst)) futex_wake(value);
  }
  void wait_while(uint32_t seen, int spins = SPINS_IN_RUN) {
    for (int i = 0; i < spins; ++i, relax())
      if (value.load(std::memory_order_acquire) != seen) return;
    sleepers.fetch_add(1, std::memory_order_seq_cst);
    while (value.load(std::memory_order_seq_cst) == seen) futex_wait(value, seen);
    sleepers.fetch_sub(1, std::memory_order_relaxed);
  }
};

// The state of a run in one word, so that each transition is one compare-exchange. A run waits only for workers that have joined: waking a worker takes
// milliseconds on a busy machine, and a late worker finds the queues empty.
struct State {
  uint32_t run = 0;                           // run id
  uint32_t joined : 11 = 0, arrived : 11 = 0;   // workers inside, and those at the barrier
  uint32_t phase : 9 = 0, closed : 1 = 1;     // barriers passed; closed: no worker may join any more
};
static_assert(sizeof(State) == 8 && std::atomic<State>::is_always_lock_free);

// The lowest logical CPU of the core of `cpu`, or `cpu` if sysfs does not have it.
int first_sibling(int cpu) {
  char path[96];
  std::snprintf(path, sizeof path, "/sys/devices/system/cpu/cpu%d/topology/thread_siblings_list", cpu);
  int first = cpu;
  if (FILE* file = std::fopen(path, "re")) {
    if (std::fscanf(file, "%d", &first) != 1) first = cpu;
    std::fclose(file);
  }
  return first;
}

int node_of(int cpu) {
  if (fake_nodes()) return cpu % nodes();
  for (int node = 0; node < nodes() && nodes() > 1; ++node) {
    const std::vector<int>& own = node_cpus(node);
    if (std::find(own.begin(), own.end(), cpu) != own.end()) return node;
  }
  return 0;
}

// The first CPU of each node, then the second of each, and so on: a small pool uses the memory of all nodes.
std::vector<int> interleave_nodes(const std::vector<int>& cpus) {
  std::vector<std::vector<int>> of(static_cast<size_t>(nodes()));
  for (int cpu : cpus) of[size_t(node_of(cpu))].push_back(cpu);
  std::vector<int> mixed;
  for (size_t i = 0; mixed.size() < cpus.size(); ++i)
    for (const std::vector<int>& own : of)
      if (i < own.size()) mixed.push_back(own[i]);
  return mixed;
}

struct Cores {
  std::vector<int> cpus;  // usable CPUs: one of each core before the siblings, nodes interleaved
  int num_cores = 0;          // physical cores
};
Cores allowed_cores() {
  Cores found;
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof set, &set) != 0) return found;
  std::vector<int> seen, rest;
  for (int cpu = 0; cpu < CPU_SETSIZE; ++cpu) {
    if (!CPU_ISSET(cpu, &set)) continue;
    const int core = first_sibling(cpu);
    if (std::find(seen.begin(), seen.end(), core) != seen.end()) rest.push_back(cpu);
    else seen.push_back(core), found.cpus.push_back(cpu);
  }
  found.num_cores = int(seen.size());
  found.cpus = interleave_nodes(found.cpus);
  rest = interleave_nodes(rest);
  found.cpus.insert(found.cpus.end(), rest.begin(), rest.end());
  return found;
}

thread_local bool in_run = false;
thread_local uint32_t worker_phase = 0;  // barriers of this run that the worker has passed
thread_local int node_of_worker = 0;

class ThreadPool {
 public:
  explicit ThreadPool(int size) : size(size) {
    const std::vector<int> cores = allowed_cores().cpus;
    for (int worker = 1; worker < size; ++worker) {
      const int node = fake_nodes() ? worker % nodes() : worker < int(cores.size()) ? node_of(cores[size_t(worker)]) : worker % nodes();
      workers.emplace_back([this, worker, node] {
        node_of_worker = node;
        work(worker);
      });
      if (size <= int(cores.size())) pin(workers.back(), cores[size_t(worker)]);
    }
  }
  ~ThreadPool() {
    stop = true;
    start.raise();
    for (auto& worker : workers) worker.join();
  }
  void run(void (*f)(void*, int), void* c) {
    fn = f, context = c, error = nullptr;
    state.store({.run = state.load().run + 1, .joined = 1, .closed = 0});
    start.raise();
    if (nodes() > 1 && !fake_nodes()) node_of_worker = node_of(sched_getcpu());  // the caller is not pinned
    run_worker(0);
    for (uint32_t seen; seen = done.value.load(), state.load().joined;) done.wait_while(seen);
    if (error) std::rethrow_exception(error);
  }
  // A worker that joins late passes the barriers that opened before, because the queues before them are empty.
  void barrier() {
    bool opened = false;
    const State now = change([&](State& s) {
      opened = false;
      if (worker_phase < s.phase) return;
      if (++s.arrived == s.joined) opened = true, s.arrived = 0, ++s.phase;
    });
    if (opened) gate.raise();
    else if (now.phase == worker_phase)
      for (uint32_t seen; seen = gate.value.load(), state.load().phase == worker_phase;) gate.wait_while(seen);
    ++worker_phase;
  }
  const int size;

 private:
  static void pin(std::thread& worker, int core) {
    cpu_set_t set;
    CPU_ZERO(&set);
    CPU_SET(core, &set);
    pthread_setaffinity_np(worker.native_handle(), sizeof set, &set);  // some containers refuse it: unpinned then
  }
  template <class F>
  State change(F&& f) {  // returns the new state
    for (State seen = state.load();;) {
      State next = seen;
      f(next);
      if (state.compare_exchange_weak(seen, next)) return next;
    }
  }
  void run_worker(int worker) {
    in_run = true, worker_phase = 0;
    try {
      fn(context, worker);
    } catch (...) {
      std::lock_guard<std::mutex> lock(error_mutex);
      if (!error) error = std::current_exception();
    }
    in_run = false;
    leave(worker == 0);
  }
  // The caller ends when the queues are empty, so no worker needs to join after it. A worker that failed is not waited for at the barrier.
  void leave(bool last_call) {
    bool opened = false;
    const State now = change([&](State& s) {
      opened = false;
      if (last_call) s.closed = 1;
      if (--s.joined && s.arrived == s.joined) opened = true, s.arrived = 0, ++s.phase;
    });
    if (opened) gate.raise();
    if (!now.joined && !last_call) done.raise();
  }
  void work(int worker) {
    for (uint32_t seen = 0, awake = 0;;) {
      start.wait_while(awake, SPINS_BETWEEN_RUNS);
      awake = start.value.load();
      if (stop) return;
      bool joined_run = false;
      const State now = change([&](State& s) {
        joined_run = !s.closed && s.run != seen;
        if (joined_run) ++s.joined;
      });
      seen = now.run;
      if (joined_run) run_worker(worker);
    }
  }
  void (*fn)(void*, int) = nullptr;
  void* context = nullptr;
  std::vector<std::thread> workers;
  Signal start, done, gate;
  std::atomic<State> state{};
  std::atomic<bool> stop{false};
  std::mutex error_mutex;
  std::exception_ptr error;
};

int requested_threads() {
  if (const char* text = std::getenv("KTX_THREADS")) {
    const int n = std::atoi(text);
    if (n >= 1 && n <= 1024) return n;
  }
  return std::max(1, allowed_cores().num_cores);
}

constexpr double RUNNING = -1;
std::atomic<double> last_run{0};  // end of the last run
double now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

std::mutex pool_mutex;
int pool_size = 0;
ThreadPool* pool = nullptr;  // never destroyed at exit: workers may still sleep in it

// A forked child has the forking thread only: no workers, and not the thread that may have held the mutex. A run in progress is the parent's. The old
// pool cannot be joined, so the child leaks it (it is small) and its next run creates a new one.
void reset_after_fork() {
  new (&pool_mutex) std::mutex;
  pool = nullptr;
  if (last_run == RUNNING) last_run = now();
}
[[maybe_unused]] const int at_fork = pthread_atfork(nullptr, nullptr, reset_after_fork);

ThreadPool& current() {
  if (!pool_size) pool_size = requested_threads();
  if (pool && pool->size != pool_size) {
    delete pool;
    pool = nullptr;
  }
  if (!pool) pool = new ThreadPool(pool_size);
  return *pool;
}
}  // namespace

int threads() {
  if (in_run) return pool->size;  // the running thread holds the lock
  std::lock_guard<std::mutex> lock(pool_mutex);
  return pool_size ? pool_size : pool_size = requested_threads();
}

void set_threads(int n) {
  if (n < 1 || n > 1024) throw std::runtime_error("threads must be 1 to 1024, got " + std::to_string(n));
  std::lock_guard<std::mutex> lock(pool_mutex);
  pool_size = n;
}

void run(void (*fn)(void*, int), void* context) {
  if (in_run) throw std::runtime_error("ktx: a kernel called the thread pool from inside a run");
  std::lock_guard<std::mutex> lock(pool_mutex);
  const struct RunTimer {
    RunTimer() { last_run = RUNNING; }
    ~RunTimer() { last_run = now(); }
  } mark;
  current().run(fn, context);
}

double idle_seconds() {
  const double last = last_run.load();
  return last == RUNNING ? 0 : now() - last;
}

void barrier() { pool->barrier(); }
int current_node() { return node_of_worker; }
}  // namespace ktx
