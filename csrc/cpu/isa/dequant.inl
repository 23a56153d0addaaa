// One decoder per weight type, over the SIMD primitives of the instruction set that includes this file.
//
// A block is BLOCK consecutive columns of 16 rows. A decoder turns it into sub-blocks of SUB columns that share a
// scale. The decoder of type X, struct DX, has these functions:
//
//   load_scales(b)    loads, once for a block, what all its sub-blocks need (BlockScales; often the f16 scale d)
//   decode_sub_block(scales, b, s, w, scale, minimum)
//                     decodes sub-block s into SUB/4 vectors of codes: w[i] = columns 4*i to 4*i+3 (lane = row,
//                     byte = column); sets its scale and, with MINIMUM, its minimum: one float for each row
//   decode_pair(scales, b, u, w, scale)
//                     with DECODES_PAIRS instead: decodes both 16-column sub-blocks of unit u (32 columns)
//
// The value of a weight is  scale * (code - OFFSET) - minimum.  SIGNED codes are int8, others 0..127.
// MAX_CODE: the largest absolute code, from which follows how many products fit 16 bits (simd_avx2.inl).
// WITH_OFFSET: signed codes are decoded with SIGNED_OFFSET added already, because a table look-up adds it for free.
// The comment `words` of a decoder gives the order of the fields in b.words, which is that of quant/layout.cpp.

struct Block {
  const uint8_t *narrow0, *narrow1;  // narrow fields of this block, for example f16 scales: 16 rows each
  const uint8_t* words;              // [word][16 rows]
  V word(int i) const { return load(words + 64 * i); }
};

// take_nibbles: the lower (high = 0) or the upper nibble of each byte. take_byte: byte i of each lane.
AI V low_nibbles(V x) { return and_(x, set8(15)); }
AI V take_nibbles(V x, int high) { return low_nibbles(high ? shr(x, 4) : x); }
AI V take_byte(V x, int i) { return and_(shr(x, 8 * i), set(0xff)); }
struct NoScales {};
struct DecoderDefaults {
  static constexpr bool WITH_OFFSET = false, DECODES_PAIRS = false;
};
struct OffsetDecoder {
  static constexpr bool WITH_OFFSET = true, DECODES_PAIRS = false;
};
// Two sub-blocks share a word of indices
struct OffsetPairDecoder {
  static constexpr bool WITH_OFFSET = true, DECODES_PAIRS = true;
};
// An entry of a table of signed codes, with SIGNED_OFFSET added as `dot` of this instruction set expects (adding 128
// flips the top bit).
AI constexpr int8_t offset_code(int x) { return int8_t(SIGNED_OFFSET ? x ^ 0x80 : x); }

#define KTX_FORMAT(name, block, sub_size, is_signed, offset, has_minimum, largest)                           \
  static constexpr int CODE = ktx::name, BLOCK = block, SUB = sub_size, OFFSET = offset, MAX_CODE = largest; \
  static constexpr bool SIGNED = is_signed, MINIMUM = has_minimum;

struct DQ4_0 : DecoderDefaults {
  KTX_FORMAT(Q4_0, 32, 32, false, 8, false, 15)
  typedef NoScales BlockScales;
  AI static BlockScales load_scales(const Block&) { return {}; }
  AI static void decode_sub_block(const BlockScales&, const Block& b, int, V* w, F& scale, F&) {
    scale = load_f16(b.narrow0);
    for (int i = 0; i < 4; ++i) w[i] = take_nibbles(b.word(i), 0), w[4 + i] = take_nibbles(b.word(i), 1);
  }
};

struct DQ4_1 : DecoderDefaults {
  KTX_FORMAT(Q4_1, 32, 32, false, 0, true, 15)
  typedef NoScales BlockScales;
  AI static BlockScales load_scales(const Block&) { return {}; }
  AI static void decode_sub_block(const BlockScales&, const Block& b, int, V* w, F& scale, F& minimum) {
    scale = load_f16(b.narrow0), minimum = mulf(load_f16(b.narrow1), setf(-1));
    for (int i = 0; i < 4; ++i) w[i] = take_nibbles(b.word(i), 0), w[4 + i] = take_nibbles(b.word(i), 1);
  }
};

// Joins low nibbles (words 0 to 3) and fifth bits (word 4, reordered by packing) to the codes of 32 columns.
AI void decode_five_bits(const Block& b, V* w) {
  const V fifth = b.word(4);
  for (int i = 0; i < 8; ++i) {
    const V high = and_(i < 4 ? shl(fifth, 4 - i) : shr(fifth, i - 4), set8(16));
    w[i] = or_(take_nibbles(b.word(i & 3), i >> 2), high);
  }
}
struct DQ5_0 : DecoderDefaults {
  KTX_FORMAT(Q5_0, 32, 32, false, 16, false, 31)
  typedef NoScales BlockScales;
  AI static BlockScales load_scales(const Block&) { return {}; }
  AI static void decode_sub_block(const BlockScales&, const Block& b, int, V* w, F& scale, F&) {
    scale = load_f16(b.narrow0), decode_five_bits(b, w);
  }
};
struct DQ5_1 : DecoderDefaults {
  KTX_FORMAT(Q5_1, 32, 32, false, 0, true, 31)
  typedef NoScales BlockScales;
  AI static BlockScales load_scales(const Block&) { return {}; }
  AI static void decode_sub_block(const BlockScales&, const Block& b, int, V* w, F& scale, F& minimum) {
    scale = load_f16(b.narrow0), minimum = mulf(load_f16(b.narrow1), setf(-1)), decode_five_bits(b, w);
  }
};

