// The eight tile registers of AMX (16 rows of 64 bytes each): 0 to 3 hold sums [token][16 rows], 4 and 5 activations
// [token][columns], 6 and 7 weights [column/4][16 rows][4]. Inline assembly, because the intrinsics take literals only,
// which template arguments are not. T: the number of a register; C += A * B in the products.
struct TileConfig {  // the operand of ldtilecfg
  uint8_t palette = 1, start = 0, zeros[14] = {};
  uint16_t bytes[16] = {};
  uint8_t rows[16] = {};
};
// Configures the tiles for products of activations of `bytes` bytes per token: registers with even numbers (4, and its
// sums 0 and 2) for tiles of `even` tokens, those with odd numbers for `odd` tokens. Also zeroes the tiles. Callers
// repeat it only when these change.
AI void tiles_begin(int even, int odd, int bytes) {
  TileConfig c;
  for (int i = 0; i < 4; ++i) c.rows[i] = uint8_t(i % 2 ? odd : even), c.bytes[i] = 64;
  for (int i = 4; i < 6; ++i) c.rows[i] = uint8_t(i % 2 ? odd : even), c.bytes[i] = uint16_t(bytes);
  for (int i = 6; i < 8; ++i) c.rows[i] = uint8_t(bytes / 4), c.bytes[i] = 64;
  __asm__ volatile("ldtilecfg %0" : : "m"(c));
}
AI void tiles_end() { __asm__ volatile("tilerelease" : : : "memory"); }
template <int T> AI void tile_zero() { __asm__ volatile("tilezero %%tmm%c0" : : "i"(T)); }
template <int T> AI void tile_load(const void* p, int64_t stride) {
  __asm__ volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(p), "r"(stride), "i"(T) : "memory");
}
template <int T> AI void tile_store(void* p, int64_t stride) {
  __asm__ volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(p), "r"(stride), "i"(T) : "memory");
}
template <int C, int A, int B> AI void tile_dot_bytes() {  // signed times signed
  __asm__ volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(C), "i"(A), "i"(B));
}
template <int C, int A, int B> AI void tile_dot_unsigned() {  // unsigned times signed
  __asm__ volatile("tdpbusd %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(C), "i"(A), "i"(B));
}
template <int C, int A, int B> AI void tile_dot_bf16() {
  __asm__ volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(C), "i"(A), "i"(B));
}
