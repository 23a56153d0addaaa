// Attention in bf16 with f32 sums, for keys and values that are stored in half precision or Q8_0.
// A lane is a row (one query of one head): scores are [key][row], so that neither products nor softmax sum over lanes.
// A 32-bit word is a pair of columns (q . k) or a pair of keys (probabilities . v), which one vdpbf16ps multiplies and
// adds. `row_vectors` and L: number of vectors of 16 rows (l: index of one). R = rows, C = keys or chunks of 32
// columns, d = columns of q and k, dv = columns of v.

// Transposes q f32 [rows][d] to pairs of bf16 columns [d/2][row_vectors*16 rows], as score_bf16 multiplies them, once
// for all blocks of keys. Rows past `rows` are zero.
static void pack_queries_bf16(const float* q, int rows, int d, int row_vectors, uint32_t* to) {
  __builtin_memset(to, 0, size_t(d / 2) * row_vectors * 64);
  for (int r = 0; r < rows; ++r, q += d)
    for (int i = 0; i < d; i += 32) {
      float columns[32] = {};
      uint32_t words[16];
      const int count = d - i < 32 ? d - i : 32;
      __builtin_memcpy(columns, q + i, size_t(count) * 4);
      store(words, pair_neighbors_as_bf16(loadf(columns), loadf(columns + 16)));
      for (int j = 0; j < count / 2; ++j) to[(i / 2 + j) * row_vectors * 16 + r] = words[j];
    }
}

// Bytes of 32 columns.
template <DType TYPE> constexpr int VECTOR_BYTES = TYPE == DType::Q8_0 ? Q8_BYTES : 64;
// Loads 32 columns of a row of the KV cache as bf16, which is what the products take.
template <DType TYPE> AI V load_bf16_vector(const uint8_t* p) {
  if constexpr (TYPE == DType::BF16) return load(p);
  else if constexpr (TYPE == DType::F16) return pair_neighbors_as_bf16(load_f16(p), load_f16(p + 32));
  else {
    uint16_t scale;
    __builtin_memcpy(&scale, p, 2);
    const F factors = _mm512_cvtph_ps(_mm256_set1_epi16(short(scale)));
    return pair_neighbors_as_bf16(mulf(to_float(load_s8(p + 2)), factors), mulf(to_float(load_s8(p + 18)), factors));
  }
}

// Converts one row of d columns of the KV cache to bf16 (Q8_0: d is a multiple of 32), 32 columns at a time; those that
// remain are loaded and stored with a mask, because memory past the row may not be ours.
static void row_to_bf16(const void* from, DType type, int d, uint16_t* to) {
  const uint16_t* p = static_cast<const uint16_t*>(from);
  if (type == DType::BF16) {
    __builtin_memcpy(to, p, size_t(d) * 2);
    return;
  }
  if (type == DType::Q8_0) {
    const uint8_t* block = static_cast<const uint8_t*>(from);
    for (int i = 0; i < d; i += Q8_BLOCK, block += Q8_BYTES) store(to + i, load_bf16_vector<DType::Q8_0>(block));
    return;
  }
  int i = 0;
  for (; i + 32 <= d; i += 32) store(to + i, pair_neighbors_as_bf16(load_f16(p + i), load_f16(p + i + 16)));
  if (i == d) return;
  const __mmask32 rest = (1u << (d - i)) - 1;
  const V last = _mm512_maskz_loadu_epi16(rest, p + i);
  const F low = _mm512_cvtph_ps(_mm512_castsi512_si256(last)),
          high = _mm512_cvtph_ps(_mm512_extracti64x4_epi64(last, 1));
  _mm512_mask_storeu_epi16(to + i, rest, pair_neighbors_as_bf16(low, high));
}

// Computes the scores of 16*L rows and C keys, which are `stride` columns apart. Prefetches the next block at next0 and
// next1 evenly between the products, because a burst would stall the loads.
template <int L, int C>
AI void score_tile_bf16(const uint32_t* q, int row_vectors, const uint16_t* k, int64_t stride, int d, float* scores,
    const uint8_t* next0, const uint8_t* next1) {
  F acc[L * C];
#pragma GCC unroll 16
  for (int i = 0; i < L * C; ++i) acc[i] = zero();
  for (int i = 0; i < d; i += 2, q += row_vectors * 16) {
    __builtin_prefetch(next0 + i * 2 * C, 0, 2);
    __builtin_prefetch(next1 + i * 2 * C, 0, 2);
    Pairs a[L];
#pragma GCC unroll 4
    for (int l = 0; l < L; ++l) a[l] = load_pairs(q + l * 16);
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c)
#pragma GCC unroll 4
      for (int l = 0; l < L; ++l) acc[l * C + c] = dot_pairs(acc[l * C + c], k + c * stride + i, a[l]);
  }
#pragma GCC unroll 4
  for (int l = 0; l < L; ++l)
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) storef(scores + (c * row_vectors + l) * 16, acc[l * C + c]);
}

