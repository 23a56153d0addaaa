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
// Spinning is bounded: beside a busy neighbour an endless spin costs up to forty times the work itself.
// Between two kernels of a token runs Python: longer than a wait inside a kernel, and a thread woken from sleep costs 50 us.
constexpr int SPINS = 4000, SPINS_BETWEEN = 20000;  // pause instructions: about 50 and 250 us

void relax() { __builtin_ia32_pause(); }

void futex_wait(std::atomic<uint32_t>& word, uint32_t seen) {
  syscall(SYS_futex, reinterpret_cast<uint32_t*>(&word), FUTEX_WAIT_PRIVATE, seen, nullptr, nullptr, 0);
}
void futex_wake(std::atomic<uint32_t>& word) {
  syscall(SYS_futex, reinterpret_cast<uint32_t*>(&word), FUTEX_WAKE_PRIVATE, INT_MAX, nullptr, nullptr, 0);
}

// A word that threads wait on: spin a little, then sleep.
struct Signal {
  std::atomic<uint32_t> value{0};
  std::atomic<int> sleepers{0};
  void raise() {
    value.fetch_add(1, std::memory_order_seq_cst);
    if (sleepers.load(std::memory_order_seq_cst)) futex_wake(value);
  }
  void wait_while(uint32_t seen, int spins = SPINS) {
    for (int i = 0; i < spins; ++i, relax())
      if (value.load(std::memory_order_acquire) != seen) return;
    sleepers.fetch_add(1, std::memory_order_seq_cst);
    while (value.load(std::memory_order_seq_cst) == seen) futex_wait(value, seen);
    sleepers.fetch_sub(1, std::memory_order_relaxed);
  }
};

// What a run is at, in one word, so that each step is one exchange. A run waits for those who have come, never for those the system
// has not woken yet: beside a busy neighbour that takes milliseconds, and the queues leave them nothing to do.
struct State {
  uint32_t run = 0;                           // its number
  uint32_t here : 11 = 0, arrived : 11 = 0;   // members inside, and those of them at the barrier
  uint32_t phase : 9 = 0, closed : 1 = 1;     // barriers that have opened; closed: nobody comes any more
};
static_assert(sizeof(State) == 8 && std::atomic<State>::is_always_lock_free);

// The lowest logical cpu of the core that a cpu belongs to; itself where the system does not say.
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
  if (pretended()) return cpu % nodes();
  for (int node = 0; node < nodes() && nodes() > 1; ++node) {
    const std::vector<int>& own = node_cpus(node);
    if (std::find(own.begin(), own.end(), cpu) != own.end()) return node;
  }
  return 0;
}

// The first cpu of each node, then the second of each, and so on: a small team uses the memory of all nodes.
std::vector<int> in_turns(const std::vector<int>& cpus) {
  std::vector<std::vector<int>> of(static_cast<size_t>(nodes()));
  for (int cpu : cpus) of[size_t(node_of(cpu))].push_back(cpu);
  std::vector<int> mixed;
  for (size_t i = 0; mixed.size() < cpus.size(); ++i)
    for (const std::vector<int>& own : of)
      if (i < own.size()) mixed.push_back(own[i]);
  return mixed;
}

struct Cores {
  std::vector<int> cpus;  // that this process may use, one of each core before the second ones, and nodes in turns
  int whole = 0;          // how many cores they are
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
  found.whole = int(seen.size());
  found.cpus = in_turns(found.cpus);
  rest = in_turns(rest);
  found.cpus.insert(found.cpus.end(), rest.begin(), rest.end());
  return found;
}

thread_local bool inside = false;
thread_local uint32_t own_phase = 0;  // barriers of this run that the member is behind
thread_local int node_of_member = 0;

class Team {
 public:
  explicit Team(int size) : size(size) {
    const std::vector<int> cores = allowed_cores().cpus;
    for (int member = 1; member < size; ++member) {
      const int node = pretended() ? member % nodes() : member < int(cores.size()) ? node_of(cores[size_t(member)]) : member % nodes();
      workers.emplace_back([this, member, node] {
        node_of_member = node;
        work(member);
      });
      if (size <= int(cores.size())) pin(workers.back(), cores[size_t(member)]);
    }
  }
  ~Team() {
    stop = true;
    start.raise();
    for (auto& worker : workers) worker.join();
  }
  void run(void (*f)(void*, int), void* c) {
    fn = f, context = c, error = nullptr;
    state.store({.run = state.load().run + 1, .here = 1, .closed = 0});
    start.raise();
    if (nodes() > 1 && !pretended()) node_of_member = node_of(sched_getcpu());  // the caller goes where the system puts it
    member_run(0);
    for (uint32_t seen; seen = done.value.load(), state.load().here;) done.wait_while(seen);
    if (error) std::rethrow_exception(error);
  }
  // Whoever comes late finds the barriers before its time open, and nothing left in the queues before them.
  void barrier() {
    bool opened = false;
    const State now = change([&](State& s) {
      opened = false;
      if (own_phase < s.phase) return;
      if (++s.arrived == s.here) opened = true, s.arrived = 0, ++s.phase;
    });
    if (opened) gate.raise();
    else if (now.phase == own_phase)
      for (uint32_t seen; seen = gate.value.load(), state.load().phase == own_phase;) gate.wait_while(seen);
    ++own_phase;
  }
  const int size;

