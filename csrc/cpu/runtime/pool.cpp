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
// Spinning is bounded, because on a busy machine an endless spin costs up to forty times the work itself. Python runs
// between two kernels of a token, which takes longer than a wait inside a kernel, and waking a sleeping thread costs 50
// us.
constexpr int SPINS_IN_RUN = 4000, SPINS_BETWEEN_RUNS = 20000;  // pause instructions: about 50 and 250 us

void relax() { __builtin_ia32_pause(); }

void futex_wait(std::atomic<uint32_t>& word, uint32_t seen) {
  syscall(SYS_futex, reinterpret_cast<uint32_t*>(&word), FUTEX_WAIT_PRIVATE, seen, nullptr, nullptr, 0);
}
void futex_wake(std::atomic<uint32_t>& word) {
  syscall(SYS_futex, reinterpret_cast<uint32_t*>(&word), FUTEX_WAKE_PRIVATE, INT_MAX, nullptr, nullptr, 0);
}

// A counter to wait on: waiters spin for a while, then sleep in the kernel. `notify` makes a system call only if a
// waiter sleeps.
struct Signal {
  std::atomic<uint32_t> value{0};
  std::atomic<int> sleepers{0};
  void notify() {
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

// The state of a run in one word, so that each transition is one compare-exchange. A run waits only for workers that
// have joined: waking a worker takes milliseconds on a busy machine, and a late worker finds the queues empty.
struct State {                                 // of the current run
  uint32_t run = 0;                            // run id
  uint32_t joined : 11 = 0, arrived : 11 = 0;  // workers inside, and those at the barrier
  uint32_t phase : 9 = 0, closed : 1 = 1;      // barriers passed; closed: no worker may join any more
};
static_assert(sizeof(State) == 8 && std::atomic<State>::is_always_lock_free);

// Returns the lowest logical CPU of the core of `cpu`, which identifies the core: CPUs with the same result are
// hyper-thread siblings. `cpu` itself if sysfs does not have it.
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

// Returns the NUMA node of `cpu`; 0 with a single node or if no node lists it. Fake nodes deal the CPUs out in turn.
int node_of_cpu(int cpu) {
  if (fake_nodes()) return cpu % nodes();
  for (int node = 0; node < nodes() && nodes() > 1; ++node) {
    const std::vector<int>& own = node_cpus(node);
    if (std::find(own.begin(), own.end(), cpu) != own.end()) return node;
  }
  return 0;
}

// Orders CPUs: the first of each node, then the second of each, and so on. The pool takes a prefix of this order, so
// that a small pool uses the memory bandwidth of all nodes.
std::vector<int> interleave_nodes(const std::vector<int>& cpus) {
  std::vector<std::vector<int>> cpus_of_node(static_cast<size_t>(nodes()));
  for (int cpu : cpus) cpus_of_node[size_t(node_of_cpu(cpu))].push_back(cpu);
  std::vector<int> interleaved;
  for (size_t i = 0; interleaved.size() < cpus.size(); ++i)
    for (const std::vector<int>& own : cpus_of_node)
      if (i < own.size()) interleaved.push_back(own[i]);
  return interleaved;
}

struct Cores {
  std::vector<int> cpus;  // usable CPUs: one of each core before the siblings, nodes interleaved
  int num_cores = 0;      // physical cores
};
// Lists the CPUs that the process may use (taskset, cgroups), one of each physical core first: hyper-thread siblings
// share vector units and caches, so a pool no larger than `num_cores` never pins two workers to one core.
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
  // Starts size - 1 threads, because the caller of a run is worker 0. Pins each to its CPU, unless the pool has more
  // workers than there are CPUs.
  explicit ThreadPool(int size) : size(size) {
    const std::vector<int> cores = allowed_cores().cpus;
    for (int worker = 1; worker < size; ++worker) {
      const int node = fake_nodes()    ? worker % nodes()
          : worker < int(cores.size()) ? node_of_cpu(cores[size_t(worker)])
                                       : worker % nodes();
      workers.emplace_back([this, worker, node] {
        node_of_worker = node;
        worker_loop(worker);
      });
      if (size <= int(cores.size())) pin(workers.back(), cores[size_t(worker)]);
    }
  }
  ~ThreadPool() {
    stop = true;
    start_signal.notify();
    for (auto& worker : workers) worker.join();
  }
  // Opens a run, takes part as worker 0, closes the run, and waits for the workers that joined. Rethrows their first
  // exception.
  void run(void (*f)(void*, int), void* c) {
    fn = f, context = c, error = nullptr;
    state.store({.run = state.load().run + 1, .joined = 1, .closed = 0});
    start_signal.notify();
    if (nodes() > 1 && !fake_nodes()) node_of_worker = node_of_cpu(sched_getcpu());  // the caller is not pinned
    run_worker(0);
    for (uint32_t seen; seen = done_signal.value.load(), state.load().joined;) done_signal.wait_while(seen);
    if (error) std::rethrow_exception(error);
  }
  // Waits until all workers that have joined the run have finished this phase; the last one to arrive opens the next
  // phase. A worker that joins late passes the barriers that opened before, because the queues of those phases are
  // empty.
  void barrier() {
    bool completes_phase = false;
    const State updated = update_state([&](State& s) {
      completes_phase = false;
      if (worker_phase < s.phase) return;
      if (++s.arrived == s.joined) completes_phase = true, s.arrived = 0, ++s.phase;
    });
    if (completes_phase) barrier_signal.notify();
    else if (updated.phase == worker_phase)
      for (uint32_t seen; seen = barrier_signal.value.load(), state.load().phase == worker_phase;)
        barrier_signal.wait_while(seen);
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
  // Applies f to the state in one atomic step and returns the new state. f may run several times: it must set its
  // outputs anew.
  template <class F>
  State update_state(F&& f) {
    for (State seen = state.load();;) {
      State next = seen;
      f(next);
      if (state.compare_exchange_weak(seen, next)) return next;
    }
  }
  // Runs the function of the run on this thread and leaves the run. Stores the run's first exception, which run()
  // throws again in the caller.
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
  // Leaves the run. The caller closes it, because the queues are empty when the caller is through, so a worker that
  // joined now would find no work. If all others wait at a barrier, the leaving worker opens it: it may leave early
  // because it failed. The last worker to leave wakes the caller.
  void leave(bool is_caller) {
    bool completes_phase = false;
    const State updated = update_state([&](State& s) {
      completes_phase = false;
      if (is_caller) s.closed = 1;
      if (--s.joined && s.arrived == s.joined) completes_phase = true, s.arrived = 0, ++s.phase;
    });
    if (completes_phase) barrier_signal.notify();
    if (!updated.joined && !is_caller) done_signal.notify();
  }
  // The life of a pool thread: sleeps until a run starts, and joins the run unless it is closed already, because all
  // its work is done then.
  void worker_loop(int worker) {
    for (uint32_t last_run = 0, start_value = 0;;) {
      start_signal.wait_while(start_value, SPINS_BETWEEN_RUNS);
      start_value = start_signal.value.load();
      if (stop) return;
      bool joined_run = false;
      const State updated = update_state([&](State& s) {
        joined_run = !s.closed && s.run != last_run;
        if (joined_run) ++s.joined;
      });
      last_run = updated.run;
      if (joined_run) run_worker(worker);
    }
  }
  void (*fn)(void*, int) = nullptr;
  void* context = nullptr;
  std::vector<std::thread> workers;
  Signal start_signal, done_signal, barrier_signal;
  std::atomic<State> state{};
  std::atomic<bool> stop{false};
  std::mutex error_mutex;
  std::exception_ptr error;
};

// Returns KTX_THREADS if it is valid, else one thread per physical core.
int requested_threads() {
  if (const char* text = std::getenv("KTX_THREADS")) {
    const int n = std::atoi(text);
    if (n >= 1 && n <= 1024) return n;
  }
  return std::max(1, allowed_cores().num_cores);
}

constexpr double RUN_IN_PROGRESS = -1;
std::atomic<double> last_run_end_s{0};  // on the clock of now_s()
double now_s() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

std::mutex pool_mutex;
int pool_size = 0;
ThreadPool* pool = nullptr;  // never destroyed at exit: workers may still sleep in it

// A forked child has the forking thread only: no workers, and not the thread that may have held the mutex. A run in
// progress is the parent's. The old pool cannot be joined, so the child leaks it (it is small) and its next run creates
// a new one.
void reset_after_fork() {
  new (&pool_mutex) std::mutex;
  pool = nullptr;
  if (last_run_end_s == RUN_IN_PROGRESS) last_run_end_s = now_s();
}
[[maybe_unused]] const int at_fork = pthread_atfork(nullptr, nullptr, reset_after_fork);

// Returns the pool, created or replaced if its size is not the requested one. The caller holds the lock.
ThreadPool& current_pool() {
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

// Holds the lock for the whole run, so runs of several threads follow one another. RunTimer records when the run ends,
// an exception included, for idle_seconds().
void run(void (*fn)(void*, int), void* context) {
  if (in_run) throw std::runtime_error("ktx: a kernel called the thread pool from inside a run");
  std::lock_guard<std::mutex> lock(pool_mutex);
  const struct RunTimer {
    RunTimer() { last_run_end_s = RUN_IN_PROGRESS; }
    ~RunTimer() { last_run_end_s = now_s(); }
  } timer;
  current_pool().run(fn, context);
}

double idle_seconds() {
  const double last = last_run_end_s.load();
  return last == RUN_IN_PROGRESS ? 0 : now_s() - last;
}

void barrier() { pool->barrier(); }
int current_node() { return node_of_worker; }
}  // namespace ktx
