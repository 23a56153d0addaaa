// The SIMD primitives on sixteen 32-bit lanes in plain arrays: the specification of what simd_avx2.inl and
// simd_avx512.inl do with registers, and code for any x86-64 CPU.
// V: sixteen 32-bit lanes (or 32 words of 16 bits, or 64 bytes). F: sixteen floats. In the kernels a lane is a row of a
// group, and its bytes are four columns.
// A suffix gives the width of an operation: shr (32 bits), shr16, add8; f is for floats: addf, loadf.
// clang-format off
struct V { uint32_t v[16]; };
struct F { float v[16]; };
#define KTX_LANES for (int i = 0; i < 16; ++i)
// clang-format on
#define KTX_V2(name, expr)                   \
  AI V name(V x, V y) {                      \
    V r;                                     \
    KTX_LANES {                              \
      const uint32_t a = x.v[i], b = y.v[i]; \
      r.v[i] = expr;                         \
    }                                        \
    return r;                                \
  }
#define KTX_F2(name, expr)                \
  AI F name(F x, F y) {                   \
    F r;                                  \
    KTX_LANES {                           \
      const float a = x.v[i], b = y.v[i]; \
      r.v[i] = expr;                      \
    }                                     \
    return r;                             \
  }

// clang-format off
AI V load(const void* p) { V r; __builtin_memcpy(r.v, p, 64); return r; }
AI void store(void* p, V x) { __builtin_memcpy(p, x.v, 64); }
AI V set(uint32_t x) { V r; KTX_LANES r.v[i] = x; return r; }
AI V set8(int x) { return set(uint32_t(x & 0xff) * 0x01010101u); }
AI V broadcast(const void* p) { uint32_t x; __builtin_memcpy(&x, p, 4); return set(x); }
KTX_V2(and_, a & b)
KTX_V2(or_, a | b)
KTX_V2(xor_, a ^ b)
KTX_V2(add, a + b)
KTX_V2(sub, a - b)
KTX_V2(mul, a * b)
KTX_V2(mul16, ((a & 0xffff) * (b & 0xffff) & 0xffff) | ((a >> 16) * (b >> 16)) << 16)
// clang-format on
// Applies an operation to each byte of a lane: `op` 0 subtracts, 1 adds, 2 compares (equal bytes become 0xff).
AI uint32_t bytewise(uint32_t a, uint32_t b, int op) {
  uint32_t r = 0;
  for (int s = 0; s < 32; s += 8) {
    const uint32_t x = (a >> s) & 0xff, y = (b >> s) & 0xff;
    r |= ((op == 0 ? x - y : op == 1 ? x + y : (x == y ? 0xffu : 0u)) & 0xff) << s;
  }
  return r;
}
// clang-format off
KTX_V2(sub8, bytewise(a, b, 0))
KTX_V2(add8, bytewise(a, b, 1))
KTX_V2(equal8, bytewise(a, b, 2))
AI V shr(V x, int n) { V r; KTX_LANES r.v[i] = x.v[i] >> n; return r; }
AI V shl(V x, int n) { V r; KTX_LANES r.v[i] = x.v[i] << n; return r; }
AI V shr16(V x, int n) { V r; KTX_LANES r.v[i] = ((x.v[i] & 0xffff) >> n) | ((x.v[i] >> 16) >> n) << 16; return r; }
AI V with_bits(V a, V b, V mask) { return or_(a, and_(b, mask)); }  // a | b & mask
// clang-format on
// table[x] of each byte; indices are 0 to 15.
AI V look_up16(const int8_t* table, V x) {
  V r;
  KTX_LANES {
    r.v[i] = 0;
    for (int s = 0; s < 32; s += 8) r.v[i] |= uint32_t(uint8_t(table[(x.v[i] >> s) & 15])) << s;
  }
  return r;
}
// Both 16-bit halves of a lane become its lower one.
// clang-format off
AI V low_words(V x) { V r; KTX_LANES r.v[i] = (x.v[i] & 0xffff) * 0x10001u; return r; }
AI V high_words(V x) { V r; KTX_LANES r.v[i] = (x.v[i] >> 16) * 0x10001u; return r; }
// clang-format on
// Shifts the lower and the upper half of each lane by different counts.
template <int LOW, int HIGH> AI V shr16_each(V x) {
  V r;
  KTX_LANES r.v[i] = (x.v[i] & 0xffff) >> LOW | (x.v[i] >> 16 >> HIGH) << 16;
  return r;
}
template <int N> AI V lookup(const uint16_t* table, V index) {  // table[index] of 16-bit indices
  V r;
  KTX_LANES r.v[i] = table[index.v[i] & 0xffff] | uint32_t(table[index.v[i] >> 16]) << 16;
  return r;
}
// Negates the bytes of w for which bit 4*lane + byte of the mask is set.
AI V negate_where(V w, uint64_t mask) {
  V m;
  KTX_LANES m.v[i] = (((uint32_t(mask >> (4 * i)) & 15) * 0x00204081u) & 0x01010101u) * 255u;
  return sub8(xor_(w, m), m);
}
// table[x & LOW] of each byte; the table repeats after LOW + 1 entries, so that VBMI, which ignores the bits above,
// need not mask.
// clang-format off
template <int LOW> AI V look_up_repeated(const int8_t* table, V x) { return look_up16(table, and_(x, set8(LOW))); }
// Nibble i in lane i.
AI V nibble_lanes(uint64_t nibbles) { V r; KTX_LANES r.v[i] = uint32_t(nibbles >> (4 * i)) & 15; return r; }
AI V load_u8(const uint8_t* p) { V r; KTX_LANES r.v[i] = p[i]; return r; }
AI V load_s8(const uint8_t* p) { V r; KTX_LANES r.v[i] = uint32_t(int32_t(int8_t(p[i]))); return r; }
AI V load_u16(const uint8_t* p) { V r; KTX_LANES r.v[i] = uint32_t(p[2 * i]) | uint32_t(p[2 * i + 1]) << 8; return r; }
AI V sign_extend8(V x) { V r; KTX_LANES r.v[i] = uint32_t(int32_t(int8_t(x.v[i]))); return r; }