// Computes scores [key][row_vectors*16 rows] for up to 8 keys, in tiles of up to 16 sums, which stay in registers.
// `scores` has space for 8 keys; those past `keys` are undefined. `next`: two addresses to prefetch.
static void score_bf16(const uint32_t* q, int row_vectors, const uint16_t* k, int64_t stride, int keys, int d,
    float* scores, const void* const* next) {
  const uint8_t *next0 = static_cast<const uint8_t*>(next[0]), *next1 = static_cast<const uint8_t*>(next[1]);
  int l = 0;
  for (; l + 4 <= row_vectors; l += 4)
    for (int c = 0; c < keys; c += 4)
      score_tile_bf16<4, 4>(q + l * 16, row_vectors, k + c * stride, stride, d, scores + (c * row_vectors + l) * 16,
          next0 + c * d * 2, next1 + c * d * 2);
  for (; l + 2 <= row_vectors; l += 2)
    score_tile_bf16<2, 8>(q + l * 16, row_vectors, k, stride, d, scores + l * 16, next0, next1);
  for (; l < row_vectors; ++l)
    score_tile_bf16<1, 8>(q + l * 16, row_vectors, k, stride, d, scores + l * 16, next0, next1);
}

// Computes the scores of eight MLA latent keys (absorbed MLA: dk latent columns, then dr rope columns) and, between the
// products, converts eight other keys to bf16, with other execution ports than those of products; done separately
// conversion would take a seventh of the time. q [d/2][L*16 rows] pairs, k bf16 [8][d]; each of the eight rows to
// convert is interleaved with an eighth of the columns of q and k. Writes scores [8][L*16 rows].
template <int L, DType TYPE>
static void score_and_convert_rows(const uint32_t* q, const uint16_t* k, const LatentConversion& conversion,
    float* scores) {
  F acc[L * 8];
#pragma GCC unroll 16
  for (int i = 0; i < L * 8; ++i) acc[i] = zero();
  const int d = conversion.dk + conversion.dr;
  const uint16_t* at = k;
  for (int row = 0; row < 8; ++row) {  // to convert
    uint16_t* to = conversion.to + row * d;
    for (int v = 0; v < d / 32; ++v) {
#pragma GCC unroll 2
      for (int half = 0; half < 2; ++half, at += 2, q += L * 16) {
        Pairs a[L];
#pragma GCC unroll 2
        for (int l = 0; l < L; ++l) a[l] = load_pairs(q + l * 16);
#pragma GCC unroll 8
        for (int c = 0; c < 8; ++c)
#pragma GCC unroll 2
          for (int l = 0; l < L; ++l) acc[l * 8 + c] = dot_pairs(acc[l * 8 + c], at + c * d, a[l]);
      }
      const bool rope = v >= conversion.dk / 32;
      const uint8_t* next = rope
          ? conversion.rope + row * conversion.rope_step + (v - conversion.dk / 32) * VECTOR_BYTES<TYPE>
          : conversion.latent + row * conversion.latent_step + v * VECTOR_BYTES<TYPE>;
      store(to + v * 32, load_bf16_vector<TYPE>(next));
      __builtin_prefetch(next + (rope ? conversion.rope_step : conversion.latent_step) * BLOCK_KEYS, 0, 2);
    }
  }
#pragma GCC unroll 2
  for (int l = 0; l < L; ++l)
#pragma GCC unroll 8
    for (int c = 0; c < 8; ++c) storef(scores + (c * L + l) * 16, acc[l * 8 + c]);
}
// Calls score_and_convert_rows for 1 or 2 vectors of rows and the type of the cache, F16, BF16 or Q8_0 (the tables are
// indexed by DType).
static void score_latent(const uint32_t* q, int row_vectors, const uint16_t* k, const LatentConversion& conversion,
    float* scores) {
  static void (*const one_vector[])(const uint32_t*, const uint16_t*, const LatentConversion&, float*) = {nullptr,
      score_and_convert_rows<1, DType::F16>, score_and_convert_rows<1, DType::BF16>,
      score_and_convert_rows<1, DType::Q8_0>};
  static void (*const two_vectors[])(const uint32_t*, const uint16_t*, const LatentConversion&, float*) = {nullptr,
      score_and_convert_rows<2, DType::F16>, score_and_convert_rows<2, DType::BF16>,
      score_and_convert_rows<2, DType::Q8_0>};
  (row_vectors == 1 ? one_vector : two_vectors)[int(conversion.type)](q, k, conversion, scores);
}

