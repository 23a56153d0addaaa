// Which rows of a call are multiplied in bf16 over AMX tile registers.
//
// That is several times faster than int8 products with a scale per sub-block, and rounds differently. A token's path
// must not depend on the other tokens of the batch: full pages of a prompt take bf16, however the prompt is cut into
// chunks, and all other rows take int8.
#pragma once
#include <cstdint>
#include <vector>

#include "cpu/isa/kernels.h"

namespace ktx {
constexpr int64_t BF16_PAGE_TOKENS = 64;  // PAGE_TOKENS of ktx/cache/page_pool.py
// Thread-local: in calls with `tokens` rows, exactly the rows of `ranges` (first, count) take bf16.
struct Bf16Rows {
  // -1: not set. Full pages of the call's rows take bf16, which is right for one sequence that begins on a page border
  int64_t tokens = -1;
  std::vector<int64_t> ranges;
};
Bf16Rows& bf16_rows();

// Calls f(first, count, bf16) for consecutive ranges that cover all rows of a call, so that a driver runs each range in
// its own arithmetic. Without AMX tiles, one int8 range; with `all_bf16`, one bf16 range. Else bf16_rows() selects the
// bf16 rows: full pages if it is not set, none if it is set for calls with another number of rows.
template <class F> void for_bf16_ranges(int64_t tokens, bool all_bf16, F&& f) {
  const Bf16Rows& config = bf16_rows();
  if (!kernels().bf16_tiles) return f(int64_t(0), tokens, false);
  if (all_bf16) return f(int64_t(0), tokens, true);
  int64_t next_row = 0;
  const auto emit_until = [&](int64_t end, bool bf16) {
    if (next_row < end) f(next_row, end - next_row, bf16);
    next_row = end;
  };
  if (config.tokens < 0) emit_until(tokens / BF16_PAGE_TOKENS * BF16_PAGE_TOKENS, true);
  else if (config.tokens == tokens)
    for (size_t i = 0; i + 1 < config.ranges.size(); i += 2)
      emit_until(config.ranges[i], false), emit_until(config.ranges[i] + config.ranges[i + 1], true);
  emit_until(tokens, false);
}
}  // namespace ktx