AI F setf(float x) { F r; KTX_LANES r.v[i] = x; return r; }
AI F zero() { return setf(0); }
AI F loadf(const float* p) { F r; __builtin_memcpy(r.v, p, 64); return r; }
AI void storef(float* p, F x) { __builtin_memcpy(p, x.v, 64); }
AI F broadcastf(const float* p) { return setf(*p); }
KTX_F2(addf, a + b)
KTX_F2(mulf, a * b)
KTX_F2(divf, a / b)
KTX_F2(minf, a < b ? a : b)
KTX_F2(maxf, a > b ? a : b)
AI F fma(F x, F y, F z) { F r; KTX_LANES r.v[i] = x.v[i] * y.v[i] + z.v[i]; return r; }
AI F fnma(F x, F y, F z) { F r; KTX_LANES r.v[i] = z.v[i] - x.v[i] * y.v[i]; return r; }
AI V as_int(F x) { V r; __builtin_memcpy(r.v, x.v, 64); return r; }
AI F as_float(V x) { F r; __builtin_memcpy(r.v, x.v, 64); return r; }
AI F absf(F x) { return as_float(and_(as_int(x), set(0x7fffffff))); }
AI V maxu(V a, V b) { V r; KTX_LANES r.v[i] = a.v[i] > b.v[i] ? a.v[i] : b.v[i]; return r; }
AI uint32_t largest_lane(V x) { uint32_t m = x.v[0]; KTX_LANES m = x.v[i] > m ? x.v[i] : m; return m; }
AI int32_t sum_lanes(V x) { uint32_t s = 0; KTX_LANES s += x.v[i]; return int32_t(s); }
AI float sum_lanes(F x) { float s = 0; KTX_LANES s += x.v[i]; return s; }
AI F to_float(V x) { F r; KTX_LANES r.v[i] = float(int32_t(x.v[i])); return r; }
// clang-format on
// Rounds to the nearest integer, ties to even, for |x| < 2^22: adding 1.5 * 2^23 rounds, and leaves the integer in the
// low bits of the sum.
AI V to_int(F x) {
  V r;
  KTX_LANES {
    const float y = x.v[i] + 12582912.0f;
    uint32_t bits;
    __builtin_memcpy(&bits, &y, 4);
    r.v[i] = bits - 0x4b400000u;
  }
  return r;
}
// Converts the bits of an f16 without F16C: exponent and mantissa move to their places in an f32, and the exponent's
// bias is corrected.
AI float f16_value(uint32_t h) {
  const uint32_t sign = (h & 0x8000u) << 16, rest = (h & 0x7fffu) << 13;
  uint32_t bits = rest + ((127 - 15) << 23);
  float f;
  if ((h & 0x7c00u) == 0x7c00u) bits += (128 - 16) << 23;  // infinities and NaN
  if ((h & 0x7c00u) == 0) {                                // subnormal: the FPU normalizes it
    bits += 1 << 23;
    __builtin_memcpy(&f, &bits, 4);
    f -= 6.103515625e-05f;  // 2^-14, the leading one that a subnormal lacks
    __builtin_memcpy(&bits, &f, 4);
  }
  bits |= sign;
  __builtin_memcpy(&f, &bits, 4);
  return f;
}
// clang-format off
AI F f16_lanes(V x) { F r; KTX_LANES r.v[i] = f16_value(x.v[i] & 0xffff); return r; }
AI F load_f16(const void* p) { return f16_lanes(load_u16(static_cast<const uint8_t*>(p))); }
// clang-format on
// Loads two columns of 16 e4m3 codes as floats that are 2^-8 of their value: an e4m3 is the upper byte of an f16 with
// one exponent bit less, so a shift makes it an f16 whose exponent is too small by 8.
AI void load_e4m3(const uint8_t* p, F& a, F& b) {
  KTX_LANES {
    a.v[i] = f16_value((p[i] & 0x80u) << 8 | (p[i] & 0x7fu) << 7);
    b.v[i] = f16_value((p[16 + i] & 0x80u) << 8 | (p[16 + i] & 0x7fu) << 7);
  }
}
// Rounds to the nearest f16, ties to even, as vcvtps2ph does. Magnitudes are compared as bits.
AI uint32_t f16_bits(float f) {
  uint32_t x;
  __builtin_memcpy(&x, &f, 4);
  const uint32_t sign = (x >> 16) & 0x8000u, magnitude = x & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return sign | 0x7e00u;   // NaN
  if (magnitude >= 0x477ff000u) return sign | 0x7c00u;  // rounds to infinity
  if (magnitude < 0x38800000u) {                        // subnormal result
    float m;
    __builtin_memcpy(&m, &magnitude, 4);
    m += 0.5f;  // one unit in the last place of 0.5 is the f16 subnormal step
    uint32_t bits;
    __builtin_memcpy(&bits, &m, 4);
    return sign | (bits - 0x3f000000u);
  }
  // subtracts 112 from the exponent, whose bias is 15 in place of 127, and rounds off 13 bits of mantissa
  return sign | ((magnitude + 0xc8000fffu + ((magnitude >> 13) & 1)) >> 13);
}
AI void store_f16(void* p, F x) {
  uint8_t* q = static_cast<uint8_t*>(p);
  KTX_LANES {
    const uint32_t h = f16_bits(x.v[i]);
    q[2 * i] = uint8_t(h), q[2 * i + 1] = uint8_t(h >> 8);
  }
}
AI void store_bf16(void* p, F x) {
  uint16_t h[16];
  KTX_LANES h[i] = to_bf16(x.v[i]);
  __builtin_memcpy(p, h, 32);
}
AI void store_s8(int8_t* p, V x) { KTX_LANES p[i] = int8_t(x.v[i]); }

