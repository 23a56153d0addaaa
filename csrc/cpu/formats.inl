// One decoder a weight type, over the verbs of the instruction set that includes this file.
//
// A decoder turns a block of 16 rows into sub-blocks of SUB consecutive k: SUB/4 vectors `w` (lane = row, byte = k), a scale and,
// with MINIMUM, a minimum. The value of a weight is  scale * (code - OFFSET) - minimum;  SIGNED codes are int8, others 0..127.
// Field order inside `words` is that of the layout table.

struct Block {
  const uint8_t *n0, *n1;  // narrow fields of this block, 16 rows each
  const uint8_t* words;
  V word(int i) const { return load(words + 64 * i); }
};

AI V low4(V x) { return and_(x, set8(15)); }
AI V nibbles(V x, int high) { return low4(high ? shr(x, 4) : x); }
AI V byte(V x, int i) { return and_(shr(x, 8 * i), set(0xff)); }
AI V spread4(V bits) { return and_(mul(and_(bits, set(15)), set(0x00204081)), set8(1)); }  // bit i -> byte i
AI V with_signs(V w, V bits) {  // negates byte i where bit i is set
  const V mask = sub8(set(0), spread4(bits));
  return sub8(xor_(w, mask), mask);
}

struct None {};
#define KTX_FORMAT(name, block, sub_size, is_signed, offset, has_minimum)                                                \
  static constexpr int CODE = ktx::name, BLOCK = block, SUB = sub_size, OFFSET = offset;                                 \
  static constexpr bool SIGNED = is_signed, MINIMUM = has_minimum;

struct DQ4_0 {
  KTX_FORMAT(Q4_0, 32, 32, false, 8, false)
  typedef None Head;
  AI static Head head(const Block&) { return {}; }
  AI static void part(const Head&, const Block& b, int, V* w, F& scale, F&) {
    scale = load_f16(b.n0);
    for (int i = 0; i < 4; ++i) w[i] = nibbles(b.word(i), 0), w[4 + i] = nibbles(b.word(i), 1);
  }
};

struct DQ4_1 {
  KTX_FORMAT(Q4_1, 32, 32, false, 0, true)
  typedef None Head;
  AI static Head head(const Block&) { return {}; }
  AI static void part(const Head&, const Block& b, int, V* w, F& scale, F& minimum) {
    scale = load_f16(b.n0), minimum = mulf(load_f16(b.n1), setf(-1));
    for (int i = 0; i < 4; ++i) w[i] = nibbles(b.word(i), 0), w[4 + i] = nibbles(b.word(i), 1);
  }
};

AI void five_bits(const Block& b, V* w) {
  const V fifth = b.word(4);
  for (int i = 0; i < 8; ++i) {
    const V high = and_(i < 4 ? shl(fifth, 4 - i) : shr(fifth, i - 4), set8(16));
    w[i] = or_(nibbles(b.word(i & 3), i >> 2), high);
  }
}
struct DQ5_0 {
  KTX_FORMAT(Q5_0, 32, 32, false, 16, false)
  typedef None Head;
  AI static Head head(const Block&) { return {}; }
  AI static void part(const Head&, const Block& b, int, V* w, F& scale, F&) { scale = load_f16(b.n0), five_bits(b, w); }
};
struct DQ5_1 {
  KTX_FORMAT(Q5_1, 32, 32, false, 0, true)
  typedef None Head;
  AI static Head head(const Block&) { return {}; }
  AI static void part(const Head&, const Block& b, int, V* w, F& scale, F& minimum) {
    scale = load_f16(b.n0), minimum = mulf(load_f16(b.n1), setf(-1)), five_bits(b, w);
  }
};

struct DQ8_0 {
  KTX_FORMAT(Q8_0, 32, 32, true, 0, false)
  typedef None Head;
  AI static Head head(const Block&) { return {}; }
  AI static void part(const Head&, const Block& b, int, V* w, F& scale, F&) {
    scale = load_f16(b.n0);
    for (int i = 0; i < 8; ++i) w[i] = b.word(i);
  }
};

