// Products with float weights in f32.

// Two columns of 16 rows. STEP: a factor of all values, applied to the scales. IN_BF16: bf16 holds them exactly.
struct LF32 {
  enum { BYTES = 4, IN_BF16 = false };
  static constexpr float STEP = 1;
  AI static void pair(const uint8_t* p, F& a, F& b) { a = loadf(reinterpret_cast<const float*>(p)), b = loadf(reinterpret_cast<const float*>(p) + 16); }
};
struct LF16 {
  enum { BYTES = 2, IN_BF16 = false };
  static constexpr float STEP = 1;
  AI static void pair(const uint8_t* p, F& a, F& b) { a = load_f16(p), b = load_f16(p + 32); }
};
struct LBF16 {
  enum { BYTES = 2, IN_BF16 = true };
  static constexpr float STEP = 1;
  AI static void pair(const uint8_t* p, F& a, F& b) { a = as_float(shl(load_u16(p), 16)), b = as_float(shl(load_u16(p + 32), 16)); }
#ifdef KTX_BF16
  AI static Pairs pairs(const uint8_t* p) { return columns_paired(p); }
  AI static void four(const uint8_t* p, Pairs& a, Pairs& b) { a = columns_paired(p), b = columns_paired(p + 64); }
#endif
};
struct LF8 {  // e4m3 as the f16 with the same bits in its upper byte, one exponent bit short: 2^8 corrects the bias (subnormals too)
  enum { BYTES = 1, IN_BF16 = true };
  static constexpr float STEP = 256;
  AI static void pair(const uint8_t* p, F& a, F& b) { e4m3_as_f16(p, a, b); }
#ifdef KTX_BF16
  AI static Pairs pairs(const uint8_t* p) {
    F a, b;
    pair(p, a, b);
    return (Pairs)paired(a, b);
  }
  AI static void four(const uint8_t* p, Pairs& a, Pairs& b) {
#ifdef KTX_VBMI
    e4m3_pairs(p, a, b);
#else
    a = pairs(p), b = pairs(p + 32);
#endif
  }
#endif
};

// The last of an odd number of columns, without reading past it.
template <class L> AI void last_column(const uint8_t* p, F& a, F& b) {
  uint8_t two[32 * L::BYTES] = {};
  __builtin_memcpy(two, p, 16 * L::BYTES);
  L::pair(two, a, b);
}
AI const float* scales_of(const uint8_t* group, int64_t k) { return reinterpret_cast<const float*>(group + (k * 16 + 63) / 64 * 64); }  // of e4m3, behind the codes
template <class L> AI F float_scale(const uint8_t* group, int64_t k, int64_t from) {
  return L::BYTES == 1 ? mulf(loadf(scales_of(group, k) + from / 128 * 16), setf(L::STEP)) : setf(1);
}
constexpr int FLOAT_TILE = KTX_TILE_TOKENS < 6 ? KTX_TILE_TOKENS : 6;  // tokens with sums in registers
constexpr int FLOAT_SPAN = 128;  // columns that share a scale and are dequantized at once

// GEMV: weights are dequantized in registers.
template <class L, int T>
static void float_gemv(const uint8_t* group, int64_t k, const float* x, float* out, const Prefetcher& prefetcher) {
  F total[T];
#pragma GCC unroll 6
  for (int t = 0; t < T; ++t) total[t] = zero();
  for (int64_t from = 0; from < k; from += FLOAT_SPAN) {
    const int64_t to = from + FLOAT_SPAN < k ? from + FLOAT_SPAN : k;
    prefetcher.page(group + from * 16 * L::BYTES);
    F sum[T];
#pragma GCC unroll 6
    for (int t = 0; t < T; ++t) sum[t] = zero();
    int64_t i = from;
    for (; i + 2 <= to; i += 2) {
      F a, b;
      if (i % 4 == 0) prefetcher.lines(group + i * 16 * L::BYTES, 64 * L::BYTES);
      L::pair(group + i * 16 * L::BYTES, a, b);
#pragma GCC unroll 6
      for (int t = 0; t < T; ++t) sum[t] = fma(b, broadcastf(x + (i + 1) * T + t), fma(a, broadcastf(x + i * T + t), sum[t]));
    }
    if (i < to) {
      F a, b;
      last_column<L>(group + i * 16 * L::BYTES, a, b);
#pragma GCC unroll 6
      for (int t = 0; t < T; ++t) sum[t] = fma(a, broadcastf(x + i * T + t), sum[t]);
    }
    const F scale = float_scale<L>(group, k, from);
#pragma GCC unroll 6
    for (int t = 0; t < T; ++t) total[t] = fma(sum[t], scale, total[t]);
  }
#pragma GCC unroll 6
  for (int t = 0; t < T; ++t) storef(out + t * 16, total[t]);
}

// GEMM: a span of weights is dequantized once, [column][group][16], and used by every tile.
template <int R, int T>
static void float_gemm_tile(const float* w, int columns, const float* x, int step, const F* scale, float* out, size_t stride) {
  F total[R * T];
#pragma GCC unroll 12
  for (int i = 0; i < R * T; ++i) total[i] = zero();
  for (int i = 0; i < columns; ++i, w += R * 16, x += step) {
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
      float* to = out + r * stride + t * 16;
      storef(to, fma(total[r * T + t], scale[r], loadf(to)));
    }
}

typedef void (*FloatKernel)(const float*, int, const float*, int, const F*, float*, size_t);
template <int R> static FloatKernel float_kernel(int tokens) {
  static const FloatKernel table[] = {nullptr, float_gemm_tile<R, 1>, float_gemm_tile<R, 2>,
#if KTX_TILE_TOKENS >= 6
                                    float_gemm_tile<R, 3>, float_gemm_tile<R, 4>, float_gemm_tile<R, 5>, float_gemm_tile<R, 6>
#endif
  };
  return table[tokens];
}

template <class L, int R>
static void float_gemm(const uint8_t* packed, size_t group, const ActTiles& x, float* out, float* span, const Prefetcher& prefetcher) {
  const size_t stride = size_t(x.n) * 16;
  __builtin_memset(out, 0, R * stride * sizeof(float));
  for (int64_t from = 0; from < x.k; from += FLOAT_SPAN) {
    const int64_t to = from + FLOAT_SPAN < x.k ? from + FLOAT_SPAN : x.k;
    F scale[R];
    PrefetchRange ranges[R];
    for (int r = 0; r < R; ++r) {
      const uint8_t* here = packed + r * group + from * 16 * L::BYTES;
      ranges[r] = prefetcher.span(here, (to - from) * 16 * L::BYTES, x.tiles);
      scale[r] = float_scale<L>(packed + r * group, x.k, from);
      float* w = span + r * 16;
      for (int64_t i = from; i < to; i += 2, w += 2 * R * 16) {
        F a, b;
        if (i + 2 <= to) L::pair(packed + r * group + i * 16 * L::BYTES, a, b), storef(w + R * 16, b);
        else last_column<L>(packed + r * group + i * 16 * L::BYTES, a, b);
        storef(w, a);
      }
    }
    for (int tile = 0; tile < x.tiles; ++tile) {
      for (PrefetchRange& u : ranges) u.fetch();
      const int first = x.start(tile), tokens = x.start(tile + 1) - first;
      for (int t = 0; t < tokens; t += FLOAT_TILE)
        float_kernel<R>(tokens - t < FLOAT_TILE ? tokens - t : FLOAT_TILE)(span, int(to - from), x.f + first * x.k + from * tokens + t, tokens, scale, out + (first + t) * 16, stride);
    }
  }
}