struct DQ8_0 : DecoderDefaults {
  KTX_FORMAT(Q8_0, 32, 32, true, 0, false, 127)
  typedef NoScales BlockScales;
  AI static BlockScales load_scales(const Block&) { return {}; }
  AI static void decode_sub_block(const BlockScales&, const Block& b, int, V* w, F& scale, F&) {
    scale = load_f16(b.narrow0);
    for (int i = 0; i < 8; ++i) w[i] = b.word(i);
  }
};

// Types of ktx, to which the loader quantizes: one f16 scale per GROUP (64 or 128) weights.
template <int GROUP> struct Int8 : DecoderDefaults {
  static constexpr int CODE = ktx::INT8_128, BLOCK = GROUP, SUB = 32, OFFSET = 0, MAX_CODE = 127;
  static constexpr bool SIGNED = true, MINIMUM = false;
  typedef F BlockScales;
  AI static BlockScales load_scales(const Block& b) { return load_f16(b.narrow0); }
  AI static void decode_sub_block(const BlockScales& d, const Block& b, int s, V* w, F& scale, F&) {
    scale = d;
    for (int i = 0; i < 8; ++i) w[i] = b.word(8 * s + i);
  }
};
template <int GROUP> struct Int4 : DecoderDefaults {  // 32 weights in 16 bytes: byte i holds i and i + 16
  static constexpr int CODE = GROUP == 64 ? ktx::INT4_64 : ktx::INT4_128, BLOCK = GROUP, SUB = 32, OFFSET = 8,
                       MAX_CODE = 15;
  static constexpr bool SIGNED = false, MINIMUM = false;
  typedef F BlockScales;
  AI static BlockScales load_scales(const Block& b) { return load_f16(b.narrow0); }
  AI static void decode_sub_block(const BlockScales& d, const Block& b, int s, V* w, F& scale, F&) {
    scale = d;
    for (int i = 0; i < 4; ++i)
      w[i] = take_nibbles(b.word(4 * s + i), 0), w[4 + i] = take_nibbles(b.word(4 * s + i), 1);
  }
};
typedef Int8<128> DINT8_128;
typedef Int4<64> DINT4_64;
typedef Int4<128> DINT4_128;

// In the k-quants below, half: which 128 columns of the block; sixteen: which 16 of 32 columns.
struct DQ2_K : DecoderDefaults {  // words: 16 of codes, 4 of scales (low nibble) and minimums (high nibble)
  KTX_FORMAT(Q2_K, 256, 16, false, 0, true, 3)
  struct BlockScales {
    F d, dmin;
  };
  AI static BlockScales load_scales(const Block& b) { return {load_f16(b.narrow0), load_f16(b.narrow1)}; }
  // Decodes sub-block s, 16 columns: two bits of each byte of four words; byte s of words 16 to 19 has scale and
  // minimum, a nibble each.
  AI static void decode_sub_block(const BlockScales& h, const Block& b, int s, V* w, F& scale, F& minimum) {
    const V packed = take_byte(b.word(16 + s / 4), s % 4);
    scale = mulf(h.d, to_float(and_(packed, set(15)))), minimum = mulf(h.dmin, to_float(shr(packed, 4)));
    const int half = s / 8, shift = (s % 8) / 2 * 2, sixteen = s % 2;
    for (int i = 0; i < 4; ++i) w[i] = and_(shr(b.word(half * 8 + sixteen * 4 + i), shift), set8(3));
  }
};

struct DQ3_K : DecoderDefaults {  // words: 16 of low codes, 8 of high bits, 3 of scales
  KTX_FORMAT(Q3_K, 256, 16, false, 4, false, 7)
  typedef F BlockScales;
  AI static BlockScales load_scales(const Block& b) { return load_f16(b.narrow0); }
  // Decodes sub-block s, 16 columns: the two low bits of the codes are field `field` of four of the words 0 to 15, the
  // high bit is in four of the words 16 to 23. A scale has six bits, 32 too large, which ggml stores apart: four in a
  // nibble of words 24 and 25, two in word 26.
  AI static void decode_sub_block(const BlockScales& d, const Block& b, int s, V* w, F& scale, F&) {
    const V low = and_(shr(take_byte(b.word(24 + (s % 8) / 4), s % 4), s < 8 ? 0 : 4), set(15));
    const V high = and_(shr(take_byte(b.word(26), s % 4), s / 4 * 2), set(3));
    scale = mulf(d, to_float(add(or_(low, shl(high, 4)), set(uint32_t(-32)))));
    const int half = s / 8, field = (s % 8) / 2, sixteen = s % 2;
    for (int i = 0; i < 4; ++i) {
      const V low_bits = and_(shr(b.word(half * 8 + sixteen * 4 + i), 2 * field), set8(3));
      const V high_bit = and_(shr(b.word(16 + sixteen * 4 + i), half * 4 + field), set8(1));
      w[i] = or_(low_bits, shl(high_bit, 2));
    }
  }
};

