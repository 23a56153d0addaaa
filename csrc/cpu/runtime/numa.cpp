#include "cpu/runtime/numa.h"

#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

namespace ktx {
namespace {
constexpr int PREFERRED = 1;  // MPOL_PREFERRED: another node if this one is full
constexpr int HIGHEST = 1023;
constexpr size_t PAGE = 4096;

struct Found {
  std::vector<int> numbers;             // node ids of the operating system
  std::vector<std::vector<int>> cpus;   // usable CPUs of each
  int shares = 1;
  bool fake = false;
};

std::vector<int> usable_cpus(int node) {  // from a kernel list: 0-3,8
  std::vector<int> cpus;
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof set, &set) != 0) return cpus;
  char path[64];
  std::snprintf(path, sizeof path, "/sys/devices/system/node/node%d/cpulist", node);
  std::FILE* file = std::fopen(path, "re");
  if (!file) return cpus;
  for (int low, high; std::fscanf(file, "%d", &low) == 1;) {
    high = low;
    int c = std::fgetc(file);
    if (c == '-' && std::fscanf(file, "%d", &high) == 1) c = std::fgetc(file);
    for (int cpu = low; cpu <= high && cpu < CPU_SETSIZE; ++cpu)
      if (CPU_ISSET(cpu, &set)) cpus.push_back(cpu);
    if (c != ',') break;
  }
  std::fclose(file);
  return cpus;
}

Found find() {
  Found found;
  for (int node = 0; node <= HIGHEST && int(found.numbers.size()) < MAX_NODES; ++node)
    if (std::vector<int> cpus = usable_cpus(node); !cpus.empty()) found.numbers.push_back(node), found.cpus.push_back(std::move(cpus));
  found.shares = found.numbers.empty() ? 1 : int(found.numbers.size());
  const char* requested = std::getenv("KTX_NUMA");
  if (!requested || !*requested || !std::strcmp(requested, "auto")) return found;
  if (!std::strcmp(requested, "off")) {
    found.shares = 1;
    return found;
  }
  char* end = nullptr;
  const long count = std::strncmp(requested, "fake:", 5) ? 0 : std::strtol(requested + 5, &end, 10);
  if (count < 1 || count > MAX_NODES || *end)
    throw std::runtime_error("KTX_NUMA=" + std::string(requested) + " is not known: use auto, off or fake:N with N from 1 to " + std::to_string(MAX_NODES));
  found.shares = int(count), found.fake = true;
  return found;
}

const Found& found() {
  static const Found it = find();
  return it;
}

std::atomic<int64_t> own_units{0}, stolen_units{0};
}  // namespace

int nodes() { return found().shares; }
bool fake_nodes() { return found().fake; }
const std::vector<int>& node_cpus(int node) { return found().cpus.at(size_t(node)); }

void bind(void* memory, size_t bytes, int node) {
  const Found& it = found();
  if (it.numbers.empty()) return;
  const int number = it.numbers[size_t(node) % it.numbers.size()];
  unsigned long mask[(HIGHEST + 1) / (8 * sizeof(unsigned long))] = {};
  mask[size_t(number) / (8 * sizeof(long))] = 1ul << (size_t(number) % (8 * sizeof(long)));
  const uintptr_t begin = reinterpret_cast<uintptr_t>(memory) & ~(PAGE - 1), end = reinterpret_cast<uintptr_t>(memory) + bytes;
  if (end <= begin) return;
  syscall(SYS_mbind, begin, ((end - begin) + PAGE - 1) & ~(PAGE - 1), PREFERRED, mask, HIGHEST + 1, 0);  // some containers refuse it: first touch decides then
}

std::vector<int64_t> pages_on(const void* memory, size_t bytes) {
  const Found& it = found();
  std::vector<int64_t> count(it.numbers.size());
  const uintptr_t begin = reinterpret_cast<uintptr_t>(memory) & ~(PAGE - 1);
  const size_t pages = (reinterpret_cast<uintptr_t>(memory) + bytes - begin + PAGE - 1) / PAGE;
  for (size_t first = 0; first < pages; first += 1024) {
    void* at[1024];
    int status[1024];
    const size_t some = pages - first < 1024 ? pages - first : 1024;
    for (size_t i = 0; i < some; ++i) at[i] = reinterpret_cast<void*>(begin + (first + i) * PAGE);
    if (syscall(SYS_move_pages, 0, some, at, nullptr, status, 0) != 0) return count;
    for (size_t i = 0; i < some; ++i)
      for (size_t n = 0; n < it.numbers.size(); ++n) count[n] += status[i] == it.numbers[n];
  }
  return count;
}

StealStats steal_stats() { return {own_units.load(std::memory_order_relaxed), stolen_units.load(std::memory_order_relaxed)}; }
void record_units(bool own, int64_t count) { (own ? own_units : stolen_units).fetch_add(count, std::memory_order_relaxed); }
}  // namespace ktx