struct DQ2_K {  // words: 16 of codes, 4 of scales (low nibble) and minimums (high nibble)
  KTX_FORMAT(Q2_K, 256, 16, false, 0, true)
  struct Head { F d, dmin; };
  AI static Head head(const Block& b) { return {load_f16(b.n0), load_f16(b.n1)}; }
  AI static void part(const Head& h, const Block& b, int s, V* w, F& scale, F& minimum) {
    const V packed = byte(b.word(16 + s / 4), s % 4);
    scale = mulf(h.d, to_float(and_(packed, set(15)))), minimum = mulf(h.dmin, to_float(shr(packed, 4)));
    const int half = s / 8, shift = (s % 8) / 2 * 2, part = s % 2;
    for (int i = 0; i < 4; ++i) w[i] = and_(shr(b.word(half * 8 + part * 4 + i), shift), set8(3));
  }
};

struct DQ3_K {  // words: 16 of low codes, 8 of high bits, 3 of scales
  KTX_FORMAT(Q3_K, 256, 16, false, 4, false)
  typedef F Head;
  AI static Head head(const Block& b) { return load_f16(b.n0); }
  AI static void part(const Head& d, const Block& b, int s, V* w, F& scale, F&) {
    const V low = and_(shr(byte(b.word(24 + (s % 8) / 4), s % 4), s < 8 ? 0 : 4), set(15));
    const V high = and_(shr(byte(b.word(26), s % 4), s / 4 * 2), set(3));
    scale = mulf(d, to_float(add(or_(low, shl(high, 4)), set(uint32_t(-32)))));
    const int half = s / 8, j = (s % 8) / 2, part = s % 2;
    for (int i = 0; i < 4; ++i) {
      const V code = and_(shr(b.word(half * 8 + part * 4 + i), 2 * j), set8(3));
      const V bit = and_(shr(b.word(16 + part * 4 + i), half * 4 + j), set8(1));
      w[i] = or_(code, shl(bit, 2));
    }
  }
};

// Six-bit scales and minimums of Q4_K and Q5_K, in three words.
struct KScales {
  V w0, w1, w2;
  AI V scale(int s) const {
    if (s < 4) return and_(byte(w0, s), set(63));
    return or_(and_(byte(w2, s - 4), set(15)), shl(shr(byte(w0, s - 4), 6), 4));
  }
  AI V minimum(int s) const {
    if (s < 4) return and_(byte(w1, s), set(63));
    return or_(shr(byte(w2, s - 4), 4), shl(shr(byte(w1, s - 4), 6), 4));
  }
};

struct DQ4_K {  // words: 32 of codes, 3 of scales
  KTX_FORMAT(Q4_K, 256, 32, false, 0, true)
  struct Head { F d, dmin; KScales scales; };
  AI static Head head(const Block& b) { return {load_f16(b.n0), load_f16(b.n1), {b.word(32), b.word(33), b.word(34)}}; }
  AI static void part(const Head& h, const Block& b, int s, V* w, F& scale, F& minimum) {
    scale = mulf(h.d, to_float(h.scales.scale(s))), minimum = mulf(h.dmin, to_float(h.scales.minimum(s)));
    for (int i = 0; i < 8; ++i) w[i] = nibbles(b.word(s / 2 * 8 + i), s % 2);
  }
};

struct DQ5_K {  // words: 32 of low codes, 8 of fifth bits, 3 of scales
  KTX_FORMAT(Q5_K, 256, 32, false, 0, true)
  struct Head { F d, dmin; KScales scales; };
  AI static Head head(const Block& b) { return {load_f16(b.n0), load_f16(b.n1), {b.word(40), b.word(41), b.word(42)}}; }
  AI static void part(const Head& h, const Block& b, int s, V* w, F& scale, F& minimum) {
    scale = mulf(h.d, to_float(h.scales.scale(s))), minimum = mulf(h.dmin, to_float(h.scales.minimum(s)));
    for (int i = 0; i < 8; ++i) {
      const V fifth = and_(shr(b.word(32 + i), s), set8(1));
      w[i] = or_(nibbles(b.word(s / 2 * 8 + i), s % 2), shl(fifth, 4));
    }
  }
};

