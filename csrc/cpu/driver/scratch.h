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

  // Invalidates everything that was taken. `bytes`: upper bound of what will be taken, plus 64 for each piece.
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

// Bytes of `rows` rows of k activations, quantized and as floats.
inline size_t tokens_bytes(int64_t rows, int64_t k, bool ints, bool floats) {
  return (ints ? size_t(rows) * k * 2 + 7 * 64 : 0) + (floats ? size_t(rows) * k * 6 + 128 : 0);
}
inline ActTiles take_tokens(Scratch& s, int64_t rows, int64_t k, bool ints, bool floats, bool bf16) {
  ActTiles t;
  t.k = k, t.bf16 = bf16;
  if (ints && !bf16) {
    t.q = s.take<int8_t>(rows * k);
    t.scale = s.take<float>(rows * (k / 32)), t.sum16 = s.take<int32_t>(rows * (k / 16)), t.sum32 = s.take<int32_t>(rows * (k / 32));
    t.part16 = s.take<float>(rows * (k / 16)), t.part32 = s.take<float>(rows * (k / 32));
  }
  if (floats) t.f = s.take<float>(rows * k);
  if ((floats && kernels().bf16_columns && k % kernels().bf16_columns == 0) || (ints && bf16)) t.pair = s.take<uint32_t>(rows * (k / 2));
  return t;
}
// The n tokens from row `first` on, cut into tiles for these kernels.
inline ActTiles slice(const ActTiles& all, int64_t first, int n, const Kernels& kernels) {
  ActTiles t = all;
  const int64_t k = all.k;
  t.n = n;
  t.tiles = t.bf16 ? (n + BF16_TILE_TOKENS - 1) / BF16_TILE_TOKENS : n <= kernels.gemv_tokens && !all.f ? 1 : (n + kernels.tile_tokens - 1) / kernels.tile_tokens;
  if (all.q) {
    t.q += first * k, t.scale += first * (k / 32);
    t.sum16 += first * (k / 16), t.sum32 += first * (k / 32), t.part16 += first * (k / 16), t.part32 += first * (k / 32);
  }
  if (all.f) t.f += first * k;
  if (all.pair) t.pair += first * (k / 2);
  return t;
}
inline size_t row_bytes(int64_t k) { return size_t(k) * 9 + 8 * 64; }  // a RowView and an f32 row
inline RowView take_row(Scratch& s, int64_t k) { return {s.take<int8_t>(k), s.take<float>(k / 32 + 1), s.take<int32_t>(k / 16 + 1)}; }
}  // namespace ktx
