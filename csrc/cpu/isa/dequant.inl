// One decoder per weight type, over the SIMD primitives of the instruction set that includes this file.
//
// A decoder turns a block of 16 rows into sub-blocks of SUB consecutive k: SUB/4 vectors `w` (lane = row, byte = k), a scale and,
// with MINIMUM, a minimum. The value of a weight is  scale * (code - OFFSET) - minimum;  SIGNED codes are int8, others 0..127. MAX_CODE: the
// largest absolute code. WITH_OFFSET: signed codes already have the offset that `dot` expects. WHOLE_UNITS: decodes two sub-blocks at once.
// The order of fields in `words` is that of the layout table (quant/layout.cpp).

struct Block {
  const uint8_t *n0, *n1;  // narrow fields of this block, 16 rows each
  const uint8_t* words;
  V word(int i) const { return load(words + 64 * i); }
};

AI V low4(V x) { return and_(x, set8(15)); }
AI V nibbles(V x, int high) { return low4(high ? shr(x, 4) : x); }
AI V byte(V x, int i) { return and_(shr(x, 8 * i), set(0xff)); }
struct None {};
struct DecoderDefaults { static constexpr bool WITH_OFFSET = false, WHOLE_UNITS = false; };
struct OffsetDecoder { static constexpr bool WITH_OFFSET = true, WHOLE_UNITS = false; };
struct OffsetUnitDecoder { static constexpr bool WITH_OFFSET = true, WHOLE_UNITS = true; };  // two sub-blocks share a word of indices
AI constexpr int8_t offset_code(int x) { return int8_t(SIGNED_OFFSET ? x ^ 0x80 : x); }

#define KTX_FORMAT(name, block, sub_size, is_signed, offset, has_minimum, largest)                                       \
  static constexpr int CODE = ktx::name, BLOCK = block, SUB = sub_size, OFFSET = offset, MAX_CODE = largest;                 \
  static constexpr bool SIGNED = is_signed, MINIMUM = has_minimum;

struct DQ4_0 : DecoderDefaults {
  KTX_FORMAT(Q4_0, 32, 32, false, 8, false, 15)
  typedef None Head;
  AI static Head head(const Block&) { return {}; }
  AI static void part(const Head&, const Block& b, int, V* w, F& scale, F&) {
    scale = load_f16(b.n0);
    for (int i = 0; i < 4; ++i) w[i] = nibbles(b.word(i), 0), w[4 + i] = nibbles(b.word(i), 1);
  }
};