// Six-bit scales and minimums of the eight sub-blocks of Q4_K and Q5_K, in three words as ggml packs them: those of
// sub-blocks 0 to 3 in the low bits of w0 and w1, those of 4 to 7 as nibbles of w2 plus the top bits of w0 and w1.
struct KScales {
  V w0, w1, w2;
  AI V scale(int s) const {
    if (s < 4) return and_(take_byte(w0, s), set(63));
    return or_(and_(take_byte(w2, s - 4), set(15)), shl(shr(take_byte(w0, s - 4), 6), 4));
  }
  AI V minimum(int s) const {
    if (s < 4) return and_(take_byte(w1, s), set(63));
    return or_(shr(take_byte(w2, s - 4), 4), shl(shr(take_byte(w1, s - 4), 6), 4));
  }
};

// Shifts bit `from` of each lane to bit `to`.
AI V move_bits(V word, int from, int to) { return from > to ? shr(word, from - to) : shl(word, to - from); }

struct DQ4_K : DecoderDefaults {  // words: 32 of codes, 3 of scales
  KTX_FORMAT(Q4_K, 256, 32, false, 0, true, 15)
  struct BlockScales {
    F d, dmin;
    KScales scales;
  };
  AI static BlockScales load_scales(const Block& b) {
    return {load_f16(b.narrow0), load_f16(b.narrow1), {b.word(32), b.word(33), b.word(34)}};
  }
  AI static void decode_sub_block(const BlockScales& h, const Block& b, int s, V* w, F& scale, F& minimum) {
    scale = mulf(h.d, to_float(h.scales.scale(s))), minimum = mulf(h.dmin, to_float(h.scales.minimum(s)));
    for (int i = 0; i < 8; ++i) w[i] = take_nibbles(b.word(s / 2 * 8 + i), s % 2);
  }
};

struct DQ5_K : DecoderDefaults {  // words: 32 of low codes, 8 of fifth bits, 3 of scales
  KTX_FORMAT(Q5_K, 256, 32, false, 0, true, 31)
  struct BlockScales {
    F d, dmin;
    KScales scales;
  };
  AI static BlockScales load_scales(const Block& b) {
    return {load_f16(b.narrow0), load_f16(b.narrow1), {b.word(40), b.word(41), b.word(42)}};
  }
  AI static void decode_sub_block(const BlockScales& h, const Block& b, int s, V* w, F& scale, F& minimum) {
    scale = mulf(h.d, to_float(h.scales.scale(s))), minimum = mulf(h.dmin, to_float(h.scales.minimum(s)));
    for (int i = 0; i < 8; ++i)
      w[i] = with_bits(take_nibbles(b.word(s / 2 * 8 + i), s % 2), move_bits(b.word(32 + i), s, 4), set8(16));
  }
};

struct DQ6_K : DecoderDefaults {  // words: 32 of low nibbles, 16 of high pairs, 4 of signed scales
  KTX_FORMAT(Q6_K, 256, 16, false, 32, false, 63)
  typedef F BlockScales;
  AI static BlockScales load_scales(const Block& b) { return load_f16(b.narrow0); }
  // Decodes sub-block s, 16 columns of six-bit codes: four low bits from words 0 to 31, two high bits from words 32 to
  // 47; byte s of words 48 to 51 is the scale. `quarter`: which 32 columns of the half; it determines the word and
  // nibble of the low bits, and the two bits of the high ones.
  AI static void decode_sub_block(const BlockScales& d, const Block& b, int s, V* w, F& scale, F&) {
    scale = mulf(d, to_float(sign_extend8(shr(b.word(48 + s / 4), s % 4 * 8))));
    const int half = s / 8, quarter = (s % 8) / 2, sixteen = s % 2;
    for (int i = 0; i < 4; ++i) {
      const V low = take_nibbles(b.word(half * 16 + (quarter & 1) * 8 + sixteen * 4 + i), quarter >> 1);
      w[i] = with_bits(low, move_bits(b.word(32 + half * 8 + sixteen * 4 + i), 2 * quarter, 4), set8(48));
    }
  }
};

static const int8_t VALUES_IQ4_NL[16] = {offset_code(-127), offset_code(-104), offset_code(-83), offset_code(-65),
    offset_code(-49), offset_code(-35), offset_code(-22), offset_code(-10), offset_code(1), offset_code(13),
    offset_code(25), offset_code(38), offset_code(53), offset_code(69), offset_code(89), offset_code(113)};
// Twice the e2m1 values, which makes them integers; the scale is halved.
static const int8_t VALUES_MXFP4[16] = {offset_code(0), offset_code(1), offset_code(2), offset_code(3), offset_code(4),
    offset_code(6), offset_code(8), offset_code(12), offset_code(0), offset_code(-1), offset_code(-2), offset_code(-3),
    offset_code(-4), offset_code(-6), offset_code(-8), offset_code(-12)};

struct DIQ4_NL : OffsetDecoder {
  KTX_FORMAT(IQ4_NL, 32, 32, true, 0, false, 127)
  typedef NoScales BlockScales;
  AI static BlockScales load_scales(const Block&) { return {}; }
  AI static void decode_sub_block(const BlockScales&, const Block& b, int, V* w, F& scale, F&) {
    scale = load_f16(b.narrow0);
    for (int i = 0; i < 8; ++i) w[i] = look_up16(VALUES_IQ4_NL, take_nibbles(b.word(i & 3), i >> 2));
  }
};

