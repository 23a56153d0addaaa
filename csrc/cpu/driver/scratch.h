// Scratch memory that only grows, so that the steady state allocates nothing, and the activations that live in it.
#pragma once
#include <cstdint>
#include <cstdlib>
#include <new>

#include "cpu/isa/kernels.h"

namespace ktx {
class Scratch {
 public:
  Scratch() = default;
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch() { std::free(base_); }

  // Frees everything that was taken and reserves `bytes`: an upper bound of all pieces, plus 64 for the alignment of
  // each. Grows by a quarter more than requested, so that slowly growing calls do not allocate each time.
  void reset(size_t bytes) {
    used_ = 0;
    if (bytes <= size_) return;
    std::free(base_);
    base_ = nullptr, size_ = 0;
    const size_t rounded = (bytes + bytes / 4 + 4095) & ~size_t(4095);
    base_ = static_cast<uint8_t*>(std::aligned_alloc(4096, rounded));
    if (!base_) throw std::bad_alloc();
    size_ = rounded;
  }
  // Returns space for `count` elements, aligned to 64 bytes and uninitialized; valid until the next reset.
  template <class T> T* take(int64_t count) {
    T* piece = reinterpret_cast<T*>(base_ + used_);
    used_ += (size_t(count) * sizeof(T) + 63) & ~size_t(63);
    if (used_ > size_) throw std::bad_alloc();  // a driver took more than it reserved
    return piece;
  }

 private:
  uint8_t* base_ = nullptr;
  size_t size_ = 0, used_ = 0;
};

// Bytes that take_activations takes for `rows` rows of k activations. Per value 2 bytes quantized (int8 plus the scales
// and sums of its sub-blocks) and 6 as floats (f32 plus bf16); the rest aligns the arrays.
inline size_t activation_bytes(int64_t rows, int64_t k, bool ints, bool floats) {
  return (ints ? size_t(rows) * k * 2 + 7 * 64 : 0) + (floats ? size_t(rows) * k * 6 + 128 : 0);
}
// Takes the arrays that the weights of a call need: `ints` for quantized weights, `floats` for float weights, and with
// `bf16` pairs of bf16 in place of the quantized values.
inline ActTiles take_activations(Scratch& s, int64_t rows, int64_t k, bool ints, bool floats, bool bf16) {
  ActTiles t;
  t.k = k, t.bf16 = bf16;
  if (ints && !bf16) {
    t.q = s.take<int8_t>(rows * k);
    t.scale = s.take<float>(rows * (k / 32)), t.sum16 = s.take<int32_t>(rows * (k / 16)),
    t.sum32 = s.take<int32_t>(rows * (k / 32));
    t.scaled_sum16 = s.take<float>(rows * (k / 16)), t.scaled_sum32 = s.take<float>(rows * (k / 32));
  }
  if (floats) t.f = s.take<float>(rows * k);
  if ((floats && kernels().bf16_columns && k % kernels().bf16_columns == 0) || (ints && bf16))
    t.pair = s.take<uint32_t>(rows * (k / 2));
  return t;
}
// Returns a view of the n tokens from row `first` on (those of one expert, or of one set of rows), cut into tiles for
// these kernels. Up to gemv_tokens quantized tokens are one tile, which takes the GEMV path.
inline ActTiles slice(const ActTiles& all, int64_t first, int n, const Kernels& kernels) {
  ActTiles t = all;
  const int64_t k = all.k;
  t.n = n;
  t.tiles = t.bf16                         ? (n + BF16_TILE_TOKENS - 1) / BF16_TILE_TOKENS
      : n <= kernels.gemv_tokens && !all.f ? 1
                                           : (n + kernels.tile_tokens - 1) / kernels.tile_tokens;
  if (all.q) {
    t.q += first * k, t.scale += first * (k / 32);
    t.sum16 += first * (k / 16), t.sum32 += first * (k / 32), t.scaled_sum16 += first * (k / 16),
        t.scaled_sum32 += first * (k / 32);
  }
  if (all.f) t.f += first * k;
  if (all.pair) t.pair += first * (k / 2);
  return t;
}
inline size_t row_bytes(int64_t k) { return size_t(k) * 9 + 8 * 64; }  // a RowView and an f32 row
// Takes one quantized row, the step between the floats and their tile.
inline RowView take_row(Scratch& s, int64_t k) {
  return {s.take<int8_t>(k), s.take<float>(k / 32 + 1), s.take<int32_t>(k / 16 + 1)};
}
}  // namespace ktx
