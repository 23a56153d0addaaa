// The SIMD primitives (see simd_scalar.inl, their specification) on sixteen 32-bit lanes in two ymm registers. Included
// inside a region whose target has AVX2, FMA and F16C; with KTX_VNNI also AVX-VNNI or AVX512-VNNI.
// clang-format off
struct V { __m256i a, b; };
struct F { __m256 a, b; };
#define KTX_V1(name, op) AI V name(V x) { return {op(x.a), op(x.b)}; }
#define KTX_V2(name, op) AI V name(V x, V y) { return {op(x.a, y.a), op(x.b, y.b)}; }
#define KTX_F2(name, op) AI F name(F x, F y) { return {op(x.a, y.a), op(x.b, y.b)}; }
#define KTX_F3(name, op) AI F name(F x, F y, F z) { return {op(x.a, y.a, z.a), op(x.b, y.b, z.b)}; }
#define KTX_SHIFT(name, op) AI V name(V x, int n) { return {op(x.a, n), op(x.b, n)}; }
// clang-format on

AI V load(const void* p) {
  const __m256i* q = static_cast<const __m256i*>(p);
  return {_mm256_loadu_si256(q), _mm256_loadu_si256(q + 1)};
}
AI void store(void* p, V v) {
  __m256i* q = static_cast<__m256i*>(p);
  _mm256_storeu_si256(q, v.a), _mm256_storeu_si256(q + 1, v.b);
}
// clang-format off
AI V set(uint32_t x) { const __m256i v = _mm256_set1_epi32(int(x)); return {v, v}; }
AI V set8(int x) { const __m256i v = _mm256_set1_epi8(char(x)); return {v, v}; }
AI V broadcast(const void* p) { const __m256i v = _mm256_set1_epi32(*static_cast<const int*>(p)); return {v, v}; }
KTX_V2(and_, _mm256_and_si256)
KTX_V2(or_, _mm256_or_si256)
KTX_V2(xor_, _mm256_xor_si256)
KTX_SHIFT(shr, _mm256_srli_epi32)
KTX_SHIFT(shl, _mm256_slli_epi32)
KTX_SHIFT(shr16, _mm256_srli_epi16)
KTX_V2(add, _mm256_add_epi32)
KTX_V2(sub, _mm256_sub_epi32)
KTX_V2(maxu, _mm256_max_epu32)
KTX_V2(mul, _mm256_mullo_epi32)
KTX_V2(mul16, _mm256_mullo_epi16)
KTX_V2(sub8, _mm256_sub_epi8)
KTX_V2(add8, _mm256_add_epi8)
KTX_V2(equal8, _mm256_cmpeq_epi8)
AI V with_bits(V a, V b, V mask) { return or_(a, and_(b, mask)); }
// clang-format on
AI V look_up16(const int8_t* table, V index) {
  const __m256i t = _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(table)));
  return {_mm256_shuffle_epi8(t, index.a), _mm256_shuffle_epi8(t, index.b)};
}
AI V low_words(V x) {  // both 16-bit halves of a lane become its lower one
  const __m256i p = _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 1, 0, 1, 4, 5, 4, 5, 8, 9, 8, 9, 12, 13, 12, 13));
  return {_mm256_shuffle_epi8(x.a, p), _mm256_shuffle_epi8(x.b, p)};
}
AI V high_words(V x) {
  const __m256i p = _mm256_broadcastsi128_si256(_mm_setr_epi8(2, 3, 2, 3, 6, 7, 6, 7, 10, 11, 10, 11, 14, 15, 14, 15));
  return {_mm256_shuffle_epi8(x.a, p), _mm256_shuffle_epi8(x.b, p)};
}
template <int LOW, int HIGH> AI V shr16_each(V x) {
  return {_mm256_blend_epi16(_mm256_srli_epi16(x.a, LOW), _mm256_srli_epi16(x.a, HIGH), 0xaa),
      _mm256_blend_epi16(_mm256_srli_epi16(x.b, LOW), _mm256_srli_epi16(x.b, HIGH), 0xaa)};
}
// table[index] of 16-bit indices; a gather reads two bytes too many.
AI __m256i lookup256(const uint16_t* table, __m256i index) {
  const int* t = reinterpret_cast<const int*>(table);
  const __m256i low = _mm256_i32gather_epi32(t, _mm256_and_si256(index, _mm256_set1_epi32(0xffff)), 2);
  return _mm256_blend_epi16(low, _mm256_slli_epi32(_mm256_i32gather_epi32(t, _mm256_srli_epi32(index, 16), 2), 16),
      0xaa);
}
template <int N>
AI V lookup(const uint16_t* table, V index) {
  return {lookup256(table, index.a), lookup256(table, index.b)};
}
AI __m256i bytes_where256(uint32_t mask) {  // byte i is 0xff if bit i of the mask is set
  const __m256i mask_bytes = _mm256_shuffle_epi8(_mm256_set1_epi32(int(mask)),
      _mm256_setr_epi8(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 2, 2, 2, 2, 2, 2, 2, 2, 3, 3, 3, 3, 3, 3, 3, 3));
  const __m256i bit = _mm256_set1_epi64x(int64_t(0x8040201008040201ull));
  return _mm256_cmpeq_epi8(_mm256_and_si256(mask_bytes, bit), bit);
}
AI V negate_where(V w, uint64_t mask) {  // where the mask's bit 4*lane + byte is set
  const V m = {bytes_where256(uint32_t(mask)), bytes_where256(uint32_t(mask >> 32))};
  return sub8(xor_(w, m), m);
}
template <int LOW> AI V look_up_repeated(const int8_t* table, V x) { return look_up16(table, and_(x, set8(LOW))); }
AI V nibble_lanes(uint64_t nibbles) {  // nibble i in lane i
  const __m128i both = _mm_cvtsi64_si128(int64_t(nibbles));
  const __m128i bytes = _mm_and_si128(_mm_unpacklo_epi8(both, _mm_srli_epi64(both, 4)), _mm_set1_epi8(15));
  return {_mm256_cvtepu8_epi32(bytes), _mm256_cvtepu8_epi32(_mm_srli_si128(bytes, 8))};
}
AI V load_u8(const uint8_t* p) {
  const __m128i v = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return {_mm256_cvtepu8_epi32(v), _mm256_cvtepu8_epi32(_mm_srli_si128(v, 8))};
}
AI V load_s8(const uint8_t* p) {
  const __m128i x = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return {_mm256_cvtepi8_epi32(x), _mm256_cvtepi8_epi32(_mm_srli_si128(x, 8))};
}
AI V load_u16(const uint8_t* p) {
  const __m128i* q = reinterpret_cast<const __m128i*>(p);
  return {_mm256_cvtepu16_epi32(_mm_loadu_si128(q)), _mm256_cvtepu16_epi32(_mm_loadu_si128(q + 1))};
}
AI V sign_extend8(V x) {
  return {_mm256_srai_epi32(_mm256_slli_epi32(x.a, 24), 24), _mm256_srai_epi32(_mm256_slli_epi32(x.b, 24), 24)};
}