struct DIQ4_XS : OffsetDecoder {  // narrow: d, high scale bits; words: 32 of codes, 1 of low scale nibbles
  KTX_FORMAT(IQ4_XS, 256, 32, true, 0, false, 127)
  struct BlockScales {
    F d;
    V low, high;
  };
  AI static BlockScales load_scales(const Block& b) { return {load_f16(b.narrow0), b.word(32), load_u16(b.narrow1)}; }
  AI static void decode_sub_block(const BlockScales& h, const Block& b, int s, V* w, F& scale, F&) {
    const V bits = or_(and_(shr(h.low, 4 * s), set(15)), shl(and_(shr(h.high, 2 * s), set(3)), 4));
    scale = mulf(h.d, to_float(add(bits, set(uint32_t(-32)))));
    for (int i = 0; i < 8; ++i) w[i] = look_up16(VALUES_IQ4_NL, take_nibbles(b.word(s * 4 + (i & 3)), i >> 2));
  }
};

struct DMXFP4 : OffsetDecoder {
  KTX_FORMAT(MXFP4, 32, 32, true, 0, false, 12)
  typedef NoScales BlockScales;
  AI static BlockScales load_scales(const Block&) { return {}; }
  AI static void decode_sub_block(const BlockScales&, const Block& b, int, V* w, F& scale, F&) {
    // The scale is half of 2^(e-127), because VALUES_MXFP4 are doubled: exponent field e-1, and the subnormals 2^-128
    // and 2^-127 for e = 0 and 1.
    const V e = load_u8(b.narrow0), zero_e = lane_is(e, 0);
    const V bits = shl(sub(e, xor_(zero_e, set(1))), 23);
    scale = as_float(or_(bits, or_(shl(zero_e, 21), shl(lane_is(e, 1), 22))));
    for (int i = 0; i < 8; ++i) w[i] = look_up16(VALUES_MXFP4, take_nibbles(b.word(i & 3), i >> 2));
  }
  AI static V lane_is(V e, int value) { return and_(equal8(e, set(uint32_t(value))), set(1)); }  // for lanes below 256
};

struct DTQ2_0 : DecoderDefaults {
  KTX_FORMAT(TQ2_0, 256, 32, false, 1, false, 3)
  typedef F BlockScales;
  AI static BlockScales load_scales(const Block& b) { return load_f16(b.narrow0); }
  AI static void decode_sub_block(const BlockScales& d, const Block& b, int s, V* w, F& scale, F&) {
    scale = d;
    for (int i = 0; i < 8; ++i) w[i] = and_(shr(b.word(s / 4 * 8 + i), s % 4 * 2), set8(3));
  }
};

// ---- ternary digits (TQ1_0 and IQ1) --------------------------------------------------------------------------------

// A byte stores five digits to the base 3 as a fraction x/256: multiplying by 3^n (mod 256) brings digit n to the
// front, and multiplying that by 3 leaves the digit above the byte. Bytes are multiplied in 16 bits: the even and the
// odd bytes of a vector apart.

// The powers of 3, in both 16-bit halves of a word.
static const uint32_t POWERS_OF_3[5] = {0x00010001, 0x00030003, 0x00090009, 0x001b001b, 0x00510051};
AI V low_bytes(V x) { return and_(x, set(0x00ff00ff)); }
static constexpr uint32_t ODD_BYTES = 0xff00ff00;
// Digit n of each byte.
AI V take_trit(V x, int n) {
  const V power = set(POWERS_OF_3[n]), three = set(POWERS_OF_3[1]);
  const V even = mul16(low_bytes(mul16(low_bytes(x), power)), three),
          odd = mul16(low_bytes(mul16(shr16(x, 8), power)), three);
  return with_bits(shr16(even, 8), odd, set(ODD_BYTES));
}
// IQ1 needs digits times eight, because its codes are in eighths (see below). With VBMI digits come from tables of all
// 256 bytes, else from multiplication.
#ifdef KTX_VBMI
// 8 * digit n from a byte that holds four digits of two bits each.
AI V take_digit(V first_four, int n) {
  return and_(n < 2 ? shl(first_four, 3 - 2 * n) : shr(first_four, 2 * n - 3), set8(24));
}
// w[i] = 8 * ternary digit FIRST_DIGIT + i of each byte. The table TRITS.fifth has the fifth digit times 8 already.
template <int FIRST_DIGIT, int COUNT> AI void decode_trits(V bytes, V* w) {
  const TableIndices<256> indices(bytes, bytes);
  const V first_four = FIRST_DIGIT < 4 ? indices.select_from(TRITS.first_four) : bytes;
#pragma GCC unroll 5
  for (int i = 0; i < COUNT; ++i)
    w[i] = FIRST_DIGIT + i < 4 ? take_digit(first_four, FIRST_DIGIT + i) : indices.select_from(TRITS.fifth);
}
// 8 * ternary digit n, one of the first four, of each byte.
AI V decode_trit(V bytes, int n) {
  return take_digit(TableIndices<256>(bytes, bytes).select_from(TRITS.first_four), n);
}
#else
// w[i] = ternary digit FIRST_DIGIT + i of each byte, times 8 because IQ1's codes are in eighths; without tables: times
// 3^FIRST_DIGIT brings that digit to the front, and each further multiplication by 3 carries the next digit above the
// byte. Even and odd bytes apart, in 16 bits.
template <int FIRST_DIGIT, int COUNT> AI void decode_trits(V bytes, V* w) {
  const V power = set(POWERS_OF_3[FIRST_DIGIT]), three = set(POWERS_OF_3[1]);
  V even = low_bytes(bytes), odd = shr16(bytes, 8);
  if (FIRST_DIGIT) even = low_bytes(mul16(even, power)), odd = low_bytes(mul16(odd, power));
#pragma GCC unroll 5
  for (int i = 0; i < COUNT; ++i) {
    if (i) even = low_bytes(even), odd = low_bytes(odd);
    even = mul16(even, three), odd = mul16(odd, three);
    w[i] = shl(with_bits(shr16(even, 8), odd, set(ODD_BYTES)), /* times 8 */ 3);
  }
}
// 8 * ternary digit n, one of the first four, of each byte.
AI V decode_trit(V bytes, int n) { return shl(take_trit(bytes, n), 3); }
#endif