 private:
  static void pin(std::thread& worker, int core) {
    cpu_set_t set;
    CPU_ZERO(&set);
    CPU_SET(core, &set);
    pthread_setaffinity_np(worker.native_handle(), sizeof set, &set);  // refused in some containers: then unpinned
  }
  template <class F>
  State change(F&& f) {  // the state behind it
    for (State seen = state.load();;) {
      State next = seen;
      f(next);
      if (state.compare_exchange_weak(seen, next)) return next;
    }
  }
  void member_run(int member) {
    inside = true, own_phase = 0;
    try {
      fn(context, member);
    } catch (...) {
      std::lock_guard<std::mutex> lock(error_mutex);
      if (!error) error = std::current_exception();
    }
    inside = false;
    leave(member == 0);
  }
  // The caller's part ends when the queues are empty, so nobody need begin behind it. Who has failed is not waited for at the barrier.
  void leave(bool last_call) {
    bool opened = false;
    const State now = change([&](State& s) {
      opened = false;
      if (last_call) s.closed = 1;
      if (--s.here && s.arrived == s.here) opened = true, s.arrived = 0, ++s.phase;
    });
    if (opened) gate.raise();
    if (!now.here && !last_call) done.raise();
  }
  void work(int member) {
    for (uint32_t seen = 0, awake = 0;;) {
      start.wait_while(awake, SPINS_BETWEEN);
      awake = start.value.load();
      if (stop) return;
      bool came = false;
      const State now = change([&](State& s) {
        came = !s.closed && s.run != seen;
        if (came) ++s.here;
      });
      seen = now.run;
      if (came) member_run(member);
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

int wanted() {
  if (const char* text = std::getenv("KTX_THREADS")) {
    const int n = std::atoi(text);
    if (n >= 1 && n <= 1024) return n;
  }
  return std::max(1, allowed_cores().whole);
}

constexpr double RUNS_NOW = -1;
std::atomic<double> last_run{0};  // when it ended
double now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

std::mutex team_mutex;
int team_size = 0;
Team* team = nullptr;  // never destroyed at exit: workers may still sleep in it

// A forked child has the forking thread alone. The team's members are not in it, and neither is the thread that may have held the mutex; a run that
// was under way is the parent's. The old team is left as it is: it cannot be joined. Its memory is small, and the child's next run makes a new one.
void begin_anew_in_child() {
  new (&team_mutex) std::mutex;
  team = nullptr;
  if (last_run == RUNS_NOW) last_run = now();
}
[[maybe_unused]] const int at_fork = pthread_atfork(nullptr, nullptr, begin_anew_in_child);

Team& current() {
  if (!team_size) team_size = wanted();
  if (team && team->size != team_size) {
    delete team;
    team = nullptr;
  }
  if (!team) team = new Team(team_size);
  return *team;
}
}  // namespace

int threads() {
  if (inside) return team->size;  // whoever runs holds the lock
  std::lock_guard<std::mutex> lock(team_mutex);
  return team_size ? team_size : team_size = wanted();
}

void set_threads(int n) {
  if (n < 1 || n > 1024) throw std::runtime_error("threads must be 1 to 1024, got " + std::to_string(n));
  std::lock_guard<std::mutex> lock(team_mutex);
  team_size = n;
}

void run(void (*fn)(void*, int), void* context) {
  if (inside) throw std::runtime_error("ktx: a kernel called another kernel's team from inside");
  std::lock_guard<std::mutex> lock(team_mutex);
  const struct Mark {
    Mark() { last_run = RUNS_NOW; }
    ~Mark() { last_run = now(); }
  } mark;
  current().run(fn, context);
}

double idle_seconds() {
  const double last = last_run.load();
  return last == RUNS_NOW ? 0 : now() - last;
}

void barrier() { team->barrier(); }
int own_node() { return node_of_member; }
}  // namespace ktx