// clang-format off
AI F setf(float x) { const __m256 v = _mm256_set1_ps(x); return {v, v}; }
AI F zero() { return setf(0); }
AI F loadf(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
AI void storef(float* p, F v) { _mm256_storeu_ps(p, v.a), _mm256_storeu_ps(p + 8, v.b); }
AI F broadcastf(const float* p) { const __m256 v = _mm256_broadcast_ss(p); return {v, v}; }
KTX_F2(addf, _mm256_add_ps)
KTX_F2(mulf, _mm256_mul_ps)
KTX_F2(divf, _mm256_div_ps)
KTX_F2(minf, _mm256_min_ps)
KTX_F2(maxf, _mm256_max_ps)
KTX_F3(fma, _mm256_fmadd_ps)
KTX_F3(fnma, _mm256_fnmadd_ps)
AI V as_int(F x) { return {_mm256_castps_si256(x.a), _mm256_castps_si256(x.b)}; }
AI F as_float(V x) { return {_mm256_castsi256_ps(x.a), _mm256_castsi256_ps(x.b)}; }
AI F absf(F x) { return as_float(and_(as_int(x), set(0x7fffffff))); }
// clang-format on
AI uint32_t largest_lane(V x) {
  const __m256i m = _mm256_max_epu32(x.a, x.b);
  __m128i h = _mm_max_epu32(_mm256_castsi256_si128(m), _mm256_extracti128_si256(m, 1));
  h = _mm_max_epu32(h, _mm_unpackhi_epi64(h, h));
  return uint32_t(_mm_cvtsi128_si32(_mm_max_epu32(h, _mm_shuffle_epi32(h, 1))));
}
AI int32_t sum_lanes(V x) {
  const __m256i m = _mm256_add_epi32(x.a, x.b);
  __m128i h = _mm_add_epi32(_mm256_castsi256_si128(m), _mm256_extracti128_si256(m, 1));
  h = _mm_add_epi32(h, _mm_unpackhi_epi64(h, h));
  return _mm_cvtsi128_si32(_mm_add_epi32(h, _mm_shuffle_epi32(h, 1)));
}
AI float sum_lanes(F x) {
  const __m256 m = _mm256_add_ps(x.a, x.b);
  __m128 h = _mm_add_ps(_mm256_castps256_ps128(m), _mm256_extractf128_ps(m, 1));
  h = _mm_add_ps(h, _mm_movehl_ps(h, h));
  return _mm_cvtss_f32(_mm_add_ss(h, _mm_shuffle_ps(h, h, 1)));
}
AI F to_float(V x) { return {_mm256_cvtepi32_ps(x.a), _mm256_cvtepi32_ps(x.b)}; }
AI V to_int(F x) { return {_mm256_cvtps_epi32(x.a), _mm256_cvtps_epi32(x.b)}; }
AI F load_f16(const void* p) {
  const __m128i* q = static_cast<const __m128i*>(p);
  return {_mm256_cvtph_ps(_mm_loadu_si128(q)), _mm256_cvtph_ps(_mm_loadu_si128(q + 1))};
}
// 16 codes as floats, see simd_scalar.inl.
AI F load_e4m3_column(const uint8_t* p) {
  const __m256i x = _mm256_slli_epi16(_mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))), 8);
  const __m256i h = _mm256_and_si256(_mm256_srai_epi16(x, 1), _mm256_set1_epi16(int16_t(0xbfff)));
  return {_mm256_cvtph_ps(_mm256_castsi256_si128(h)), _mm256_cvtph_ps(_mm256_extracti128_si256(h, 1))};
}
AI void load_e4m3(const uint8_t* p, F& a, F& b) { a = load_e4m3_column(p), b = load_e4m3_column(p + 16); }
// The low 16 bits of eight lanes.
AI __m128i pack_low_halves(__m256i x) {
  const __m256i p = _mm256_packus_epi32(_mm256_and_si256(x, _mm256_set1_epi32(0xffff)), _mm256_setzero_si256());
  return _mm256_castsi256_si128(_mm256_permute4x64_epi64(p, 0x08));
}
AI F f16_lanes(V x) { return {_mm256_cvtph_ps(pack_low_halves(x.a)), _mm256_cvtph_ps(pack_low_halves(x.b))}; }
AI void store_f16(void* p, F x) {
  __m128i* q = static_cast<__m128i*>(p);
  _mm_storeu_si128(q, _mm256_cvtps_ph(x.a, 0)), _mm_storeu_si128(q + 1, _mm256_cvtps_ph(x.b, 0));
}
AI __m128i bf16_halves(__m256 x) {  // eight floats as bf16: rounds to nearest even, keeps NaN
  const __m256i bits = _mm256_castps_si256(x),
                even = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(_mm256_set1_epi32(0x7fff), even)),
                quiet_nan = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
  return pack_low_halves(_mm256_srli_epi32(
      _mm256_blendv_epi8(rounded, quiet_nan, _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q))), 16));
}
AI void store_bf16(void* p, F x) {
  __m128i* q = static_cast<__m128i*>(p);
  _mm_storeu_si128(q, bf16_halves(x.a)), _mm_storeu_si128(q + 1, bf16_halves(x.b));
}
AI void store_s8(int8_t* p, V x) {
  const __m128i lo = pack_low_halves(x.a), hi = pack_low_halves(x.b), mask = _mm_set1_epi16(0xff);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm_packus_epi16(_mm_and_si128(lo, mask), _mm_and_si128(hi, mask)));
}

