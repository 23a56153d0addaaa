// The tile registers of amx_tiles.inl emulated in software, with the same results bit for bit, so that AMX kernels can
// be tested on any machine. Source: Intel's description of TDPBSSD, TDPBUSD and TDPBF16PS in the Software Developer's
// Manual, volume 2.
struct Tile {
  int rows = 0, bytes = 0;
  uint8_t data[16][64];
};
inline Tile* tiles() {
  static thread_local Tile registers[8];
  return registers;
}
AI void tiles_begin(int even, int odd, int bytes) {
  for (int i = 0; i < 8; ++i) {
    Tile& t = tiles()[i];
    t.rows = i < 6 ? (i % 2 ? odd : even) : bytes / 4, t.bytes = i < 4 || i > 5 ? 64 : bytes;
    __builtin_memset(t.data, 0, sizeof t.data);
  }
}
AI void tiles_end() {
  for (int i = 0; i < 8; ++i) tiles()[i].rows = 0;
}
template <int T> AI void tile_zero() { __builtin_memset(tiles()[T].data, 0, sizeof(Tile::data)); }
template <int T> AI void tile_load(const void* p, int64_t stride) {
  Tile& t = tiles()[T];
  for (int r = 0; r < t.rows; ++r)
    __builtin_memcpy(t.data[r], static_cast<const uint8_t*>(p) + r * stride, size_t(t.bytes));
}
template <int T> AI void tile_store(void* p, int64_t stride) {
  const Tile& t = tiles()[T];
  for (int r = 0; r < t.rows; ++r) __builtin_memcpy(static_cast<uint8_t*>(p) + r * stride, t.data[r], size_t(t.bytes));
}

// Emulates TDPBSSD, TDPBUSD and their two variants: c += a * b in int32, four products per element and step. A and B
// are the types of the bytes of a and b (signed or unsigned).
template <class A, class B> static void dot_bytes(Tile& c, const Tile& a, const Tile& b) {
  for (int m = 0; m < c.rows; ++m)
    for (int n = 0; n < 16; ++n) {
      uint32_t sum;  // wraps around as the instruction does
      __builtin_memcpy(&sum, c.data[m] + 4 * n, 4);
      for (int k = 0; k < a.bytes; ++k)
        sum += uint32_t(int32_t(A(a.data[m][k])) * int32_t(B(b.data[k / 4][4 * n + k % 4])));
      __builtin_memcpy(c.data[m] + 4 * n, &sum, 4);
    }
}
template <int C, int A, int B>
AI void tile_dot_bytes() {
  dot_bytes<int8_t, int8_t>(tiles()[C], tiles()[A], tiles()[B]);
}
template <int C, int A, int B>
AI void tile_dot_unsigned() {
  dot_bytes<uint8_t, int8_t>(tiles()[C], tiles()[A], tiles()[B]);
}

// Returns zero for subnormals, as the instruction treats them.
inline float flush_subnormal(float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, 4);
  bits = bits & 0x7f800000u ? bits : bits & 0x80000000u;
  __builtin_memcpy(&x, &bits, 4);
  return x;
}
inline float load_bf16(const uint8_t* p) {
  uint32_t bits = uint32_t(p[0] | p[1] << 8) << 16;
  float x;
  __builtin_memcpy(&x, &bits, 4);
  return flush_subnormal(x);
}
// Emulates TDPBF16PS, c += a * b in f32, with its order of additions: even and odd products are summed separately, each
// step rounded once, and both sums are added to the element.
static void dot_bf16(Tile& c, const Tile& a, const Tile& b) {
  for (int m = 0; m < c.rows; ++m)
    for (int n = 0; n < 16; ++n) {
      float even = 0, odd = 0, sum;
      for (int k = 0; k < a.bytes / 4; ++k) {
        even = flush_subnormal(fmaf(load_bf16(a.data[m] + 4 * k), load_bf16(b.data[k] + 4 * n), even));
        odd = flush_subnormal(fmaf(load_bf16(a.data[m] + 4 * k + 2), load_bf16(b.data[k] + 4 * n + 2), odd));
      }
      __builtin_memcpy(&sum, c.data[m] + 4 * n, 4);
      sum = flush_subnormal(flush_subnormal(sum) + flush_subnormal(even + odd));
      __builtin_memcpy(c.data[m] + 4 * n, &sum, 4);
    }
}
template <int C, int A, int B> AI void tile_dot_bf16() { dot_bf16(tiles()[C], tiles()[A], tiles()[B]); }
