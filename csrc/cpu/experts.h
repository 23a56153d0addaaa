// One mixture-of-experts layer in one call.
#pragma once
#include <cstdint>

#include "kernels.h"
#include "layout.h"
#include "numbers.h"

namespace ktx {
struct ExpertMatrix {  // the matrices of all experts, one after another
  const Layout* layout;
  const uint8_t* packed;
  const float* bias;  // [experts][rows] or null
};
struct ExpertsCall {
  const void* x;           // [tokens][hidden] of `type`
  void* out;               // [tokens][hidden] of `type`
  Number type;
  const int64_t* ids;      // [tokens][top]; an id outside 0..experts-1 is skipped
  const float* weights;    // [tokens][top]
  int64_t tokens, top, hidden, inner, experts;
  ExpertMatrix gate, up, down;
  Activation act;
  float alpha, limit;
};
void experts(const ExpertsCall& call);
}  // namespace ktx