struct DQ4_1 : DecoderDefaults {
  KTX_FORMAT(Q4_1, 32, 32, false, 0, true, 15)
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
struct DQ5_0 : DecoderDefaults {
  KTX_FORMAT(Q5_0, 32, 32, false, 16, false, 31)
  typedef None Head;
  AI static Head head(const Block&) { return {}; }
  AI static void part(const Head&, const Block& b, int, V* w, F& scale, F&) { scale = load_f16(b.n0), five_bits(b, w); }
};
struct DQ5_1 : DecoderDefaults {
  KTX_FORMAT(Q5_1, 32, 32, false, 0, true, 31)
  typedef None Head;
  AI static Head head(const Block&) { return {}; }
  AI static void part(const Head&, const Block& b, int, V* w, F& scale, F& minimum) {
    scale = load_f16(b.n0), minimum = mulf(load_f16(b.n1), setf(-1)), five_bits(b, w);
  }
};

struct DQ8_0 : DecoderDefaults {
  KTX_FORMAT(Q8_0, 32, 32, true, 0, false, 127)
  typedef None Head;
  AI static Head head(const Block&) { return {}; }
  AI static void part(const Head&, const Block& b, int, V* w, F& scale, F&) {
    scale = load_f16(b.n0);
    for (int i = 0; i < 8; ++i) w[i] = b.word(i);
  }
};

// ktx types, quantized while loading: one f16 scale per 64 or 128 weights.
template <int GROUP> struct Int8 : DecoderDefaults {
  static constexpr int CODE = ktx::INT8_128, BLOCK = GROUP, SUB = 32, OFFSET = 0, MAX_CODE = 127;
  static constexpr bool SIGNED = true, MINIMUM = false;
  typedef F Head;
  AI static Head head(const Block& b) { return load_f16(b.n0); }
  AI static void part(const Head& d, const Block& b, int s, V* w, F& scale, F&) {
    scale = d;
    for (int i = 0; i < 8; ++i) w[i] = b.word(8 * s + i);
  }
};
template <int GROUP> struct Int4 : DecoderDefaults {  // 32 weights in 16 bytes: byte i holds i and i + 16
  static constexpr int CODE = GROUP == 64 ? ktx::INT4_64 : ktx::INT4_128, BLOCK = GROUP, SUB = 32, OFFSET = 8, MAX_CODE = 15;
  static constexpr bool SIGNED = false, MINIMUM = false;
  typedef F Head;
  AI static Head head(const Block& b) { return load_f16(b.n0); }
  AI static void part(const Head& d, const Block& b, int s, V* w, F& scale, F&) {
    scale = d;
    for (int i = 0; i < 4; ++i) w[i] = nibbles(b.word(4 * s + i), 0), w[4 + i] = nibbles(b.word(4 * s + i), 1);
  }
};
typedef Int8<128> DINT8_128;
typedef Int4<64> DINT4_64;
typedef Int4<128> DINT4_128;

struct DQ2_K : DecoderDefaults {  // words: 16 of codes, 4 of scales (low nibble) and minimums (high nibble)
  KTX_FORMAT(Q2_K, 256, 16, false, 0, true, 3)
  struct Head { F d, dmin; };
  AI static Head head(const Block& b) { return {load_f16(b.n0), load_f16(b.n1)}; }
  AI static void part(const Head& h, const Block& b, int s, V* w, F& scale, F& minimum) {
    const V packed = byte(b.word(16 + s / 4), s % 4);
    scale = mulf(h.d, to_float(and_(packed, set(15)))), minimum = mulf(h.dmin, to_float(shr(packed, 4)));
    const int half = s / 8, shift = (s % 8) / 2 * 2, part = s % 2;
    for (int i = 0; i < 4; ++i) w[i] = and_(shr(b.word(half * 8 + part * 4 + i), shift), set8(3));
  }
};

struct DQ3_K : DecoderDefaults {  // words: 16 of low codes, 8 of high bits, 3 of scales
  KTX_FORMAT(Q3_K, 256, 16, false, 4, false, 7)
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

AI V moved(V word, int from, int to) { return from > to ? shr(word, from - to) : shl(word, to - from); }

struct DQ4_K : DecoderDefaults {  // words: 32 of codes, 3 of scales
  KTX_FORMAT(Q4_K, 256, 32, false, 0, true, 15)
  struct Head { F d, dmin; KScales scales; };
  AI static Head head(const Block& b) { return {load_f16(b.n0), load_f16(b.n1), {b.word(32), b.word(33), b.word(34)}}; }
  AI static void part(const Head& h, const Block& b, int s, V* w, F& scale, F& minimum) {
    scale = mulf(h.d, to_float(h.scales.scale(s))), minimum = mulf(h.dmin, to_float(h.scales.minimum(s)));
    for (int i = 0; i < 8; ++i) w[i] = nibbles(b.word(s / 2 * 8 + i), s % 2);
  }
};

struct DQ5_K : DecoderDefaults {  // words: 32 of low codes, 8 of fifth bits, 3 of scales
  KTX_FORMAT(Q5_K, 256, 32, false, 0, true, 31)
  struct Head { F d, dmin; KScales scales; };
  AI static Head head(const Block& b) { return {load_f16(b.n0), load_f16(b.n1), {b.word(40), b.word(41), b.word(42)}}; }
  AI static void part(const Head& h, const Block& b, int s, V* w, F& scale, F& minimum) {
    scale = mulf(h.d, to_float(h.scales.scale(s))), minimum = mulf(h.dmin, to_float(h.scales.minimum(s)));
    for (int i = 0; i < 8; ++i) w[i] = with_bits(nibbles(b.word(s / 2 * 8 + i), s % 2), moved(b.word(32 + i), s, 4), set8(16));
  }
};

struct DQ6_K : DecoderDefaults {  // words: 32 of low nibbles, 16 of high pairs, 4 of signed scales
  KTX_FORMAT(Q6_K, 256, 16, false, 32, false, 63)
  typedef F Head;
  AI static Head head(const Block& b) { return load_f16(b.n0); }
  AI static void part(const Head& d, const Block& b, int s, V* w, F& scale, F&) {
    scale = mulf(d, to_float(sign_extend8(shr(b.word(48 + s / 4), s % 4 * 8))));
    const int half = s / 8, g = (s % 8) / 2, part = s % 2;
    for (int i = 0; i < 4; ++i) {
      const V low = nibbles(b.word(half * 16 + (g & 1) * 8 + part * 4 + i), g >> 1);
      w[i] = with_bits(low, moved(b.word(32 + half * 8 + part * 4 + i), 2 * g, 4), set8(48));
    }
  }
};

static const int8_t VALUES_IQ4_NL[16] = {offset_code(-127), offset_code(-104), offset_code(-83), offset_code(-65), offset_code(-49), offset_code(-35), offset_code(-22), offset_code(-10),
                                         offset_code(1), offset_code(13), offset_code(25), offset_code(38), offset_code(53), offset_code(69), offset_code(89), offset_code(113)};
static const int8_t VALUES_MXFP4[16] = {offset_code(0), offset_code(1), offset_code(2), offset_code(3), offset_code(4), offset_code(6), offset_code(8), offset_code(12),  // twice the e2m1 values
                                        offset_code(0), offset_code(-1), offset_code(-2), offset_code(-3), offset_code(-4), offset_code(-6), offset_code(-8), offset_code(-12)};

struct DIQ4_NL : OffsetDecoder {
  KTX_FORMAT(IQ4_NL, 32, 32, true, 0, false, 127)
  typedef None Head;
  AI static Head head(const Block&) { return {}; }
  AI static void part(const Head&, const Block& b, int, V* w, F& scale, F&) {
    scale = load_f16(b.n0);
    for (int i = 0; i < 8; ++i) w[i] = table16(VALUES_IQ4_NL, nibbles(b.word(i & 3), i >> 2));
  }
};

struct DIQ4_XS : OffsetDecoder {  // narrow: d, high scale bits; words: 32 of codes, 1 of low scale nibbles
  KTX_FORMAT(IQ4_XS, 256, 32, true, 0, false, 127)
  struct Head { F d; V low, high; };
  AI static Head head(const Block& b) { return {load_f16(b.n0), b.word(32), load_u16(b.n1)}; }
  AI static void part(const Head& h, const Block& b, int s, V* w, F& scale, F&) {
    const V bits = or_(and_(shr(h.low, 4 * s), set(15)), shl(and_(shr(h.high, 2 * s), set(3)), 4));
    scale = mulf(h.d, to_float(add(bits, set(uint32_t(-32)))));
    for (int i = 0; i < 8; ++i) w[i] = table16(VALUES_IQ4_NL, nibbles(b.word(s * 4 + (i & 3)), i >> 2));
  }
};

struct DMXFP4 : OffsetDecoder {
  KTX_FORMAT(MXFP4, 32, 32, true, 0, false, 12)
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

struct DTQ2_0 : DecoderDefaults {
  KTX_FORMAT(TQ2_0, 256, 32, false, 1, false, 3)
  typedef F Head;
  AI static Head head(const Block& b) { return load_f16(b.n0); }
  AI static void part(const Head& d, const Block& b, int s, V* w, F& scale, F&) {
    scale = d;
    for (int i = 0; i < 8; ++i) w[i] = and_(shr(b.word(s / 4 * 8 + i), s % 4 * 2), set8(3));
  }
};

// Digits to the base 3, five in a byte: a byte is their fraction, so times 3^n (mod 256) brings digit n to the front, times 3 over 256 reads it.
static const uint32_t POWERS_OF_3[5] = {0x00010001, 0x00030003, 0x00090009, 0x001b001b, 0x00510051};  // in both halves of a word
AI V low_bytes(V x) { return and_(x, set(0x00ff00ff)); }
AI V trit(V x, int n) {
  const V p = set(POWERS_OF_3[n]), three = set(POWERS_OF_3[1]);
  const V even = mul16(low_bytes(mul16(low_bytes(x), p)), three), odd = mul16(low_bytes(mul16(shr16(x, 8), p)), three);
  return with_bits(shr16(even, 8), odd, set(0xff00ff00));
}
// Eight times the digits FROM and following of each byte; eight times digit n, one of the first four.
#ifdef KTX_VBMI
AI V eight_of(V four, int n) { return and_(n < 2 ? shl(four, 3 - 2 * n) : shr(four, 2 * n - 3), set8(24)); }
template <int FROM, int COUNT> AI void eight_trits(V bytes, V* w) {
  const Selected<256> at(bytes, bytes);
  const V four = FROM < 4 ? at.of(TRITS.four) : bytes;
#pragma GCC unroll 5
  for (int i = 0; i < COUNT; ++i) w[i] = FROM + i < 4 ? eight_of(four, FROM + i) : at.of(TRITS.fifth);
}
AI V eight_trit(V bytes, int n) { return eight_of(Selected<256>(bytes, bytes).of(TRITS.four), n); }
#else
template <int FROM, int COUNT> AI void eight_trits(V bytes, V* w) {
  V even = low_bytes(bytes), odd = shr16(bytes, 8);
  if (FROM) even = low_bytes(mul16(even, set(POWERS_OF_3[FROM]))), odd = low_bytes(mul16(odd, set(POWERS_OF_3[FROM])));
#pragma GCC unroll 5
  for (int i = 0; i < COUNT; ++i) {
    if (i) even = low_bytes(even), odd = low_bytes(odd);
    even = mul16(even, set(POWERS_OF_3[1])), odd = mul16(odd, set(POWERS_OF_3[1]));
    w[i] = shl(with_bits(shr16(even, 8), odd, set(0xff00ff00)), 3);
  }
}
AI V eight_trit(V bytes, int n) { return shl(trit(bytes, n), 3); }
#endif

struct DTQ1_0 : DecoderDefaults {  // words: 12 of five trits a byte, 1 of four trits a byte
  KTX_FORMAT(TQ1_0, 256, 16, false, 1, false, 2)
  typedef F Head;
  AI static Head head(const Block& b) { return load_f16(b.n0); }
  AI static void part(const Head& d, const Block& b, int s, V* w, F& scale, F&) {
    scale = d;
    if (s < 10)
      for (int i = 0; i < 4; ++i) w[i] = trit(b.word(s % 2 * 4 + i), s / 2);
    else if (s < 15)
      for (int i = 0; i < 4; ++i) w[i] = trit(b.word(8 + i), s - 10);
    else
      for (int i = 0; i < 4; ++i) w[i] = trit(b.word(12), i);
  }
};

AI F half_steps(F d, V nibble, float step) { return mulf(mulf(d, addf(setf(0.5f), to_float(nibble))), setf(step)); }

// ---- code books. An index selects a 16-bit entry, which holds the indices of its weights into a table of values (iq_codebooks.h). Packing
// puts the bytes of four indices in the order 0 2 1 3, and the signs of four weights of 16 rows into 64 bits (quant/layout.cpp).

// `look_up` takes four indices: their low bytes, and BITS more bits each in a lane of their own, those of index i from STRIDE*i on.
#ifdef KTX_VBMI
struct Entries { V first, second; };  // bytes in the order of the indices
#define KTX_BOOK(name, entries) struct B##name { static constexpr int N = entries; static constexpr const uint8_t *FIRST = FIRST_##name, *SECOND = SECOND_##name; };
template <class B, int STRIDE> AI Entries look_up(V low, V more) {
  const Selected<B::N> at(low, spread_bits<STRIDE>(more));
  return {at.of(B::FIRST), at.of(B::SECOND)};
}
AI V eight_fields(const Entries& e, int entry, int second) { return two_bit_fields(second ? e.second : e.first, entry); }
AI V four_fields(const Entries& e, int entry) { return four_bit_fields(e.first, e.second, entry); }
#else
struct Entries { V pair[2]; };  // entries 0 and 1, 2 and 3
#define KTX_BOOK(name, entries) struct B##name { static constexpr int N = entries; static constexpr const uint16_t* TABLE = GRID_##name; };
template <int BY> AI V shifted(V x) { return BY >= 0 ? shl(x, BY >= 0 ? BY : 0) : shr(x, BY >= 0 ? 0 : -BY); }
template <class B, int STRIDE> AI Entries look_up(V low, V more) {
  constexpr uint32_t BITS = B::N / 256 - 1;  // missing in the low byte
  V first = and_(low, set(0x00ff00ff)), second = and_(shr16(low, 8), set(0x00ff00ff));
  if (BITS) {
    first = or_(first, or_(and_(shifted<8>(more), set(BITS << 8)), and_(shifted<24 - STRIDE>(more), set(BITS << 24))));
    second = or_(second, or_(and_(shifted<8 - 2 * STRIDE>(more), set(BITS << 8)), and_(shifted<24 - 3 * STRIDE>(more), set(BITS << 24))));
  }
  return {{lookup<B::N>(B::TABLE, first), lookup<B::N>(B::TABLE, second)}};
}
AI V doubled(const Entries& e, int entry) { return entry % 2 ? high_words(e.pair[entry / 2]) : low_words(e.pair[entry / 2]); }
AI V eight_fields(const Entries& e, int entry, int second) {
  return second ? shr16_each<4, 6>(doubled(e, entry)) : shr16_each<0, 2>(doubled(e, entry));
}
AI V four_fields(const Entries& e, int entry) { return shr16_each<0, 4>(doubled(e, entry)); }
#endif
KTX_BOOK(IQ2_XXS, 256) KTX_BOOK(IQ2_XS, 512) KTX_BOOK(IQ2_S, 1024) KTX_BOOK(IQ3_XXS, 256) KTX_BOOK(IQ3_S, 512)

AI uint64_t mask_at(const uint8_t* line, int vector) {
  uint64_t m;
  __builtin_memcpy(&m, line + 8 * vector, 8);
  return m;
}
// Signs of eight weights of which seven are stored: an even number is negative. The eighth bit has another use and is returned in `spare`.
struct Signs { uint64_t first, second, spare; };
AI Signs even_signs(const uint8_t* line, int eight) {
  constexpr uint64_t LOW = 0x1111111111111111ull;
  const uint64_t first = mask_at(line, 2 * eight), stored = mask_at(line, 2 * eight + 1), second = stored & ~(LOW << 3);
  uint64_t odd = first ^ second;
  odd ^= odd >> 1, odd ^= odd >> 2;
  return {first, second | (odd & LOW) << 3, stored >> 3 & LOW};
}

// Tables repeat, so that bits above a field are ignored.
static const int8_t VALUES_IQ2[16] = {offset_code(8), offset_code(25), offset_code(43), 0, offset_code(8), offset_code(25), offset_code(43), 0, offset_code(8), offset_code(25), offset_code(43), 0, offset_code(8), offset_code(25), offset_code(43), 0};
static const int8_t VALUES_IQ3_XXS[16] = {offset_code(4), offset_code(12), offset_code(20), offset_code(28), offset_code(36), offset_code(44), offset_code(52), offset_code(62),
                                          offset_code(4), offset_code(12), offset_code(20), offset_code(28), offset_code(36), offset_code(44), offset_code(52), offset_code(62)};
static const int8_t VALUES_IQ3_S[16] = {offset_code(1), offset_code(3), offset_code(5), offset_code(7), offset_code(9), offset_code(11), offset_code(13), offset_code(15),
                                        offset_code(1), offset_code(3), offset_code(5), offset_code(7), offset_code(9), offset_code(11), offset_code(13), offset_code(15)};

// Four weights of an entry: the first or the second of eight, all of four. `minus` is the mask of those with a minus.
AI V of_eight(const Entries& e, int entry, int second, uint64_t minus) {
  return negated(repeated_table<3>(VALUES_IQ2, eight_fields(e, entry, second)), minus);
}
AI V of_four(const int8_t* values, const Entries& e, int entry, uint64_t minus) {
  return negated(repeated_table<7>(values, four_fields(e, entry)), minus);
}

struct DIQ2_XXS : OffsetDecoder {  // words: per 32 k, four grid indices, then signs; the spare bits are a scale
  KTX_FORMAT(IQ2_XXS, 256, 32, true, 0, false, 43)
  typedef F Head;
  AI static Head head(const Block& b) { return load_f16(b.n0); }
  AI static void part(const Head& d, const Block& b, int s, V* w, F& scale, F&) {
    const Entries e = look_up<BIQ2_XXS, 0>(b.word(2 * s), set(0));
    uint64_t step = 0;
    for (int i = 0; i < 4; ++i) {
      const Signs x = even_signs(b.words + 64 * (2 * s + 1), i);
      step |= x.spare << i;
      w[2 * i] = of_eight(e, i, 0, x.first), w[2 * i + 1] = of_eight(e, i, 1, x.second);
    }
    scale = half_steps(d, nibble_lanes(step), 0.25f);
  }
};

struct DIQ2_XS : OffsetUnitDecoder {  // words: per 32 k, four low index bytes, then signs; the spare bits are the ninth of the indices; 2 of scales
  KTX_FORMAT(IQ2_XS, 256, 16, true, 0, false, 43)
  typedef F Head;
  AI static Head head(const Block& b) { return load_f16(b.n0); }
  AI static void unit(const Head& d, const Block& b, int u, V* w, F* scale) {
    const V steps = shr(b.word(16 + u / 4), u % 4 * 8);
    scale[0] = half_steps(d, and_(steps, set(15)), 0.25f), scale[1] = half_steps(d, and_(shr(steps, 4), set(15)), 0.25f);
    Signs x[4];
    uint64_t ninth = 0;
    for (int i = 0; i < 4; ++i) x[i] = even_signs(b.words + 64 * (2 * u + 1), i), ninth |= x[i].spare << i;
    const Entries e = look_up<BIQ2_XS, 1>(b.word(2 * u), nibble_lanes(ninth));
    for (int i = 0; i < 4; ++i) w[2 * i] = of_eight(e, i, 0, x[i].first), w[2 * i + 1] = of_eight(e, i, 1, x[i].second);
  }
};

struct DIQ2_S : OffsetUnitDecoder {  // words: 8 of low index bytes, 8 of signs, 2 of high index bits, 2 of scales
  KTX_FORMAT(IQ2_S, 256, 16, true, 0, false, 43)
  typedef F Head;
  AI static Head head(const Block& b) { return load_f16(b.n0); }
  AI static void unit(const Head& d, const Block& b, int u, V* w, F* scale) {
    const V steps = shr(b.word(18 + u / 4), u % 4 * 8);
    scale[0] = half_steps(d, and_(steps, set(15)), 0.25f), scale[1] = half_steps(d, and_(shr(steps, 4), set(15)), 0.25f);
    const Entries e = look_up<BIQ2_S, 2>(b.word(u), shr(b.word(16 + u / 4), u % 4 * 8));
    for (int v = 0; v < 8; ++v) w[v] = of_eight(e, v / 2, v % 2, mask_at(b.words + 64 * (8 + u), v));
  }
};

struct DIQ3_XXS : OffsetDecoder {  // words: 16 of grid indices, 8 of signs whose spare bits are a scale
  KTX_FORMAT(IQ3_XXS, 256, 32, true, 0, false, 62)
  typedef F Head;
  AI static Head head(const Block& b) { return load_f16(b.n0); }
  AI static void part(const Head& d, const Block& b, int s, V* w, F& scale, F&) {
    uint64_t step = 0;
    for (int half = 0; half < 2; ++half) {
      const Entries e = look_up<BIQ3_XXS, 0>(b.word(2 * s + half), set(0));
      for (int i = 0; i < 4; i += 2) {
        const Signs x = even_signs(b.words + 64 * (16 + s), 2 * half + i / 2);
        step |= x.spare << (2 * half + i / 2);
        w[4 * half + i] = of_four(VALUES_IQ3_XXS, e, i, x.first), w[4 * half + i + 1] = of_four(VALUES_IQ3_XXS, e, i + 1, x.second);
      }
    }
    scale = half_steps(d, nibble_lanes(step), 0.5f);
  }
};

struct DIQ3_S : OffsetDecoder {  // words: 16 of low index bytes, 8 of signs, 2 of ninth index bits, 1 of scales
  KTX_FORMAT(IQ3_S, 256, 32, true, 0, false, 15)
  typedef F Head;
  AI static Head head(const Block& b) { return load_f16(b.n0); }
  AI static void part(const Head& d, const Block& b, int s, V* w, F& scale, F&) {
    const V nibble = and_(shr(b.word(26), 4 * s), set(15));
    scale = mulf(d, to_float(add(shl(nibble, 1), set(1))));
    const V ninth = shr(b.word(24 + s / 4), s % 4 * 8);
    for (int half = 0; half < 2; ++half) {
      const Entries e = look_up<BIQ3_S, 1>(b.word(2 * s + half), shr(ninth, 4 * half));
      for (int i = 0; i < 4; ++i) w[4 * half + i] = of_four(VALUES_IQ3_S, e, i, mask_at(b.words + 64 * (16 + s), 4 * half + i));
    }
  }
};

// ---- IQ1: a weight is d * (2 * scale + 1) * (digit - 1 + delta), delta = +-1/8; codes are in eighths, 8 * digit - 8 +- 1. Packing expands the
// entries (quant/layout.cpp).

AI void unit_digits(const Block& b, int u, V* w) {  // of 32 k, eight times each
  const int pair = u / 2;
  if (u % 2) {
    eight_trits<3, 2>(b.word(3 * pair + 1), w), eight_trits<0, 5>(b.word(3 * pair + 2), w + 2);
    w[7] = eight_trit(b.word(12), pair);
  } else {
    eight_trits<0, 5>(b.word(3 * pair), w), eight_trits<0, 3>(b.word(3 * pair + 1), w + 5);
  }
}
AI F odd_steps(F d, V bits) { return mulf(mulf(d, to_float(or_(shl(and_(bits, set(7)), 1), set(1)))), setf(0.125f)); }
AI V minus_nine_or_seven(V sign) { return sub8(set8(offset_code(-7)), and_(sub(set(0), and_(sign, set(1))), set8(2))); }

struct DIQ1_S : OffsetDecoder {  // words: 13 of digits, 1 of (scale, sign of delta) nibbles
  KTX_FORMAT(IQ1_S, 256, 32, true, 0, false, 9)
  typedef F Head;
  AI static Head head(const Block& b) { return load_f16(b.n0); }
  AI static void part(const Head& d, const Block& b, int s, V* w, F& scale, F&) {
    const V nibble = shr(b.word(13), 4 * s), from = minus_nine_or_seven(shr(nibble, 3));
    scale = odd_steps(d, nibble);
    unit_digits(b, s, w);
    for (int i = 0; i < 8; ++i) w[i] = add8(w[i], from);
  }
};

struct DIQ1_M : OffsetUnitDecoder {  // words: 13 of digits, 1 of signs of delta, one for eight weights, 2 of scales that carry d in their top nibbles
  KTX_FORMAT(IQ1_M, 256, 16, true, 0, false, 9)
  typedef F Head;
  AI static Head head(const Block& b) {
    const V s0 = b.word(14), s1 = b.word(15);
    const V low = or_(and_(shr(s0, 12), set(0x000f)), and_(shr(s0, 24), set(0x00f0)));
    return f16_lanes(or_(low, or_(and_(shr(s1, 4), set(0x0f00)), and_(shr(s1, 16), set(0xf000)))));
  }
  AI static void unit(const Head& d, const Block& b, int u, V* w, F* scale) {
    const V steps = shr(b.word(14 + u / 4), u / 2 % 2 * 16 + u % 2 * 6), signs = shr(b.word(13), 4 * u);
    scale[0] = odd_steps(d, steps), scale[1] = odd_steps(d, shr(steps, 3));
    unit_digits(b, u, w);
    for (int i = 0; i < 8; i += 2) {
      const V from = minus_nine_or_seven(shr(signs, i / 2));
      w[i] = add8(w[i], from), w[i + 1] = add8(w[i + 1], from);
    }
  }
};
