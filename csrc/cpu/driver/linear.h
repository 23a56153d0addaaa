// y = x W^T + bias for one packed matrix.
#pragma once
#include <cstdint>

#include "cpu/quant/layout.h"
#include "cpu/quant/dtype.h"

namespace ktx {
// x [tokens][k] and y [tokens][n] of `type`, rows dense; bias f32 [n] or null. `all_bf16`: every row takes bf16, see
// bf16_rows.h.
void linear(const void* x, DType type, int64_t tokens, const Layout& layout, const uint8_t* packed, int64_t n,
    int64_t k, const float* bias, void* y, bool all_bf16 = false);
// One of several matrices that the same x is multiplied with.
struct LinearPart {
  const Layout* layout;
  const uint8_t* packed;
  int64_t n;
  const float* bias;  // [n] or null
  void* y;            // [tokens][stride], of x's type
  int64_t stride;     // elements from one token's row to the next
};
// linear() of several matrices on one x, which is quantized once.
void linear_parts(const void* x, DType type, int64_t tokens, int64_t k, const LinearPart* parts, int count,
    bool all_bf16 = false);
// linear() without bias for `matrices` packed matrices one after another, each with its own tokens: x
// [matrices][tokens][k], y [matrices][tokens][n].
void linear_batched(const void* x, DType type, int64_t matrices, int64_t tokens, const Layout& layout,
    const uint8_t* packed, int64_t n, int64_t k, void* y);
// f32 rows [count][k] -> blocks of INT8_128, INT4_64, INT4_128, Q4_0 or Q8_0, as pack_rows takes them; in the calling
// thread.
void quantize_rows(const Layout& layout, const float* x, int64_t count, int64_t k, uint8_t* out);
// Dequantizes rows of a packed matrix to f32: out[i][k] = row rows[i].
void unpack_rows(const Layout& layout, const uint8_t* packed, int64_t k, const int64_t* rows, int64_t count,
    float* out);
}  // namespace ktx
