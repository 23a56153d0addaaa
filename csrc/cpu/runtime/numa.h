// NUMA nodes. Weights exist once: each node holds a share of the rows of every matrix, and the workers of a node read
// its share first.
#pragma once
#include <cstddef>
#include <cstdint>
#include <vector>

namespace ktx {
constexpr int MAX_NODES = 8;

// Number of nodes with CPUs that this process may use. KTX_NUMA=off: one. KTX_NUMA=fake:N: N fake nodes, to test the
// code for several nodes on a machine with one. Throws std::runtime_error for another value.
int nodes();
bool fake_nodes();
const std::vector<int>& node_cpus(int node);  // usable CPUs of a real node

// Returns the first row group of a node's share; `node` == nodes(): the end. Shares are multiples of eight groups (128
// rows), because FP8 scales and the blocks of experts.cpp need it.
inline int64_t node_begin(int64_t groups, int node) {
  const int num_nodes = nodes();
  return node >= num_nodes ? groups : groups * node / num_nodes & ~int64_t(7);
}

// Places memory that is not written yet on `node`, if it has space; pages that straddle the border may go to either
// node.
void bind_to_node(void* memory, size_t bytes, int node);
// Number of pages of `memory` on each node. Pages that were never written are on none.
std::vector<int64_t> pages_on(const void* memory, size_t bytes);

// Work items that workers took from the share of their own node, and those stolen from another node. With a single node
// nothing is counted.
struct StealCounts {
  int64_t own, stolen;
};
StealCounts steal_stats();
void record_items(bool own, int64_t count);
}  // namespace ktx