struct DQ6_K {  // words: 32 of low nibbles, 16 of high pairs, 4 of signed scales
  KTX_FORMAT(Q6_K, 256, 16, false, 32, false)
  typedef F Head;
  AI static Head head(const Block& b) { return load_f16(b.n0); }
  AI static void part(const Head& d, const Block& b, int s, V* w, F& scale, F&) {
    scale = mulf(d, to_float(sign_extend8(shr(b.word(48 + s / 4), s % 4 * 8))));
    const int half = s / 8, g = (s % 8) / 2, part = s % 2;
    for (int i = 0; i < 4; ++i) {
      const V low = nibbles(b.word(half * 16 + (g & 1) * 8 + part * 4 + i), g >> 1);
      const V high = and_(shr(b.word(32 + half * 8 + part * 4 + i), 2 * g), set8(3));
      w[i] = or_(low, shl(high, 4));
    }
  }
};

static const int8_t VALUES_IQ4_NL[16] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};
static const int8_t VALUES_MXFP4[16] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};  // twice the e2m1 values

struct DIQ4_NL {
  KTX_FORMAT(IQ4_NL, 32, 32, true, 0, false)
  typedef None Head;
  AI static Head head(const Block&) { return {}; }
  AI static void part(const Head&, const Block& b, int, V* w, F& scale, F&) {
    scale = load_f16(b.n0);
    for (int i = 0; i < 8; ++i) w[i] = table16(VALUES_IQ4_NL, nibbles(b.word(i & 3), i >> 2));
  }
};

struct DIQ4_XS {  // narrow: d, high scale bits; words: 32 of codes, 1 of low scale nibbles
  KTX_FORMAT(IQ4_XS, 256, 32, true, 0, false)
  struct Head { F d; V low, high; };
  AI static Head head(const Block& b) { return {load_f16(b.n0), b.word(32), load_u16(b.n1)}; }
  AI static void part(const Head& h, const Block& b, int s, V* w, F& scale, F&) {
    const V bits = or_(and_(shr(h.low, 4 * s), set(15)), shl(and_(shr(h.high, 2 * s), set(3)), 4));
    scale = mulf(h.d, to_float(add(bits, set(uint32_t(-32)))));
    for (int i = 0; i < 8; ++i) w[i] = table16(VALUES_IQ4_NL, nibbles(b.word(s * 4 + (i & 3)), i >> 2));
  }
};

struct DMXFP4 {
  KTX_FORMAT(MXFP4, 32, 32, true, 0, false)
  typedef None Head;
  AI static Head head(const Block&) { return {}; }
  AI static void part(const Head&, const Block& b, int, V* w, F& scale, F&) {
    // half of 2^(e-127): exponent field e-1, and the subnormals 2^-128 and 2^-127 for e = 0 and 1
    const V e = load_u8(b.n0), zero_e = lane_is(e, 0);
    const V bits = shl(sub(e, xor_(zero_e, set(1))), 23);
    scale = as_float(or_(bits, or_(shl(zero_e, 21), shl(lane_is(e, 1), 22))));
    for (int i = 0; i < 8; ++i) w[i] = table16(VALUES_MXFP4, nibbles(b.word(i & 3), i >> 2));
  }
  AI static V lane_is(V e, int value) { return and_(equal8(e, set(uint32_t(value))), set(1)); }  // for lanes below 256
};

struct DTQ2_0 {
  KTX_FORMAT(TQ2_0, 256, 32, false, 1, false)
  typedef F Head;
  AI static Head head(const Block& b) { return load_f16(b.n0); }
  AI static void part(const Head& d, const Block& b, int s, V* w, F& scale, F&) {
    scale = d;
    for (int i = 0; i < 8; ++i) w[i] = and_(shr(b.word(s / 4 * 8 + i), s % 4 * 2), set8(3));
  }
};

struct DTQ1_0 {  // words: 12 of five trits a byte, 1 of four trits a byte
  KTX_FORMAT(TQ1_0, 256, 16, false, 1, false)
  typedef F Head;
  AI static Head head(const Block& b) { return load_f16(b.n0); }
  // A byte is a fraction in base 3: times 3^n (mod 256) brings trit n to the front, times 3 over 256 reads it.
  AI static V trit(V x, int power) {
    const V low = set(0x00ff00ff), p = set(uint32_t(power) * 0x00010001u), three = set(0x00030003);
    const V even = shr16(mul16(and_(mul16(and_(x, low), p), low), three), 8);
    const V odd = shr16(mul16(and_(mul16(shr16(x, 8), p), low), three), 8);
    return or_(even, shl(odd, 8));
  }
  AI static void part(const Head& d, const Block& b, int s, V* w, F& scale, F&) {
    static const int POWERS[5] = {1, 3, 9, 27, 81};
    scale = d;
    if (s < 10)
      for (int i = 0; i < 4; ++i) w[i] = trit(b.word(s % 2 * 4 + i), POWERS[s / 2]);
    else if (s < 15)
      for (int i = 0; i < 4; ++i) w[i] = trit(b.word(8 + i), POWERS[s - 10]);
    else
      for (int i = 0; i < 4; ++i) w[i] = trit(b.word(12), POWERS[i]);
  }
};