#ifdef KTX_VNNI
// Signed weights have 128 added, as in simd_avx512.inl. The prefix selects the VEX or EVEX encoding.
AI __m256i dot256(__m256i acc, __m256i w, __m256i x) {
  __asm__(KTX_VNNI " vpdpbusd %2, %1, %0" : "+x"(acc) : "x"(w), "x"(x));
  return acc;
}
constexpr int SIGNED_OFFSET = 128;
AI V with_offset(V weights) { return xor_(weights, set8(0x80)); }
template <bool SIGNED> AI V dot(V acc, V w, V x) { return {dot256(acc.a, w.a, x.a), dot256(acc.b, w.b, x.b)}; }
#else
// The products of bytes, two of them added in 16 bits by maddubs. It takes unsigned times signed bytes: unsigned codes
// up to 127 fit, signed codes are passed as |w| times x with the sign of w.
template <bool SIGNED> AI V byte_products(V w, V x) {
  if (!SIGNED) return {_mm256_maddubs_epi16(w.a, x.a), _mm256_maddubs_epi16(w.b, x.b)};
  return {_mm256_maddubs_epi16(_mm256_sign_epi8(w.a, w.a), _mm256_sign_epi8(x.a, w.a)),
      _mm256_maddubs_epi16(_mm256_sign_epi8(w.b, w.b), _mm256_sign_epi8(x.b, w.b))};
}
// Adds the two 16-bit sums of each lane in 32 bits.
AI V widen(V pairs) {
  const __m256i one = _mm256_set1_epi16(1);
  return {_mm256_madd_epi16(pairs.a, one), _mm256_madd_epi16(pairs.b, one)};
}
// Adds 16-bit words, add_lanes 32-bit lanes. In assembly, because GCC would compute all products before it adds the
// first, and has no registers for them.
AI V add_words(V sum, V x) {
  __asm__("vpaddw %1, %0, %0" : "+x"(sum.a) : "x"(x.a));
  __asm__("vpaddw %1, %0, %0" : "+x"(sum.b) : "x"(x.b));
  return sum;
}
AI V add_lanes(V sum, V x) {
  __asm__("vpaddd %1, %0, %0" : "+x"(sum.a) : "x"(x.a));
  __asm__("vpaddd %1, %0, %0" : "+x"(sum.b) : "x"(x.b));
  return sum;
}
// Returns how many products of codes up to `max_code` fit 16 bits, as a power of two: they are added in 16 bits and
// widened together.
constexpr int sums_in_16_bits(int max_code) { return max_code <= 16 ? 8 : max_code <= 32 ? 4 : max_code <= 64 ? 2 : 1; }
// The DotSum of int_gemm.inl without VNNI: SUMS products are added in 16 bits (sum16), then widened and added to the
// total. A sum that is widened once is added by an intrinsic, where the compiler removes a zero start (Q2_K, one token:
// 10 % slower without).
template <bool SIGNED, int SUMS> struct DotSum {
  V total, sum16;
  AI explicit DotSum(V first = V()) : total(first), sum16(first) {}
  AI void add_product(int step, int steps, V w, V x) {
    const V both = byte_products<SIGNED>(w, x);
    sum16 = step % SUMS ? add_words(sum16, both) : both;
    if (step % SUMS == SUMS - 1 || step == steps - 1)
      total = steps <= SUMS ? add(total, widen(sum16)) : add_lanes(total, widen(sum16));
  }
};
// clang-format off
#define KTX_SUMS_IN_16_BITS
// clang-format on
constexpr int SIGNED_OFFSET = 0;
AI V with_offset(V weights) { return weights; }
#endif
#undef KTX_V1
#undef KTX_V2
#undef KTX_F2
#undef KTX_F3
#undef KTX_SHIFT
