// Which rows of a call are multiplied in bf16 over tile registers ("bf16"), where kernels have these.
//
// That is several times faster than int8 products with a scale for each sub-block, and rounds differently, so which way a token goes must not depend on
// what stands beside it: whole pages of a prompt go bf16, whatever they are cut into, and everything else does not.
#pragma once
#include <cstdint>
#include <vector>

#include "cpu/isa/kernels.h"

namespace ktx {
constexpr int64_t BF16_PAGE_TOKENS = 64;  // tokens of a page, as ktx/cache/page_pool.py has them
// What the calling thread is told of the rows of its next calls: of those with `tokens` rows, the ranges (first, count) are bf16 and no others are.
struct Bf16Rows {
  int64_t tokens = -1;  // -1: nothing is known. The pages that a call's rows fill are bf16: right for one sequence from a page's beginning on
  std::vector<int64_t> ranges;
};
Bf16Rows& bf16_rows();

// f(first, count, bf16) for stretches of all rows of a call.
template <class F> void for_bf16_ranges(int64_t tokens, bool all_bf16, F&& f) {
  const Bf16Rows& known = bf16_rows();
  if (!kernels().bf16_tiles) return f(int64_t(0), tokens, false);
  if (all_bf16) return f(int64_t(0), tokens, true);
  int64_t at = 0;
  const auto stretch = [&](int64_t end, bool bf16) {
    if (at < end) f(at, end - at, bf16);
    at = end;
  };
  if (known.tokens < 0) stretch(tokens / BF16_PAGE_TOKENS * BF16_PAGE_TOKENS, true);
  else if (known.tokens == tokens)
    for (size_t i = 0; i + 1 < known.ranges.size(); i += 2) stretch(known.ranges[i], false), stretch(known.ranges[i] + known.ranges[i + 1], true);
  stretch(tokens, false);
}
}  // namespace ktx