struct DTQ1_0 : DecoderDefaults {  // words: 12 of five trits a byte, 1 of four trits a byte
  KTX_FORMAT(TQ1_0, 256, 16, false, 1, false, 2)
  typedef F BlockScales;
  AI static BlockScales load_scales(const Block& b) { return load_f16(b.narrow0); }
  // Decodes sub-block s, 16 columns, to ternary digits (weight + 1), in the order in which ggml packs five in a byte:
  // digit s / 2 of four of the words 0 to 7, then digit s - 10 of words 8 to 11; the last sub-block has the four digits
  // of word 12.
  AI static void decode_sub_block(const BlockScales& d, const Block& b, int s, V* w, F& scale, F&) {
    scale = d;
    if (s < 10)
      for (int i = 0; i < 4; ++i) w[i] = take_trit(b.word(s % 2 * 4 + i), s / 2);
    else if (s < 15)
      for (int i = 0; i < 4; ++i) w[i] = take_trit(b.word(8 + i), s - 10);
    else
      for (int i = 0; i < 4; ++i) w[i] = take_trit(b.word(12), i);
  }
};

// The scale of IQ2 and IQ3: d * (0.5 + nibble) * factor.
AI F scale_from_half_steps(F d, V nibble, float factor) {
  return mulf(mulf(d, addf(setf(0.5f), to_float(nibble))), setf(factor));
}

// ---- code books (IQ2 and IQ3) --------------------------------------------------------------------------------------

// An index selects a 16-bit entry, which holds a field for each of its weights: the index of the weight's magnitude in
// a table of values (iq_codebooks.h). An IQ2 entry is an octet: eight weights, fields of two bits. An IQ3 entry is a
// quad: four weights, fields of four bits. Signs are stored apart. Packing puts the bytes of four indices in the order
// 0 2 1 3, and the signs of four weights of 16 rows into 64 bits (quant/layout.cpp).

// look_up_entries<B, STRIDE>(low, more): looks up four entries per row in code book B. `low`: the low bytes of the
//     indices; `more`: their missing high bits, those of index i from bit STRIDE*i on.
// fields_of_octet(e, i, second): the fields of the first (or second) four weights of octet i, a byte each.
// fields_of_quad(e, i): the fields of quad i, a byte each.
// Bits above a field are left in; the tables of values repeat for that.
#ifdef KTX_VBMI
struct Entries {
  V first, second;
};  // bytes in the order of the indices
#define KTX_BOOK(name, entries)                                                    \
  struct B##name {                                                                 \
    static constexpr int N = entries;                                              \
    static constexpr const uint8_t *FIRST = FIRST_##name, *SECOND = SECOND_##name; \
  }
// With VBMI the two bytes of an entry come from a table each.
template <class B, int STRIDE> AI Entries look_up_entries(V low, V more) {
  const TableIndices<B::N> indices(low, spread_bits<STRIDE>(more));
  return {indices.select_from(B::FIRST), indices.select_from(B::SECOND)};
}
AI V fields_of_octet(const Entries& e, int entry, int second) {
  return two_bit_fields(second ? e.second : e.first, entry);
}
AI V fields_of_quad(const Entries& e, int entry) { return four_bit_fields(e.first, e.second, entry); }
#else
struct Entries {
  V pair[2];
};  // entries 0 and 1, 2 and 3
#define KTX_BOOK(name, entries)                           \
  struct B##name {                                        \
    static constexpr int N = entries;                     \
    static constexpr const uint16_t* TABLE = GRID_##name; \
  }