// The online softmax of attention.inl with a row in each lane: scores [keys][row_vectors*16] -> probabilities
// [keys/2][row_vectors*16] as pairs of keys, the operand of accumulate_pv. Rescales `sum` and, of rows whose maximum
// has changed, `out`.
static void online_softmax_bf16(const float* scores, int row_vectors, int rows, int keys, int dv, SoftmaxState state,
    uint32_t* probs) {
  const F min_score = setf(-1e30f);  // scores below are masked
  for (int l = 0; l < row_vectors; ++l) {
    const F old_max = loadf(state.row_max + l * 16);
    F row_max = old_max;
    for (int c = 0; c < keys; ++c) row_max = maxf(loadf(scores + (c * row_vectors + l) * 16), row_max);
    storef(state.row_max + l * 16, row_max);
    const F minus_max = mulf(maxf(row_max, min_score), setf(-1));
    const auto prob_of = [&](int c) {  // keeps NaN; masked (-inf) becomes zero
      const F x = loadf(scores + (c * row_vectors + l) * 16);
      const __mmask16 visible = _mm512_cmp_ps_mask(x, min_score, _CMP_NLE_UQ);
      return _mm512_maskz_mov_ps(visible, exp_(addf(x, minus_max)));
    };
    F sum = zero();
    for (int c = 0; c < keys; c += 2) {
      const F even = prob_of(c), odd = c + 1 < keys ? prob_of(c + 1) : zero();
      sum = addf(sum, addf(even, odd));
      store(probs + (c / 2 * row_vectors + l) * 16, pair_as_bf16(even, odd));
    }
    const F rescale = exp_(addf(maxf(old_max, min_score), minus_max));
    storef(state.sum + l * 16, fma(loadf(state.sum + l * 16), rescale, sum));
    uint32_t changed_rows = bits_of(_mm512_cmp_ps_mask(row_max, old_max, _CMP_NEQ_UQ));
    float factors[16];
    storef(factors, rescale);
    for (; changed_rows; changed_rows &= changed_rows - 1) {
      const int r = __builtin_ctz(changed_rows);
      if (l * 16 + r >= rows) break;
      float* out = state.out + int64_t(l * 16 + r) * dv;
      for (int i = 0; i < dv; i += 16) storef(out + i, mulf(loadf(out + i), setf(factors[r])));
    }
  }
}

// Probabilities . v pairs the columns of two keys by unpacking, which runs on another port than the products but leaves
// each chunk of 32 columns of `out` in this order (the driver undoes it once at the end); permutations that preserve
// the order would compete with the products.
const uint8_t COLUMN_ORDER[32] = {0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27, 4, 5, 6, 7, 12, 13, 14, 15,
    20, 21, 22, 23, 28, 29, 30, 31};

// Adds two keys to R rows and C chunks of 32 columns: acc[r][c] += probability pair of row r . values of keys `even`
// and `odd`.
template <int R, int C>
AI void accumulate_key_pair(const uint32_t* probs, const uint16_t* even, const uint16_t* odd, F* acc) {
  Pairs b[2 * C];
#pragma GCC unroll 2
  for (int c = 0; c < C; ++c) {
    const V x = load(even + c * 32), y = load(odd + c * 32);
    b[2 * c] = (Pairs)_mm512_unpacklo_epi16(x, y), b[2 * c + 1] = (Pairs)_mm512_unpackhi_epi16(x, y);
  }
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int c = 0; c < 2 * C; ++c) acc[r * 2 * C + c] = dot_pairs(acc[r * 2 * C + c], probs + r, b[c]);
}

// out [R rows][32 * C columns] += probabilities . v over `keys` keys, `stride` columns apart, two at a time; sums are
// in registers. Probabilities of the next pair of keys are pair_stride words further.
template <int R, int C>
AI void accumulate_pv_tile_bf16(const uint32_t* probs, int pair_stride, const uint16_t* v, int64_t stride, int keys,
    int dv, float* out) {
  F acc[R * 2 * C];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int c = 0; c < 2 * C; ++c) acc[r * 2 * C + c] = loadf(out + int64_t(r) * dv + c * 16);
  for (int t = 0; t + 2 <= keys; t += 2, v += 2 * stride, probs += pair_stride)
    accumulate_key_pair<R, C>(probs, v, v + stride, acc);
  if (keys % 2) accumulate_key_pair<R, C>(probs, v, v, acc);  // the last key is its own partner, with probability zero
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int c = 0; c < 2 * C; ++c) storef(out + int64_t(r) * dv + c * 16, acc[r * 2 * C + c]);
}

// out [rows][32 * C columns] += probabilities . v, four rows at a time, so that a load of v serves four.
template <int C>
AI void accumulate_pv_chunks_bf16(const uint32_t* probs, int pair_stride, const uint16_t* v, int64_t stride, int rows,
    int keys, int dv, float* out) {
  int r = 0;
  for (; r + 4 <= rows; r += 4)
    accumulate_pv_tile_bf16<4, C>(probs + r, pair_stride, v, stride, keys, dv, out + int64_t(r) * dv);
  for (; r < rows; ++r)
    accumulate_pv_tile_bf16<1, C>(probs + r, pair_stride, v, stride, keys, dv, out + int64_t(r) * dv);
}

// out [rows][dv] += probabilities . v, with the columns of each 32 in COLUMN_ORDER; dv is a multiple of 32.
static void accumulate_pv_bf16(const uint32_t* probs, int row_vectors, const uint16_t* v, int64_t stride, int rows,
    int keys, int dv, float* out) {
  int c = 0;
  for (; c + 64 <= dv; c += 64)
    accumulate_pv_chunks_bf16<2>(probs, row_vectors * 16, v + c, stride, rows, keys, dv, out + c);
  for (; c < dv; c += 32) accumulate_pv_chunks_bf16<1>(probs, row_vectors * 16, v + c, stride, rows, keys, dv, out + c);
}