// The dot product of four bytes per lane, added to acc. Bytes of x are signed; those of w are signed if SIGNED, after
// with_offset where an instruction set takes unsigned bytes only (SIGNED_OFFSET = 128), else they are 0 to 127.
template <bool SIGNED> AI V dot(V acc, V w, V x) {
  V r;
  KTX_LANES {
    int32_t sum = 0;
    for (int s = 0; s < 32; s += 8) {
      const int32_t a = SIGNED ? int32_t(int8_t(w.v[i] >> s)) : int32_t((w.v[i] >> s) & 0xff);
      sum += a * int32_t(int8_t(x.v[i] >> s));
    }
    r.v[i] = acc.v[i] + uint32_t(sum);
  }
  return r;
}
constexpr int SIGNED_OFFSET = 0;
AI V with_offset(V weights) { return weights; }
#ifdef KTX_BF16
// A pair is two bf16 in a lane: two columns of a row. Rounded as vcvtne2ps2bf16 does: to nearest even, subnormal
// numbers become zero.
AI uint32_t bf16_bits(float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, 4);
  if (!(bits & 0x7f800000u)) return bits >> 31 << 15;
  if ((bits & 0x7fffffffu) > 0x7f800000u) return bits >> 16 | 0x40u;  // NaN
  return (bits + 0x7fffu + (bits >> 16 & 1)) >> 16;
}
typedef V Pairs;
AI Pairs load_pairs(const void* p) { return load(p); }
AI void store_pairs(void* p, Pairs v) { store(p, v); }
AI float bf16_value(uint32_t bits) {
  float x;
  bits <<= 16;
  __builtin_memcpy(&x, &bits, 4);
  return x;
}
// acc + the products of both halves of the pair at `word` (the same for all lanes) and of b.
AI F dot_pairs(F acc, const void* word, Pairs b) {
  uint32_t a;
  __builtin_memcpy(&a, word, 4);
  F r;
  KTX_LANES r.v[i] = acc.v[i] + bf16_value(a & 0xffff) * bf16_value(b.v[i] & 0xffff) +
      bf16_value(a >> 16) * bf16_value(b.v[i] >> 16);
  return r;
}
// Loads two columns of 16 bf16, one after the other, as pairs.
AI Pairs load_column_pairs(const void* p) {
  uint16_t columns[32];
  __builtin_memcpy(columns, p, 64);
  V r;
  KTX_LANES r.v[i] = columns[i] | uint32_t(columns[i + 16]) << 16;
  return r;
}
// Pairs with `even` in the lower and `odd` in the upper halves.
// clang-format off
AI V pair_as_bf16(F even, F odd) { V r; KTX_LANES r.v[i] = bf16_bits(even.v[i]) | bf16_bits(odd.v[i]) << 16; return r; }
// clang-format on
// Pairs neighbors: lane i holds columns 2*i and 2*i + 1 of the 32 in first and second.
AI V pair_neighbors_as_bf16(F first, F second) {
  V r;
  for (int i = 0; i < 8; ++i) {
    r.v[i] = bf16_bits(first.v[2 * i]) | bf16_bits(first.v[2 * i + 1]) << 16;
    r.v[i + 8] = bf16_bits(second.v[2 * i]) | bf16_bits(second.v[2 * i + 1]) << 16;
  }
  return r;
}
#endif
#undef KTX_V2
#undef KTX_F2
#undef KTX_LANES