// A shift to the left, or to the right if LEFT is negative.
template <int LEFT>
AI V shift_left(V x) {
  return LEFT >= 0 ? shl(x, LEFT >= 0 ? LEFT : 0) : shr(x, LEFT >= 0 ? 0 : -LEFT);
}
// Looks up four entries per row in code book B (see above). Without VBMI a look-up takes two 16-bit indices per lane:
// `first` has indices 0 and 1 (bytes 0 and 2 of a lane, because packing puts the four in the order 0 2 1 3), `second`
// has indices 2 and 3. Their missing high bits, from `more`, are moved to bits 8 and 24.
template <class B, int STRIDE> AI Entries look_up_entries(V low, V more) {
  constexpr uint32_t BITS = B::N / 256 - 1;  // mask of an index's bits that its low byte lacks
  V first = and_(low, set(0x00ff00ff)), second = and_(shr16(low, 8), set(0x00ff00ff));
  if (BITS) {
    first = or_(first,
        or_(and_(shift_left<8>(more), set(BITS << 8)), and_(shift_left<24 - STRIDE>(more), set(BITS << 24))));
    second = or_(second,
        or_(and_(shift_left<8 - 2 * STRIDE>(more), set(BITS << 8)),
            and_(shift_left<24 - 3 * STRIDE>(more), set(BITS << 24))));
  }
  return {{lookup<B::N>(B::TABLE, first), lookup<B::N>(B::TABLE, second)}};
}
AI V entry_in_both_halves(const Entries& e, int entry) {
  return entry % 2 ? high_words(e.pair[entry / 2]) : low_words(e.pair[entry / 2]);
}
AI V fields_of_octet(const Entries& e, int entry, int second) {
  return second ? shr16_each<4, 6>(entry_in_both_halves(e, entry)) : shr16_each<0, 2>(entry_in_both_halves(e, entry));
}
AI V fields_of_quad(const Entries& e, int entry) { return shr16_each<0, 4>(entry_in_both_halves(e, entry)); }
#endif
KTX_BOOK(IQ2_XXS, 256);
KTX_BOOK(IQ2_XS, 512);
KTX_BOOK(IQ2_S, 1024);
KTX_BOOK(IQ3_XXS, 256);
KTX_BOOK(IQ3_S, 512);

// The signs of vector `vector` of codes as a mask: bit 4*lane + byte is set for a negative weight (transpose_signs in
// quant/layout.cpp).
AI uint64_t load_sign_mask(const uint8_t* sign_words, int vector) {
  uint64_t m;
  __builtin_memcpy(&m, sign_words + 8 * vector, 8);
  return m;
}
// Returns the eight signs of an octet of which seven are stored: the number of negative weights is even, so the eighth
// sign is the parity of the others. The bit in its place belongs to a scale or an index and is returned in `spare`, one
// bit for each row (spread_signs in quant/layout.cpp).
struct Signs {
  uint64_t first, second, spare;
};  // masks of the first and second four weights
AI Signs load_even_signs(const uint8_t* sign_words, int octet) {
  constexpr uint64_t LOW = 0x1111111111111111ull;  // bit 0 of each row's four
  const uint64_t first = load_sign_mask(sign_words, 2 * octet), stored = load_sign_mask(sign_words, 2 * octet + 1),
                 second = stored & ~(LOW << 3);
  uint64_t parity = first ^ second;  // of each row's signs, in bit 0 of its four
  parity ^= parity >> 1, parity ^= parity >> 2;
  return {first, second | (parity & LOW) << 3, stored >> 3 & LOW};
}

// Tables repeat, so that bits above a field are ignored.
static const int8_t VALUES_IQ2[16] = {offset_code(8), offset_code(25), offset_code(43), 0, offset_code(8),
    offset_code(25), offset_code(43), 0, offset_code(8), offset_code(25), offset_code(43), 0, offset_code(8),
    offset_code(25), offset_code(43), 0};
static const int8_t VALUES_IQ3_XXS[16] = {offset_code(4), offset_code(12), offset_code(20), offset_code(28),
    offset_code(36), offset_code(44), offset_code(52), offset_code(62), offset_code(4), offset_code(12),
    offset_code(20), offset_code(28), offset_code(36), offset_code(44), offset_code(52), offset_code(62)};
static const int8_t VALUES_IQ3_S[16] = {offset_code(1), offset_code(3), offset_code(5), offset_code(7), offset_code(9),
    offset_code(11), offset_code(13), offset_code(15), offset_code(1), offset_code(3), offset_code(5), offset_code(7),
    offset_code(9), offset_code(11), offset_code(13), offset_code(15)};

// Decodes four weights: half of octet `entry` of IQ2, or quad `entry` of IQ3. `minus`: mask of the negative ones.
AI V decode_octet_half(const Entries& e, int entry, int second, uint64_t minus) {
  return negate_where(look_up_repeated<3>(VALUES_IQ2, fields_of_octet(e, entry, second)), minus);
}
AI V decode_quad(const int8_t* values, const Entries& e, int entry, uint64_t minus) {
  return negate_where(look_up_repeated<7>(values, fields_of_quad(e, entry)), minus);
}

struct DIQ2_XXS : OffsetDecoder {  // words: per 32 k, four grid indices, then signs; the spare bits are a scale
  KTX_FORMAT(IQ2_XXS, 256, 32, true, 0, false, 43)
  typedef F BlockScales;
  AI static BlockScales load_scales(const Block& b) { return load_f16(b.narrow0); }
  // Decodes sub-block s, 32 columns: looks up four octets (code book entries of eight weights) and applies their signs.
  // Word 2s has the four indices, word 2s + 1 the signs, whose four spare bits are the scale.
  AI static void decode_sub_block(const BlockScales& d, const Block& b, int s, V* w, F& scale, F&) {
    const Entries e = look_up_entries<BIQ2_XXS, 0>(b.word(2 * s), set(0));
    uint64_t scale_bits = 0;
    for (int i = 0; i < 4; ++i) {
      const Signs signs = load_even_signs(b.words + 64 * (2 * s + 1), i);
      scale_bits |= signs.spare << i;
      w[2 * i] = decode_octet_half(e, i, 0, signs.first), w[2 * i + 1] = decode_octet_half(e, i, 1, signs.second);
    }
    scale = scale_from_half_steps(d, nibble_lanes(scale_bits), 0.25f);
  }
};

