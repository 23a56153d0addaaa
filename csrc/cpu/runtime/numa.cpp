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
// MPOL_PREFERRED of linux/mempolicy.h: the system takes another node if this one is full
constexpr int POLICY_PREFERRED = 1;
constexpr int MAX_OS_ID = 1023;
constexpr size_t PAGE_BYTES = 4096;

struct NodeTopology {
  // of the real nodes with usable CPUs: ids of the operating system, which may have gaps
  std::vector<int> os_ids;
  std::vector<std::vector<int>> cpus;  // usable CPUs of each real node
  // that weights are distributed over; with KTX_NUMA=off or fake:N not the real number
  int num_nodes = 1;
  bool fake = false;
};

// Returns the CPUs of a node that this process may use, read from the kernel's list ("0-3,8"). Empty: no such node.
std::vector<int> usable_cpus(int node) {
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

// Reads the real nodes from sysfs, then applies KTX_NUMA (auto, off or fake:N; see numa.h) to their number.
NodeTopology detect_nodes() {
  NodeTopology found;
  for (int node = 0; node <= MAX_OS_ID && int(found.os_ids.size()) < MAX_NODES; ++node)
    if (std::vector<int> cpus = usable_cpus(node); !cpus.empty())
      found.os_ids.push_back(node), found.cpus.push_back(std::move(cpus));
  found.num_nodes = found.os_ids.empty() ? 1 : int(found.os_ids.size());
  const char* requested = std::getenv("KTX_NUMA");
  if (!requested || !*requested || !std::strcmp(requested, "auto")) return found;
  if (!std::strcmp(requested, "off")) {
    found.num_nodes = 1;
    return found;
  }
  char* end = nullptr;
  const long count = std::strncmp(requested, "fake:", 5) ? 0 : std::strtol(requested + 5, &end, 10);
  if (count < 1 || count > MAX_NODES || *end)
    throw std::runtime_error("KTX_NUMA=" + std::string(requested) +
        " is not known: use auto, off or fake:N with N from 1 to " + std::to_string(MAX_NODES));
  found.num_nodes = int(count), found.fake = true;
  return found;
}

const NodeTopology& topology() {
  static const NodeTopology detected = detect_nodes();
  return detected;
}

std::atomic<int64_t> own_items{0}, stolen_items{0};
}  // namespace

int nodes() { return topology().num_nodes; }
bool fake_nodes() { return topology().fake; }
const std::vector<int>& node_cpus(int node) { return topology().cpus.at(size_t(node)); }

// Asks the system (mbind) to place the pages of `memory` on a node when they are first written. mbind takes whole
// pages: the range is rounded outwards. With fake nodes, node i is the real node i modulo their number.
void bind_to_node(void* memory, size_t bytes, int node) {
  const NodeTopology& detected = topology();
  if (detected.os_ids.empty()) return;
  const int os_id = detected.os_ids[size_t(node) % detected.os_ids.size()];
  unsigned long mask[(MAX_OS_ID + 1) / (8 * sizeof(unsigned long))] = {};
  mask[size_t(os_id) / (8 * sizeof(long))] = 1ul << (size_t(os_id) % (8 * sizeof(long)));
  const uintptr_t begin = reinterpret_cast<uintptr_t>(memory) & ~(PAGE_BYTES - 1),
                  end = reinterpret_cast<uintptr_t>(memory) + bytes;
  if (end <= begin) return;
  // some containers refuse it: first touch decides then
  syscall(SYS_mbind, begin, ((end - begin) + PAGE_BYTES - 1) & ~(PAGE_BYTES - 1), POLICY_PREFERRED, mask, MAX_OS_ID + 1,
      0);
}

// Counts the pages of `memory` on each node, so that tests can check where weights are. move_pages without target nodes
// moves nothing and returns the node of each page. Queries BATCH pages at a time, to keep the arrays on the stack.
std::vector<int64_t> pages_on(const void* memory, size_t bytes) {
  constexpr size_t BATCH = 1024;
  const NodeTopology& detected = topology();
  std::vector<int64_t> count(detected.os_ids.size());
  const uintptr_t begin = reinterpret_cast<uintptr_t>(memory) & ~(PAGE_BYTES - 1);
  const size_t pages = (reinterpret_cast<uintptr_t>(memory) + bytes - begin + PAGE_BYTES - 1) / PAGE_BYTES;
  for (size_t first = 0; first < pages; first += BATCH) {
    void* addresses[BATCH];
    int status[BATCH];
    const size_t batch = pages - first < BATCH ? pages - first : BATCH;
    for (size_t i = 0; i < batch; ++i) addresses[i] = reinterpret_cast<void*>(begin + (first + i) * PAGE_BYTES);
    if (syscall(SYS_move_pages, 0, batch, addresses, nullptr, status, 0) != 0) return count;
    for (size_t i = 0; i < batch; ++i)
      for (size_t n = 0; n < detected.os_ids.size(); ++n) count[n] += status[i] == detected.os_ids[n];
  }
  return count;
}

StealCounts steal_stats() {
  return {own_items.load(std::memory_order_relaxed), stolen_items.load(std::memory_order_relaxed)};
}
void record_items(bool own, int64_t count) {
  (own ? own_items : stolen_items).fetch_add(count, std::memory_order_relaxed);
}
}  // namespace ktx
