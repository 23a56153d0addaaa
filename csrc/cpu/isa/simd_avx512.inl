// The SIMD primitives (see simd_scalar.inl, their specification) on sixteen 32-bit lanes in one zmm register. Included
// inside a region whose target has AVX512 F, BW, DQ, VL and VNNI; with KTX_VBMI also VBMI, with KTX_BF16 also BF16.
typedef __m512i V;  // 16 lanes of 32 bits, or 64 bytes
typedef __m512 F;   // 16 floats

AI V load(const void* p) { return _mm512_loadu_si512(p); }
AI void store(void* p, V v) { _mm512_storeu_si512(p, v); }
AI V set(uint32_t x) { return _mm512_set1_epi32(int(x)); }
AI V set8(int x) { return _mm512_set1_epi8(char(x)); }
AI V broadcast(const void* p) {  // asm: GCC would fold it into the dot product, which costs two issue slots then
  V v;
  __asm__("vpbroadcastd %1, %0" : "=v"(v) : "m"(*static_cast<const int*>(p)));
  return v;
}
AI V and_(V a, V b) { return _mm512_and_si512(a, b); }
AI V or_(V a, V b) { return _mm512_or_si512(a, b); }
AI V xor_(V a, V b) { return _mm512_xor_si512(a, b); }
AI V shr(V a, int n) { return _mm512_srli_epi32(a, unsigned(n)); }
AI V shl(V a, int n) { return _mm512_slli_epi32(a, unsigned(n)); }
AI V shr16(V a, int n) { return _mm512_srli_epi16(a, unsigned(n)); }
AI V add(V a, V b) { return _mm512_add_epi32(a, b); }
AI V sub(V a, V b) { return _mm512_sub_epi32(a, b); }
AI V maxu(V a, V b) { return _mm512_max_epu32(a, b); }
AI V mul(V a, V b) { return _mm512_mullo_epi32(a, b); }
AI V mul16(V a, V b) { return _mm512_mullo_epi16(a, b); }
AI V sub8(V a, V b) { return _mm512_sub_epi8(a, b); }
AI V add8(V a, V b) { return _mm512_add_epi8(a, b); }
AI V equal8(V a, V b) { return _mm512_movm_epi8(_mm512_cmpeq_epi8_mask(a, b)); }
AI V with_bits(V a, V b, V mask) { return _mm512_ternarylogic_epi32(a, b, mask, 0xf8); }  // a | b & mask
AI V look_up16(const int8_t* table, V index) {                                            // index: bytes 0..15
  return _mm512_shuffle_epi8(_mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(table))), index);
}
AI V low_words(V a) {  // both 16-bit halves of a lane become its lower one
  return _mm512_shuffle_epi8(a,
      _mm512_broadcast_i32x4(_mm_setr_epi8(0, 1, 0, 1, 4, 5, 4, 5, 8, 9, 8, 9, 12, 13, 12, 13)));
}
AI V high_words(V a) {
  return _mm512_shuffle_epi8(a,
      _mm512_broadcast_i32x4(_mm_setr_epi8(2, 3, 2, 3, 6, 7, 6, 7, 10, 11, 10, 11, 14, 15, 14, 15)));
}
template <int LOW, int HIGH> AI V shr16_each(V a) { return _mm512_srlv_epi16(a, _mm512_set1_epi32(LOW | HIGH << 16)); }
// table[index] of the 32 16-bit indices. Permutations of registers: a gather costs more than twenty cycles.
template <int N> AI V lookup(const uint16_t* table, V index) {
  if constexpr (N == 64) return _mm512_permutex2var_epi16(load(table), index, load(table + 32));
  else
    return _mm512_mask_mov_epi16(lookup<N / 2>(table, index), _mm512_test_epi16_mask(index, _mm512_set1_epi16(N / 2)),
        lookup<N / 2>(table + N / 2, index));
}
#ifdef KTX_VBMI
// Look-ups in byte tables (code books of dequant.inl): one permutation looks 64 indices up in 128 entries. Packing puts
// the four indices of a lane in the order 0 2 1 3.