AI F half_steps(F d, V nibble, float step) { return mulf(mulf(d, addf(setf(0.5f), to_float(nibble))), setf(step)); }

struct DIQ2_XXS {  // words: per 32 k, four grid indices, then four times seven signs and a scale
  KTX_FORMAT(IQ2_XXS, 256, 32, true, 0, false)
  typedef F Head;
  AI static Head head(const Block& b) { return load_f16(b.n0); }
  AI static void part(const Head& d, const Block& b, int s, V* w, F& scale, F&) {
    const V indices = b.word(2 * s), aux = b.word(2 * s + 1);
    scale = half_steps(d, shr(aux, 28), 0.25f);
    for (int i = 0; i < 4; ++i) {
      const V at = shl(byte(indices, i), 1), signs = gather(SIGNS, and_(shr(aux, 7 * i), set(127)));
      w[2 * i] = with_signs(gather(GRID_IQ2_XXS, at), signs);
      w[2 * i + 1] = with_signs(gather(GRID_IQ2_XXS, add(at, set(1))), shr(signs, 4));
    }
  }
};

struct DIQ2_XS {  // words: 16 pairs of (nine bits of index, seven signs), 2 of scales
  KTX_FORMAT(IQ2_XS, 256, 16, true, 0, false)
  typedef F Head;
  AI static Head head(const Block& b) { return load_f16(b.n0); }
  AI static void part(const Head& d, const Block& b, int s, V* w, F& scale, F&) {
    scale = half_steps(d, and_(shr(b.word(16 + s / 8), s % 8 * 4), set(15)), 0.25f);
    for (int i = 0; i < 2; ++i) {
      const V pair = shr(b.word(s), 16 * i), at = shl(and_(pair, set(511)), 1);
      const V signs = gather(SIGNS, and_(shr(pair, 9), set(127)));
      w[2 * i] = with_signs(gather(GRID_IQ2_XS, at), signs);
      w[2 * i + 1] = with_signs(gather(GRID_IQ2_XS, add(at, set(1))), shr(signs, 4));
    }
  }
};

struct DIQ2_S {  // words: 8 of low index bytes, 8 of signs, 2 of high index bits, 2 of scales
  KTX_FORMAT(IQ2_S, 256, 16, true, 0, false)
  typedef F Head;
  AI static Head head(const Block& b) { return load_f16(b.n0); }
  AI static void part(const Head& d, const Block& b, int s, V* w, F& scale, F&) {
    scale = half_steps(d, and_(shr(b.word(18 + s / 8), s % 8 * 4), set(15)), 0.25f);
    const V high = byte(b.word(16 + s / 8), s / 2 % 4);
    for (int i = 0; i < 2; ++i) {
      const int l = s % 2 * 2 + i;
      const V index = or_(byte(b.word(s / 2), l), shl(and_(shr(high, 2 * l), set(3)), 8));
      const V at = shl(index, 1), signs = byte(b.word(8 + s / 2), l);
      w[2 * i] = with_signs(gather(GRID_IQ2_S, at), signs);
      w[2 * i + 1] = with_signs(gather(GRID_IQ2_S, add(at, set(1))), shr(signs, 4));
    }
  }
};

struct DIQ3_XXS {  // words: 16 of grid indices, 8 of four times seven signs and a scale
  KTX_FORMAT(IQ3_XXS, 256, 32, true, 0, false)
  typedef F Head;
  AI static Head head(const Block& b) { return load_f16(b.n0); }
  AI static void part(const Head& d, const Block& b, int s, V* w, F& scale, F&) {
    const V aux = b.word(16 + s);
    scale = half_steps(d, shr(aux, 28), 0.5f);
    for (int i = 0; i < 8; ++i) {
      const V signs = gather(SIGNS, and_(shr(aux, 7 * (i / 2)), set(127)));
      w[i] = with_signs(gather(GRID_IQ3_XXS, byte(b.word(2 * s + i / 4), i % 4)), shr(signs, 4 * (i % 2)));
    }
  }
};

