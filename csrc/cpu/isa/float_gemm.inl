// Products with float weights (F32, F16, BF16, F8_E4M3) in f32: GEMV and GEMM. For each row and token
//   out += scale * sum over the columns of a span of w * x,
// where scale is 1 except for F8_E4M3, which has one for each row and 128 columns.
//
// Letters: L = loader of the weight type, T = tokens, R = groups of 16 rows at once, k = columns, x = activations
// [column][token], w = dequantized weights, t = token, r = group.

// A loader dequantizes columns of 16 rows without their scale. BYTES: of a weight. SCALE_FACTOR: multiplies all scales,
// to undo what loading leaves out. EXACT_IN_BF16: bf16 represents all values exactly, so products may be in bf16
// (bf16_gemm.inl).
//   load_columns(p, a, b)       two columns as floats
//   load_bf16_pairs(p)          two columns as pairs of bf16, a row per lane
//   load_four_columns(p, a, b)  four columns as two vectors of such pairs
struct LoadF32 {
  enum { BYTES = 4, EXACT_IN_BF16 = false };
  static constexpr float SCALE_FACTOR = 1;
  AI static void load_columns(const uint8_t* p, F& a, F& b) {
    a = loadf(reinterpret_cast<const float*>(p)), b = loadf(reinterpret_cast<const float*>(p) + 16);
  }
};
struct LoadF16 {
  enum { BYTES = 2, EXACT_IN_BF16 = false };
  static constexpr float SCALE_FACTOR = 1;
  AI static void load_columns(const uint8_t* p, F& a, F& b) { a = load_f16(p), b = load_f16(p + 32); }
};
struct LoadBF16 {
  enum { BYTES = 2, EXACT_IN_BF16 = true };
  static constexpr float SCALE_FACTOR = 1;
  AI static void load_columns(const uint8_t* p, F& a, F& b) {
    a = as_float(shl(load_u16(p), 16)), b = as_float(shl(load_u16(p + 32), 16));
  }
#ifdef KTX_BF16
  AI static Pairs load_bf16_pairs(const uint8_t* p) { return load_column_pairs(p); }
  AI static void load_four_columns(const uint8_t* p, Pairs& a, Pairs& b) {
    a = load_column_pairs(p), b = load_column_pairs(p + 64);
  }
#endif
};
// e4m3 as the f16 with the same bits in its upper byte, one exponent bit short: 2^8 corrects the bias (subnormals too).
struct LoadF8 {
  enum { BYTES = 1, EXACT_IN_BF16 = true };
  static constexpr float SCALE_FACTOR = 256;
  AI static void load_columns(const uint8_t* p, F& a, F& b) { load_e4m3(p, a, b); }
#ifdef KTX_BF16
  AI static Pairs load_bf16_pairs(const uint8_t* p) {
    F a, b;
    load_columns(p, a, b);
    return (Pairs)pair_as_bf16(a, b);
  }
  AI static void load_four_columns(const uint8_t* p, Pairs& a, Pairs& b) {
#ifdef KTX_VBMI
    load_e4m3_pairs(p, a, b);
#else
    a = load_bf16_pairs(p), b = load_bf16_pairs(p + 32);
#endif
  }
#endif
};

// Loads the last of an odd number of columns as `a` (b becomes zero), without reading past it.
template <class L> AI void last_column(const uint8_t* p, F& a, F& b) {
  uint8_t padded[32 * L::BYTES] = {};
  __builtin_memcpy(padded, p, 16 * L::BYTES);
  L::load_columns(padded, a, b);
}
// Returns the scales of a group of F8_E4M3, which follow its codes (float_scales_offset in quant/layout.h).
AI const float* locate_float_scales(const uint8_t* group, int64_t k) {
  return reinterpret_cast<const float*>(group + (k * 16 + 63) / 64 * 64);
}
// Loads the scale of each row for the span at column `from`; 1 for types without scales.
template <class L> AI F load_float_scale(const uint8_t* group, int64_t k, int64_t from) {
  return L::BYTES == 1 ? mulf(loadf(locate_float_scales(group, k) + from / 128 * 16), setf(L::SCALE_FACTOR)) : setf(1);
}
constexpr int FLOAT_TILE = KTX_TILE_TOKENS < 6 ? KTX_TILE_TOKENS : 6;  // max tokens whose sums stay in registers
constexpr int FLOAT_SPAN = 128;  // columns of a span: they share a scale and are dequantized at once

