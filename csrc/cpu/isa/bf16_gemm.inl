// Products with float weights in bf16 (BF16, F8_E4M3): weights are exact, activations are rounded to eight bits of
// mantissa (0.1 %), sums are f32. A pair is two consecutive columns of a row (or token) in a 32-bit word: dot_pairs
// multiplies both columns of 16 rows in one instruction. Letters as in float_gemm.inl; the formula is the same.

// Dequantizes `columns` columns of a group, without scales, to pairs of bf16: w [column/2] pair_stride words apart [16
// rows].
template <class L> AI void decode_bf16_pairs(const uint8_t* src, int columns, uint32_t* w, int pair_stride) {
  int i = 0;
  for (; i + 4 <= columns; i += 4, w += 2 * pair_stride, src += 64 * L::BYTES) {
    Pairs a, b;
    L::load_four_columns(src, a, b);
    store_pairs(w, a), store_pairs(w + pair_stride, b);
  }
  if (i < columns) store_pairs(w, L::load_bf16_pairs(src));
}

// GEMV: multiplies one group by T tokens, out [T][16 rows]. Pairs are formed in registers.
template <class L, int T>
static void bf16_gemv(const uint8_t* group, int64_t k, const uint32_t* x, float* out, const Prefetcher& prefetcher) {
  F total[T];
#pragma GCC unroll 6
  for (int t = 0; t < T; ++t) total[t] = zero();
  for (int64_t from = 0; from < k; from += FLOAT_SPAN) {
    const int64_t to = from + FLOAT_SPAN < k ? from + FLOAT_SPAN : k;
    prefetcher.prefetch_page(group + from * 16 * L::BYTES);
    F sum[T], second_chain[T];
#pragma GCC unroll 6
    for (int t = 0; t < T; ++t) sum[t] = second_chain[t] = zero();
    int64_t i = from;
    for (; i + 4 <= to; i += 4) {  // two chains of sums, of every other pair, hide the latency of dot_pairs
      Pairs a, b;
      prefetcher.prefetch_lines(group + i * 16 * L::BYTES, 64 * L::BYTES);
      L::load_four_columns(group + i * 16 * L::BYTES, a, b);
#pragma GCC unroll 6
      for (int t = 0; t < T; ++t)
        sum[t] = dot_pairs(sum[t], x + i / 2 * T + t, a),
        second_chain[t] = dot_pairs(second_chain[t], x + (i / 2 + 1) * T + t, b);
    }
    if (i < to) {
      const Pairs a = L::load_bf16_pairs(group + i * 16 * L::BYTES);
#pragma GCC unroll 6
      for (int t = 0; t < T; ++t) sum[t] = dot_pairs(sum[t], x + i / 2 * T + t, a);
    }
    const F scale = load_float_scale<L>(group, k, from);
#pragma GCC unroll 6
    for (int t = 0; t < T; ++t) total[t] = fma(addf(sum[t], second_chain[t]), scale, total[t]);
  }
#pragma GCC unroll 6
  for (int t = 0; t < T; ++t) storef(out + t * 16, total[t]);
}

// Adds one pair of columns: total [R groups][T tokens] += w [R][16 rows] * x [T].
template <int R, int T> AI void accumulate_pairs(const uint32_t* w, const uint32_t* x, F* total) {
  Pairs v[R];
#pragma GCC unroll 2
  for (int r = 0; r < R; ++r) v[r] = load_pairs(w + r * 16);
#pragma GCC unroll 6
  for (int t = 0; t < T; ++t) {
#pragma GCC unroll 2
    for (int r = 0; r < R; ++r) total[r * T + t] = dot_pairs(total[r * T + t], x + t, v[r]);
  }
}

// GEMM, one tile: out [R groups, out_stride apart][T tokens][16 rows] += scale * sum over `pairs` pairs of columns of w
// * x. Adds in the same order as bf16_gemv, so that both give the same bits.
template <int R, int T>
static void bf16_gemm_tile(const uint32_t* w, int pairs, const uint32_t* x, int pair_stride, const F* scale, float* out,
    size_t out_stride) {
  F total[R * T], second_chain[R * T];
#pragma GCC unroll 12
  for (int i = 0; i < R * T; ++i) total[i] = second_chain[i] = zero();
  int i = 0;
  for (; i + 2 <= pairs; i += 2, w += 2 * R * 16, x += 2 * pair_stride)
    accumulate_pairs<R, T>(w, x, total), accumulate_pairs<R, T>(w + R * 16, x + pair_stride, second_chain);
  if (i < pairs) accumulate_pairs<R, T>(w, x, total);
#pragma GCC unroll 2
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 6
    for (int t = 0; t < T; ++t) {
      float* to = out + r * out_stride + t * 16;
      storef(to, fma(addf(total[r * T + t], second_chain[r * T + t]), scale[r], loadf(to)));
    }
}

typedef void (*Bf16Kernel)(const uint32_t*, int, const uint32_t*, int, const F*, float*, size_t);
// Returns bf16_gemm_tile for 1 to 6 tokens.
template <int R> static Bf16Kernel select_bf16_tile(int tokens) {
  static const Bf16Kernel table[] = {nullptr, bf16_gemm_tile<R, 1>, bf16_gemm_tile<R, 2>, bf16_gemm_tile<R, 3>,
      bf16_gemm_tile<R, 4>, bf16_gemm_tile<R, 5>, bf16_gemm_tile<R, 6>};
  return table[tokens];
}

// GEMM: multiplies R groups by all tiles of tokens. `span`: buffer for FLOAT_SPAN columns of R groups as pairs.
template <class L, int R>
static void bf16_gemm(const uint8_t* packed, size_t group_stride, const ActTiles& x, float* out, uint32_t* span,
    const Prefetcher& prefetcher) {
  const size_t out_stride = size_t(x.n) * 16;
  __builtin_memset(out, 0, R * out_stride * sizeof(float));
  for (int64_t from = 0; from < x.k; from += FLOAT_SPAN) {
    const int64_t to = from + FLOAT_SPAN < x.k ? from + FLOAT_SPAN : x.k;
    F scale[R];
    PrefetchRange ranges[R];
    for (int r = 0; r < R; ++r) {
      const uint8_t* src = packed + r * group_stride + from * 16 * L::BYTES;
      ranges[r] = prefetcher.range_of_span(src, (to - from) * 16 * L::BYTES, x.tiles);
      scale[r] = load_float_scale<L>(packed + r * group_stride, x.k, from);
      decode_bf16_pairs<L>(src, int(to - from), span + r * 16, R * 16);
    }
    for (int tile = 0; tile < x.tiles; ++tile) {
      for (PrefetchRange& range : ranges) range.fetch();
      const int first = x.start(tile), tokens = x.start(tile + 1) - first;
      for (int t = 0; t < tokens; t += FLOAT_TILE)
        select_bf16_tile<R>(tokens - t < FLOAT_TILE ? tokens - t : FLOAT_TILE)(span, int(to - from) / 2,
            x.pair + first * (x.k / 2) + from / 2 * tokens + t, tokens, scale, out + (first + t) * 16, out_stride);
    }
  }
}