// words: per 32 k, four low index bytes, then signs; the spare bits are the ninth of the indices; 2 of scales.
struct DIQ2_XS : OffsetPairDecoder {
  KTX_FORMAT(IQ2_XS, 256, 16, true, 0, false, 43)
  typedef F BlockScales;
  AI static BlockScales load_scales(const Block& b) { return load_f16(b.narrow0); }
  // Decodes unit u, a pair of sub-blocks of 16 columns: w[0..3] and scale[0] are the first, w[4..7] and scale[1] the
  // second. Looks up four octets (code book entries of eight weights) and applies their signs. Word 2u has four low
  // index bytes, word 2u + 1 the signs with the ninth index bits, byte u % 4 of word 16 + u / 4 the two scales.
  AI static void decode_pair(const BlockScales& d, const Block& b, int u, V* w, F* scale) {
    const V scale_bits = shr(b.word(16 + u / 4), u % 4 * 8);
    scale[0] = scale_from_half_steps(d, and_(scale_bits, set(15)), 0.25f),
    scale[1] = scale_from_half_steps(d, and_(shr(scale_bits, 4), set(15)), 0.25f);
    Signs signs[4];
    uint64_t ninth_index_bits = 0;
    for (int i = 0; i < 4; ++i) {
      signs[i] = load_even_signs(b.words + 64 * (2 * u + 1), i);
      ninth_index_bits |= signs[i].spare << i;
    }
    const Entries e = look_up_entries<BIQ2_XS, 1>(b.word(2 * u), nibble_lanes(ninth_index_bits));
    for (int i = 0; i < 4; ++i)
      w[2 * i] = decode_octet_half(e, i, 0, signs[i].first), w[2 * i + 1] = decode_octet_half(e, i, 1, signs[i].second);
  }
};

struct DIQ2_S : OffsetPairDecoder {  // words: 8 of low index bytes, 8 of signs, 2 of high index bits, 2 of scales
  KTX_FORMAT(IQ2_S, 256, 16, true, 0, false, 43)
  typedef F BlockScales;
  AI static BlockScales load_scales(const Block& b) { return load_f16(b.narrow0); }
  // Decodes unit u, a pair of sub-blocks of 16 columns: w[0..3] and scale[0] are the first, w[4..7] and scale[1] the
  // second. Looks up four octets (code book entries of eight weights) and applies their signs. Word u has four low
  // index bytes, word 8 + u the signs, byte u % 4 of word 16 + u / 4 the high index bits, byte u % 4 of word 18 + u / 4
  // the two scales.
  AI static void decode_pair(const BlockScales& d, const Block& b, int u, V* w, F* scale) {
    const V scale_bits = shr(b.word(18 + u / 4), u % 4 * 8);
    scale[0] = scale_from_half_steps(d, and_(scale_bits, set(15)), 0.25f),
    scale[1] = scale_from_half_steps(d, and_(shr(scale_bits, 4), set(15)), 0.25f);
    const Entries e = look_up_entries<BIQ2_S, 2>(b.word(u), shr(b.word(16 + u / 4), u % 4 * 8));
    for (int v = 0; v < 8; ++v) w[v] = decode_octet_half(e, v / 2, v % 2, load_sign_mask(b.words + 64 * (8 + u), v));
  }
};

struct DIQ3_XXS : OffsetDecoder {  // words: 16 of grid indices, 8 of signs whose spare bits are a scale
  KTX_FORMAT(IQ3_XXS, 256, 32, true, 0, false, 62)
  typedef F BlockScales;
  AI static BlockScales load_scales(const Block& b) { return load_f16(b.narrow0); }
  // Decodes sub-block s, 32 columns: looks up eight quads (code book entries of four weights) and applies their signs.
  // Words 2s and 2s + 1 have the eight indices, word 16 + s the signs, whose four spare bits are the scale.
  AI static void decode_sub_block(const BlockScales& d, const Block& b, int s, V* w, F& scale, F&) {
    uint64_t scale_bits = 0;
    for (int half = 0; half < 2; ++half) {
      const Entries e = look_up_entries<BIQ3_XXS, 0>(b.word(2 * s + half), set(0));
      for (int i = 0; i < 4; i += 2) {
        const Signs signs = load_even_signs(b.words + 64 * (16 + s), 2 * half + i / 2);
        scale_bits |= signs.spare << (2 * half + i / 2);
        w[4 * half + i] = decode_quad(VALUES_IQ3_XXS, e, i, signs.first);
        w[4 * half + i + 1] = decode_quad(VALUES_IQ3_XXS, e, i + 1, signs.second);
      }
    }
    scale = scale_from_half_steps(d, nibble_lanes(scale_bits), 0.5f);
  }
};

