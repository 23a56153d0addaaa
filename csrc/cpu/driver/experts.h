// The routed experts of a mixture-of-experts layer in one call: out = sum over a token's experts of weight *
// down(act(gate(x)) * up(x)).
#pragma once
#include <cstdint>

#include "cpu/isa/kernels.h"
#include "cpu/quant/layout.h"
#include "cpu/quant/dtype.h"

namespace ktx {
struct ExpertMatrix {  // the matrices of all experts, one after another
  const Layout* layout;
  const uint8_t* packed;
  const float* bias;  // [experts][rows] or null
};
// Counters of a layer's experts. Calls add atomically; other threads may read at any time.
struct ExpertStats {
  int64_t* activations = nullptr;  // [experts] tokens routed to each; null: no counters
  int64_t* bytes = nullptr;        // packed weight bytes read: the distinct experts of each pass
  int64_t* nanoseconds = nullptr;  // wall time of the calls
  int64_t* of_nodes = nullptr;     // [NUMA nodes] compute nanoseconds, averaged over the node's workers
};
struct ExpertsCall {
  const void* x;  // [tokens][hidden] of `type`
  void* out;      // [tokens][hidden] of `type`
  DType type;
  const int64_t* ids;                           // [tokens][top]; an id outside 0..experts-1 is skipped
  const float* weights;                         // [tokens][top]
  int64_t tokens, top, hidden, inner, experts;  // inner: rows of gate and up, columns of down
  ExpertMatrix gate, up, down;
  Activation act;
  float alpha, limit;  // of SWIGLU_OAI
  ExpertStats stats = {};
};
void experts(const ExpertsCall& call);
}  // namespace ktx
