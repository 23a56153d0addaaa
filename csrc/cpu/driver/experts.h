// One mixture-of-experts layer in one call.
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
// What is counted of a layer's experts: every call adds to it, others may read meanwhile.
struct ExpertStats {
  int64_t* activations = nullptr;  // [experts] choices of each; null: nothing is counted
  int64_t* bytes = nullptr;        // of packed weights that were read: of every pass over them, those of its distinct experts
  int64_t* nanoseconds = nullptr;  // from the calls' beginning to their end
  int64_t* of_nodes = nullptr;     // [nodes] nanoseconds that a memory node's members multiplied in, on average over these members
};
struct ExpertsCall {
  const void* x;           // [tokens][hidden] of `type`
  void* out;               // [tokens][hidden] of `type`
  DType type;
  const int64_t* ids;      // [tokens][top]; an id outside 0..experts-1 is skipped
  const float* weights;    // [tokens][top]
  int64_t tokens, top, hidden, inner, experts;
  ExpertMatrix gate, up, down;
  Activation act;
  float alpha, limit;
  ExpertStats stats = {};
};
void experts(const ExpertsCall& call);
}  // namespace ktx