// Moves the high bits of index i, which are from bit STRIDE*i on in each lane, to the bottom of the byte of that index.
template <int STRIDE> AI V spread_bits(V more) {
  constexpr long long LANE = 0 | 2 * STRIDE << 8 | 1 * STRIDE << 16 | 3 * STRIDE << 24, NEXT = LANE | 0x20202020;
  return _mm512_multishift_epi64_epi8(_mm512_set1_epi64(LANE | NEXT << 32), more);
}
// Looks 64 indices up in N entries: in both halves of the table, of which the next higher index bit selects one.
template <int N> AI V permute(const uint8_t* table, V index, const __mmask64* bits) {
  if constexpr (N == 128) return _mm512_permutex2var_epi8(load(table), index, load(table + 64));
  else
    return _mm512_mask_mov_epi8(permute<N / 2>(table, index, bits), bits[__builtin_ctz(N) - 8],
        permute<N / 2>(table + N / 2, index, bits));
}
// 64 indices into tables of N entries: their low bytes, and bits 7 and up as masks, computed once for several tables.
template <int N> struct TableIndices {
  V low;
  __mmask64 bits[4];
  AI TableIndices(V low, V more) : low(low), bits{_mm512_movepi8_mask(low)} {
    if constexpr (N > 256) bits[1] = _mm512_test_epi8_mask(more, set8(1));
    if constexpr (N > 512) bits[2] = _mm512_test_epi8_mask(more, set8(2));
    if constexpr (N > 1024) bits[3] = _mm512_test_epi8_mask(more, set8(4));
  }
  AI V select_from(const uint8_t* table) const { return permute<N>(table, low, bits); }
};
// Tables of the ternary digits of a byte (see take_trit in dequant.inl): the first four in two bits each, and eight
// times the fifth. Each multiplication by 3 carries the next digit above the byte.
struct Trits {
  alignas(64) uint8_t first_four[256], fifth[256];
  constexpr Trits() : first_four{}, fifth{} {
    for (int byte = 0; byte < 256; ++byte) {
      int x = byte;  // the digits from n on, as a fraction of 256
      for (int n = 0; n < 5; ++n, x &= 255) {
        x *= 3;
        if (n < 4) first_four[byte] = uint8_t(first_four[byte] | (x >> 8) << (2 * n));
        else fifth[byte] = uint8_t(x >> 8 << 3);
      }
    }
  }
};
constexpr Trits TRITS;
constexpr int ENTRY_BIT_OFFSETS[4] = {0, 16, 8, 24};  // where the byte of an entry begins in a lane: order 0 2 1 3
// Spreads the four two-bit fields of the byte of an entry, each to the bottom of a byte. Bits above a field are left
// in.
AI V two_bit_fields(V bytes, int entry) {
  const long long lane = ENTRY_BIT_OFFSETS[entry] * 0x01010101ll + 0x06040200ll;
  return _mm512_multishift_epi64_epi8(_mm512_set1_epi64(lane | (lane + 0x20202020ll) << 32), bytes);
}
// Spreads four four-bit fields of an entry: two from its byte in `first`, two from that in `second`.
AI V four_bit_fields(V first, V second, int entry) {
  const long long lane = ENTRY_BIT_OFFSETS[entry] * 0x01010101ll + 0x04000400ll;
  const V by = _mm512_set1_epi64(lane | (lane + 0x20202020ll) << 32);
  return _mm512_mask_multishift_epi64_epi8(_mm512_multishift_epi64_epi8(by, first), 0xccccccccccccccccull, by, second);
}
#endif
AI V negate_where(V w, uint64_t mask) {  // where the mask's bit 4*lane + byte is set; also of weights with 128 added
  return _mm512_mask_sub_epi8(w, mask, _mm512_setzero_si512(), w);
}
// table[x & LOW] of each byte; the table repeats after LOW + 1.
template <int LOW> AI V look_up_repeated(const int8_t* table, V x) {
#ifdef KTX_VBMI
  return _mm512_permutexvar_epi8(x, _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(table))));
#else
  return look_up16(table, and_(x, set8(LOW)));