struct DIQ3_S : OffsetDecoder {  // words: 16 of low index bytes, 8 of signs, 2 of ninth index bits, 1 of scales
  KTX_FORMAT(IQ3_S, 256, 32, true, 0, false, 15)
  typedef F BlockScales;
  AI static BlockScales load_scales(const Block& b) { return load_f16(b.narrow0); }
  // Decodes sub-block s, 32 columns: looks up eight quads (code book entries of four weights) and applies their signs.
  // Words 2s and 2s + 1 have eight low index bytes, word 16 + s the signs, byte s % 4 of word 24 + s / 4 the ninth
  // index bits, nibble s of word 26 the scale, as (scale - 1) / 2.
  AI static void decode_sub_block(const BlockScales& d, const Block& b, int s, V* w, F& scale, F&) {
    const V nibble = and_(shr(b.word(26), 4 * s), set(15));
    scale = mulf(d, to_float(add(shl(nibble, 1), set(1))));
    const V ninth_index_bits = shr(b.word(24 + s / 4), s % 4 * 8);
    for (int half = 0; half < 2; ++half) {
      const Entries e = look_up_entries<BIQ3_S, 1>(b.word(2 * s + half), shr(ninth_index_bits, 4 * half));
      for (int i = 0; i < 4; ++i)
        w[4 * half + i] = decode_quad(VALUES_IQ3_S, e, i, load_sign_mask(b.words + 64 * (16 + s), 4 * half + i));
    }
  }
};

// ---- IQ1 -----------------------------------------------------------------------------------------------------------

// A weight is d * (2 * scale + 1) * (digit - 1 + delta), delta = +-1/8; codes are in eighths, 8 * digit - 8 +- 1.
// Packing expands the code book entries to digits (expand_iq1_indices in quant/layout.cpp).

// Decodes the ternary digits of unit u (32 columns), times eight: w has a vector for every four columns. A pair of
// units has 16 such vectors: 15 are in three words of five digits a byte, the sixteenth is in word 12 (pack_digits in
// quant/layout.cpp).
AI void decode_iq1_digits(const Block& b, int u, V* w) {
  const int pair = u / 2;
  if (u % 2) {
    decode_trits<3, 2>(b.word(3 * pair + 1), w), decode_trits<0, 5>(b.word(3 * pair + 2), w + 2);
    w[7] = decode_trit(b.word(12), pair);
  } else {
    decode_trits<0, 5>(b.word(3 * pair), w), decode_trits<0, 3>(b.word(3 * pair + 1), w + 5);
  }
}
// The scale of IQ1, for codes in eighths: d * (2 * bits + 1) / 8.
AI F scale_from_odd_steps(F d, V bits) {
  return mulf(mulf(d, to_float(or_(shl(and_(bits, set(7)), 1), set(1)))), setf(0.125f));
}
// What turns 8 * digit into a code: -8 + 1 or, if the sign of delta is set, -8 - 1.
AI V iq1_offset(V sign) { return sub8(set8(offset_code(-7)), and_(sub(set(0), and_(sign, set(1))), set8(2))); }

struct DIQ1_S : OffsetDecoder {  // words: 13 of digits, 1 of (scale, sign of delta) nibbles
  KTX_FORMAT(IQ1_S, 256, 32, true, 0, false, 9)
  typedef F BlockScales;
  AI static BlockScales load_scales(const Block& b) { return load_f16(b.narrow0); }
  // Decodes sub-block s, 32 columns: digits plus an offset. Nibble s of word 13 is the scale, below the sign of delta.
  AI static void decode_sub_block(const BlockScales& d, const Block& b, int s, V* w, F& scale, F&) {
    const V nibble = shr(b.word(13), 4 * s), offset = iq1_offset(shr(nibble, 3));
    scale = scale_from_odd_steps(d, nibble);
    decode_iq1_digits(b, s, w);
    for (int i = 0; i < 8; ++i) w[i] = add8(w[i], offset);
  }
};

// words: 13 of digits, 1 of signs of delta, one for eight weights, 2 of scales that carry d in their top nibbles.
struct DIQ1_M : OffsetPairDecoder {
  KTX_FORMAT(IQ1_M, 256, 16, true, 0, false, 9)
  typedef F BlockScales;
  // Returns d, an f16 whose four nibbles are the top nibbles of the four 16-bit scale words.
  AI static BlockScales load_scales(const Block& b) {
    const V s0 = b.word(14), s1 = b.word(15);
    const V low = or_(and_(shr(s0, 12), set(0x000f)), and_(shr(s0, 24), set(0x00f0)));
    return f16_lanes(or_(low, or_(and_(shr(s1, 4), set(0x0f00)), and_(shr(s1, 16), set(0xf000)))));
  }
  // Decodes unit u, a pair of sub-blocks of 16 columns: w[0..3] and scale[0] are the first, w[4..7] and scale[1] the
  // second. Codes are digits (decode_iq1_digits) plus the offset that the sign of delta selects. Nibble u of word 13
  // has the signs of delta of four times eight columns; word 14 or 15 has the two scales of three bits.
  AI static void decode_pair(const BlockScales& d, const Block& b, int u, V* w, F* scale) {
    const V scale_bits = shr(b.word(14 + u / 4), u / 2 % 2 * 16 + u % 2 * 6), signs = shr(b.word(13), 4 * u);
    scale[0] = scale_from_odd_steps(d, scale_bits), scale[1] = scale_from_odd_steps(d, shr(scale_bits, 3));
    decode_iq1_digits(b, u, w);
    for (int i = 0; i < 8; i += 2) {
      const V offset = iq1_offset(shr(signs, i / 2));
      w[i] = add8(w[i], offset), w[i + 1] = add8(w[i + 1], offset);
    }
  }
};