struct DIQ3_S {  // words: 16 of low index bytes, 8 of signs, 2 of ninth index bits, 1 of scales
  KTX_FORMAT(IQ3_S, 256, 32, true, 0, false)
  typedef F Head;
  AI static Head head(const Block& b) { return load_f16(b.n0); }
  AI static void part(const Head& d, const Block& b, int s, V* w, F& scale, F&) {
    const V nibble = and_(shr(b.word(26), 4 * s), set(15));
    scale = mulf(d, to_float(add(shl(nibble, 1), set(1))));
    const V ninth = byte(b.word(24 + s / 4), s % 4), signs = b.word(16 + s);
    for (int i = 0; i < 8; ++i) {
      const V index = or_(byte(b.word(2 * s + i / 4), i % 4), shl(and_(shr(ninth, i), set(1)), 8));
      w[i] = with_signs(gather(GRID_IQ3_S, index), shr(signs, 4 * i));
    }
  }
};

// IQ1: a weight is d * (g + delta) with g in -1, 0, 1 and delta = +-1/8; carried as the integer 8*g +- 1 with scale d/8.
AI V ternary(V g, V minus) {  // minus: lane bit 0 set where delta is negative
  const V g8 = shl(and_(g, set8(0x1f)), 3);  // bytes -1, 0, 1 times 8
  return add8(g8, or_(sub(set(0), minus), set8(1)));  // -1 where minus, else +1
}

struct DIQ1_S {  // words: 8 of low index bytes, 4 of two times (3 x 4 index bits, scale, sign of delta)
  KTX_FORMAT(IQ1_S, 256, 32, true, 0, false)
  typedef F Head;
  AI static Head head(const Block& b) { return load_f16(b.n0); }
  AI static void part(const Head& d, const Block& b, int s, V* w, F& scale, F&) {
    const V h = and_(shr(b.word(8 + s / 2), s % 2 * 16), set(0xffff));
    scale = mulf(mulf(d, to_float(add(shl(and_(shr(h, 12), set(7)), 1), set(1)))), setf(0.125f));
    const V minus = shr(h, 15);
    for (int i = 0; i < 4; ++i) {
      const V at = shl(or_(byte(b.word(s), i), shl(and_(shr(h, 3 * i), set(7)), 8)), 1);
      w[2 * i] = ternary(gather(GRID_IQ1, at), minus), w[2 * i + 1] = ternary(gather(GRID_IQ1, add(at, set(1))), minus);
    }
  }
};

struct DIQ1_M {  // words: 8 of low index bytes, 4 of (3 index bits, sign of delta) nibbles, 2 of scales that carry d in their top nibbles
  KTX_FORMAT(IQ1_M, 256, 16, true, 0, false)
  typedef F Head;
  AI static Head head(const Block& b) {
    const V s0 = b.word(12), s1 = b.word(13);
    const V low = or_(and_(shr(s0, 12), set(0x000f)), and_(shr(s0, 24), set(0x00f0)));
    return f16_lanes(or_(low, or_(and_(shr(s1, 4), set(0x0f00)), and_(shr(s1, 16), set(0xf000)))));
  }
  AI static void part(const Head& d, const Block& b, int s, V* w, F& scale, F&) {
    const V step = and_(shr(b.word(12 + s / 8), s / 4 % 2 * 16 + s % 4 * 3), set(7));
    scale = mulf(mulf(d, to_float(add(shl(step, 1), set(1)))), setf(0.125f));
    const V high = byte(b.word(8 + s / 4), s % 4);
    for (int i = 0; i < 2; ++i) {
      const V nibble = shr(high, 4 * i), minus = and_(shr(nibble, 3), set(1));
      const V at = shl(or_(byte(b.word(s / 2), s % 2 * 2 + i), shl(and_(nibble, set(7)), 8)), 1);
      w[2 * i] = ternary(gather(GRID_IQ1, at), minus), w[2 * i + 1] = ternary(gather(GRID_IQ1, add(at, set(1))), minus);
    }
  }
};