#endif
}
AI V nibble_lanes(uint64_t nibbles) {  // nibble i in lane i
  const __m128i both = _mm_cvtsi64_si128(int64_t(nibbles));
  const __m128i bytes = _mm_and_si128(_mm_unpacklo_epi8(both, _mm_srli_epi64(both, 4)), _mm_set1_epi8(15));
  return _mm512_cvtepu8_epi32(bytes);
}
AI V load_u8(const uint8_t* p) { return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
// A mask as a number. By hand, because GCC 12 may spill the 16 bits of one and read 32 back.
AI uint32_t bits_of(__mmask16 mask) {
  uint32_t bits;
  __asm__("kmovw %1, %0" : "=r"(bits) : "k"(mask));
  return bits;
}
// 16 int8, one a lane
AI V load_s8(const uint8_t* p) { return _mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
AI V load_u16(const uint8_t* p) {
  return _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
AI V sign_extend8(V a) { return _mm512_srai_epi32(_mm512_slli_epi32(a, 24), 24); }

AI F zero() { return _mm512_setzero_ps(); }
AI F setf(float x) { return _mm512_set1_ps(x); }
AI F loadf(const float* p) { return _mm512_loadu_ps(p); }
AI void storef(float* p, F v) { _mm512_storeu_ps(p, v); }
AI F broadcastf(const float* p) { return _mm512_set1_ps(*p); }
AI F addf(F a, F b) { return _mm512_add_ps(a, b); }
AI F mulf(F a, F b) { return _mm512_mul_ps(a, b); }
AI F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }    // a*b + c
AI F fnma(F a, F b, F c) { return _mm512_fnmadd_ps(a, b, c); }  // c - a*b
AI F divf(F a, F b) { return _mm512_div_ps(a, b); }
AI F minf(F a, F b) { return _mm512_min_ps(a, b); }
AI F maxf(F a, F b) { return _mm512_max_ps(a, b); }
AI F absf(F a) { return _mm512_abs_ps(a); }
AI uint32_t largest_lane(V a) { return _mm512_reduce_max_epu32(a); }
AI int32_t sum_lanes(V a) { return _mm512_reduce_add_epi32(a); }
AI float sum_lanes(F a) {
  a = _mm512_add_ps(a, _mm512_shuffle_f32x4(a, a, 0x4e));
  a = _mm512_add_ps(a, _mm512_shuffle_f32x4(a, a, 0xb1));
  __m128 h = _mm512_castps512_ps128(a);
  h = _mm_add_ps(h, _mm_movehl_ps(h, h));
  return _mm_cvtss_f32(_mm_add_ss(h, _mm_shuffle_ps(h, h, 1)));
}
AI F to_float(V a) { return _mm512_cvtepi32_ps(a); }
AI V to_int(F a) { return _mm512_cvtps_epi32(a); }  // rounds to nearest
AI F as_float(V a) { return _mm512_castsi512_ps(a); }
AI V as_int(F a) { return _mm512_castps_si512(a); }
AI F load_f16(const void* p) { return _mm512_cvtph_ps(_mm256_loadu_si256(static_cast<const __m256i*>(p))); }
AI void load_e4m3(const uint8_t* p, F& a, F& b) {  // 2^-8 of the values, see simd_scalar.inl
  const __m512i x = _mm512_slli_epi16(_mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))), 8);
  const __m512i h = _mm512_and_si512(_mm512_srai_epi16(x, 1), _mm512_set1_epi16(int16_t(0xbfff)));
  a = _mm512_cvtph_ps(_mm512_castsi512_si256(h)), b = _mm512_cvtph_ps(_mm512_extracti64x4_epi64(h, 1));
}
AI F f16_lanes(V a) { return _mm512_cvtph_ps(_mm512_cvtepi32_epi16(a)); }  // low halves of the lanes
AI void store_f16(void* p, F a) { _mm256_storeu_si256(static_cast<__m256i*>(p), _mm512_cvtps_ph(a, 0)); }
AI void store_bf16(void* p, F a) {  // rounds to nearest even, keeps NaN
  const V bits = as_int(a), rounded = add(bits, add(set(0x7fff), and_(shr(bits, 16), set(1))));
  const V with_nan = _mm512_mask_mov_epi32(rounded, _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q), or_(bits, set(0x400000)));
  _mm256_storeu_si256(static_cast<__m256i*>(p), _mm512_cvtepi32_epi16(shr(with_nan, 16)));
}
AI void store_s8(int8_t* p, V a) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(a)); }