// GEMV: multiplies one group by T tokens, out [T][16 rows]. Weights are dequantized in registers and used at once.
template <class L, int T>
static void float_gemv(const uint8_t* group, int64_t k, const float* x, float* out, const Prefetcher& prefetcher) {
  F total[T];
#pragma GCC unroll 6
  for (int t = 0; t < T; ++t) total[t] = zero();
  for (int64_t from = 0; from < k; from += FLOAT_SPAN) {
    const int64_t to = from + FLOAT_SPAN < k ? from + FLOAT_SPAN : k;
    prefetcher.prefetch_page(group + from * 16 * L::BYTES);
    F sum[T];
#pragma GCC unroll 6
    for (int t = 0; t < T; ++t) sum[t] = zero();
    int64_t i = from;
    for (; i + 2 <= to; i += 2) {
      F a, b;
      if (i % 4 == 0) prefetcher.prefetch_lines(group + i * 16 * L::BYTES, 64 * L::BYTES);
      L::load_columns(group + i * 16 * L::BYTES, a, b);
#pragma GCC unroll 6
      for (int t = 0; t < T; ++t)
        sum[t] = fma(b, broadcastf(x + (i + 1) * T + t), fma(a, broadcastf(x + i * T + t), sum[t]));
    }
    if (i < to) {
      F a, b;
      last_column<L>(group + i * 16 * L::BYTES, a, b);
#pragma GCC unroll 6
      for (int t = 0; t < T; ++t) sum[t] = fma(a, broadcastf(x + i * T + t), sum[t]);
    }
    const F scale = load_float_scale<L>(group, k, from);
#pragma GCC unroll 6
    for (int t = 0; t < T; ++t) total[t] = fma(sum[t], scale, total[t]);
  }
#pragma GCC unroll 6
  for (int t = 0; t < T; ++t) storef(out + t * 16, total[t]);
}

// GEMM, one tile: out [R groups, out_stride apart][T tokens][16 rows] += scale * sum over `columns` of w * x.
// w [column][R groups][16 rows], x [column] x_stride apart [T tokens].
template <int R, int T>
static void float_gemm_tile(const float* w, int columns, const float* x, int x_stride, const F* scale, float* out,
    size_t out_stride) {
  F total[R * T];
#pragma GCC unroll 12
  for (int i = 0; i < R * T; ++i) total[i] = zero();
  for (int i = 0; i < columns; ++i, w += R * 16, x += x_stride) {
    F v[R];
#pragma GCC unroll 2
    for (int r = 0; r < R; ++r) v[r] = loadf(w + r * 16);
#pragma GCC unroll 6
    for (int t = 0; t < T; ++t) {
      const F xt = broadcastf(x + t);
#pragma GCC unroll 2
      for (int r = 0; r < R; ++r) total[r * T + t] = fma(v[r], xt, total[r * T + t]);
    }
  }
#pragma GCC unroll 2
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 6
    for (int t = 0; t < T; ++t) {
      float* to = out + r * out_stride + t * 16;
      storef(to, fma(total[r * T + t], scale[r], loadf(to)));
    }
}

typedef void (*FloatKernel)(const float*, int, const float*, int, const F*, float*, size_t);
// Returns float_gemm_tile for 1 to FLOAT_TILE tokens.
template <int R> static FloatKernel select_float_tile(int tokens) {
  static const FloatKernel table[] = {nullptr, float_gemm_tile<R, 1>, float_gemm_tile<R, 2>,
#if KTX_TILE_TOKENS >= 6
      float_gemm_tile<R, 3>, float_gemm_tile<R, 4>, float_gemm_tile<R, 5>, float_gemm_tile<R, 6>
#endif
  };
  return table[tokens];
}

// GEMM: multiplies R groups by all tiles of tokens. A span of weights is dequantized once to f32 and used by every
// tile. A tile of more than FLOAT_TILE tokens is cut.
template <class L, int R>
static void float_gemm(const uint8_t* packed, size_t group_stride, const ActTiles& x, float* out, float* span,
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
      float* w = span + r * 16;
      for (int64_t i = from; i < to; i += 2, w += 2 * R * 16) {
        F a, b;
        if (i + 2 <= to) L::load_columns(packed + r * group_stride + i * 16 * L::BYTES, a, b), storef(w + R * 16, b);
        else last_column<L>(packed + r * group_stride + i * 16 * L::BYTES, a, b);
        storef(w, a);
      }
    }
    for (int tile = 0; tile < x.tiles; ++tile) {
      for (PrefetchRange& range : ranges) range.fetch();
      const int first = x.start(tile), tokens = x.start(tile + 1) - first;
      for (int t = 0; t < tokens; t += FLOAT_TILE)
        select_float_tile<R>(tokens - t < FLOAT_TILE ? tokens - t : FLOAT_TILE)(span, int(to - from),
            x.f + first * x.k + from * tokens + t, tokens, scale, out + (first + t) * 16, out_stride);
    }
  }
}
