// Memory nodes. Weights exist once: each node holds a share of the rows of every matrix, and its members of the team read that share first.
#pragma once
#include <cstddef>
#include <cstdint>
#include <vector>

namespace ktx {
constexpr int MAX_NODES = 8;

// The machine's nodes with cpus that this process may use; KTX_NUMA=off: one, KTX_NUMA=fake:N: N pretended ones, so that one node tests what several
// need. Throws std::runtime_error on another word.
int nodes();
bool fake_nodes();
const std::vector<int>& node_cpus(int node);  // of a real node, those that may be used

// Where a node's share of so many groups of rows begins; shares are whole eights of groups, what scales of FP8 and
// units of experts.cpp need.
inline int64_t node_begin(int64_t groups, int node) {
  const int count = nodes();
  return node >= count ? groups : groups * node / count & ~int64_t(7);
}

// Asks the system to keep the memory on a node; pages on the border go to either. Memory that was written stays where it is.
void bind(void* memory, size_t bytes, int node);
// How many pages of some memory lie on each node; pages that were never written lie nowhere.
std::vector<int64_t> pages_on(const void* memory, size_t bytes);

// RowBlocks of work that members took of their own node's share, and of another's. Counted when there are several nodes.
struct StealStats { int64_t own, stolen; };
StealStats steal_stats();
void record_units(bool own, int64_t count);
}  // namespace ktx