// Dot product of four bytes per lane. Signed weights have 128 added (see `with_offset`), so one instruction serves
// both.
AI V dot(V acc, V weights, V x) {
  __asm__("vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(weights), "v"(x));
  return acc;
}
constexpr int SIGNED_OFFSET = 128;
AI V with_offset(V weights) { return _mm512_xor_si512(weights, _mm512_set1_epi8(char(0x80))); }
template <bool SIGNED> AI V dot(V acc, V weights, V x) { return dot(acc, weights, x); }
#ifdef KTX_BF16
// Pairs of bf16: one instruction multiplies both and adds them to an f32 lane.
typedef __m512bh Pairs;
AI F dot_pairs(F acc, const void* word, Pairs b) { return _mm512_dpbf16_ps(acc, (Pairs)broadcast(word), b); }
AI Pairs load_pairs(const void* p) { return (Pairs)load(p); }
AI void store_pairs(void* p, Pairs v) { store(p, (V)v); }
// 32 columns, two a lane
AI V pair_neighbors_as_bf16(F first, F second) { return (V)_mm512_cvtne2ps_pbh(second, first); }
// Interleaves the 16-bit words of the lower and the upper 256 bits: columns one after the other become pairs.
AI V zip_halves(V halves) {
  return _mm512_permutexvar_epi16(_mm512_set_epi32(0x1f000f, 0x1e000e, 0x1d000d, 0x1c000c, 0x1b000b, 0x1a000a, 0x190009,
                                      0x180008, 0x170007, 0x160006, 0x150005, 0x140004, 0x130003, 0x120002, 0x110001,
                                      0x100000),
      halves);
}
AI V pair_as_bf16(F even, F odd) {  // bf16 of even in the lower, of odd in the upper halves
  return zip_halves(pair_neighbors_as_bf16(even, odd));
}
// Two columns of 16 bf16, one after the other
AI Pairs load_column_pairs(const void* p) { return (Pairs)zip_halves(load(p)); }

// The low and the high byte of the bf16 that are 2^-8 of e4m3 codes 0 to 127, for load_e4m3_pairs.
struct E4m3Bytes {
  alignas(64) uint8_t low[128], high[128];
  // Corrects the exponent's bias, 7 to 127, and subtracts 8 from it.
  constexpr E4m3Bytes() : low{}, high{} {
    for (int code = 0; code < 128; ++code) {
      const int exponent = code >> 3, mantissa = code & 7;
      uint32_t bits = uint32_t(exponent - 7 - 8 + 127) << 7 | uint32_t(mantissa) << 4;
      if (code == 127) bits = 0x7fc0;  // not a number
      else if (!exponent) {            // subnormal: mantissa * 2^-9
        int top = 2;
        while (top >= 0 && !(mantissa >> top & 1)) --top;
        bits = top < 0 ? 0 : uint32_t(top - 9 - 8 + 127) << 7 | (uint32_t(mantissa) << (7 - top) & 127);
      }
      low[code] = uint8_t(bits), high[code] = uint8_t(bits >> 8);
    }
  }
};
constexpr E4m3Bytes E4M3_BYTES;

// Loads four columns of 16 e4m3 codes as two vectors of bf16 pairs: looks up both bytes of a bf16 by the code's low
// seven bits (the instruction ignores the sign), then adds the sign. `order` puts the codes where the unpacking of
// bytes makes pairs of them. Pairs are 2^-8 of the values, as load_e4m3 returns them: load_float_scale multiplies the
// scales by SCALE_FACTOR.
AI void load_e4m3_pairs(const uint8_t* p, Pairs& a, Pairs& b) {
  const V order = _mm512_set_epi8(63, 47, 62, 46, 61, 45, 60, 44, 31, 15, 30, 14, 29, 13, 28, 12, 59, 43, 58, 42, 57,
      41, 56, 40, 27, 11, 26, 10, 25, 9, 24, 8, 55, 39, 54, 38, 53, 37, 52, 36, 23, 7, 22, 6, 21, 5, 20, 4, 51, 35, 50,
      34, 49, 33, 48, 32, 19, 3, 18, 2, 17, 1, 16, 0);
  const V codes = _mm512_permutexvar_epi8(order, load(p));
  const V low = _mm512_permutex2var_epi8(load(E4M3_BYTES.low), codes, load(E4M3_BYTES.low + 64));
  const V high = with_bits(_mm512_permutex2var_epi8(load(E4M3_BYTES.high), codes, load(E4M3_BYTES.high + 64)), codes,
      set8(0x80));
  a = (Pairs)_mm512_unpacklo_epi8(low, high), b = (Pairs)_mm512_unpackhi_epi8(low, high);
}
#endif
