// Many tokens, faster and less exact (KTX_GEMM=fast): what a span's sub-blocks hold is brought to signed bytes with one scale a row, and activations have a
// scale for 64 columns instead of 32. The products of 64 columns are then added up as integers, and there are no minimums.

// Most that a code of a type is away from its centre, as a power of two, and the centre; 0 where the sub-blocks are kept.
struct Range { int most, centre; };
template <class D> constexpr Range range_of() {
  switch (D::CODE) {
    case Q8_0: case INT8_128: case IQ4_NL: case IQ4_XS: case Q6_K: case Q5_0: case Q5_1: case Q5_K: case MXFP4:
    case Q4_0: case Q4_1: case Q4_K: case INT4_64: case INT4_128: case Q3_K: break;
    default: return {0, 0};
  }
  int most = 1;
  while (most < (D::SIGNED ? D::MOST : (D::MOST + 1) / 2)) most *= 2;
  return {most, D::MINIMUM ? most : 0};
}

// A span as `expand<D, true>` left it -> bytes that carry 128, and their scale in out.scale[0..15]. A code times its scale is taken in 16 bits of which eight
// are behind the point.
template <class D> static void requantise(Span& out, int length) {
  constexpr Range RANGE = range_of<D>();
  constexpr int SHIFT = 15 - __builtin_ctz(unsigned(RANGE.most | 1 << 20));
  const int subs = length / D::SUB;
  F most = zero();
  for (int s = 0; s < subs; ++s) {
    const F scale = loadf(out.scale + s * 16);
    most = maxf(most, mulf(absf(scale), setf(RANGE.most)));
    if constexpr (D::MINIMUM) {
      const F minimum = loadf(out.minimum + s * 16);
      most = maxf(most, maxf(absf(minimum), absf(fma(scale, setf(2 * RANGE.most - 1), mulf(minimum, setf(-1))))));
    }
  }
  const F inverse = divf(setf(127), maxf(most, setf(1e-30f)));
  for (int s = 0; s < subs; ++s) {
    const F scale = mulf(loadf(out.scale + s * 16), inverse);
    const V by = twice16(to_int(mulf(scale, setf(float(1 << (23 - SHIFT))))));
    F shift = setf(0.5f);  // rounds
    if constexpr (D::MINIMUM) shift = addf(shift, fma(scale, setf(RANGE.centre), mulf(mulf(loadf(out.minimum + s * 16), inverse), setf(-1))));
    const V add = twice16(to_int(mulf(shift, setf(256))));
    uint8_t* w = out.w + s * D::SUB * 16;
#pragma GCC unroll 8
    for (int g = 0; g < D::SUB / 4; ++g) {
      V codes = load(w + g * 64);
      if constexpr (RANGE.centre) codes = sub8(codes, set8(RANGE.centre));
      store(w + g * 64, carried(scaled_bytes<SHIFT>(codes, by, add)));
    }
  }
  storef(out.scale, mulf(most, setf(1.0f / 127)));
}

template <int R, int T>
static void multiply_tile_fast(const Span* spans, int length, const int8_t* q, const float* scales, const float* parts, float* out, size_t stride) {
  F total[R * T];
#pragma GCC unroll 12
  for (int i = 0; i < R * T; ++i) total[i] = zero();
  for (int from = 0; from < length; from += 64) {
    V acc[R * T];
#pragma GCC unroll 12
    for (int i = 0; i < R * T; ++i) acc[i] = set(0);
    const int end = length - from < 64 ? 8 : 16;
    for (int g = 0; g < end; g += 8)
#pragma GCC unroll 8
      for (int i = 0; i < 8; ++i) {
        V w[R];
#pragma GCC unroll 2
        for (int r = 0; r < R; ++r) w[r] = load(spans[r].w + (from / 4 + g + i) * 64);
#pragma GCC unroll 6
        for (int t = 0; t < T; ++t) {
          const V x = broadcast(q + ((g + i) * T + t) * 4);
#pragma GCC unroll 2
          for (int r = 0; r < R; ++r) acc[r * T + t] = dot(acc[r * T + t], w[r], x);
        }
      }
#pragma GCC unroll 6
    for (int t = 0; t < T; ++t)
#pragma GCC unroll 2
      for (int r = 0; r < R; ++r) total[r * T + t] = fma(to_float(acc[r * T + t]), broadcastf(scales + t), total[r * T + t]);
    q += 64 * T, scales += 2 * T;
  }
#pragma GCC unroll 6
  for (int t = 0; t < T; ++t) {
    F sum = zero();  // of the activations: what the carried 128 have too much
    for (int s = 0; s < length / 32; ++s) sum = addf(sum, broadcastf(parts + s * T + t));
#pragma GCC unroll 2
    for (int r = 0; r < R; ++r) {
      float* to = out + r * stride + t * 16;
      storef(to, fma(fnma(sum, setf(128), total[r * T + t]), loadf(spans[r].scale), loadf(to)));
    }
  }
}

typedef void (*FastKernel)(const Span*, int, const int8_t*, const float*, const float*, float*, size_t);
template <int R> static FastKernel fast_kernel(int tokens) {
  static const FastKernel table[] = {nullptr, multiply_tile_fast<R, 1>, multiply_tile_fast<R, 2>, multiply_tile_fast<R, 3>,
                                     multiply_tile_fast<R, 4>, multiply_tile_fast<R, 5>, multiply_tile_fast<R, 6>};
  return table[tokens];
}

template <class D, int R>
static void multiply_fast(const Layout& l, const uint8_t* packed, const Tokens& x, float* out, Span* spans, const uint8_t* next) {
  const size_t group = group_bytes(l, x.k), stride = size_t(x.n) * 16;
  __builtin_memset(out, 0, R * stride * sizeof(float));
  for (int64_t from = 0; from < x.k; from += SPAN) {
    const int length = x.k - from < SPAN ? int(x.k - from) : SPAN;
    Upcoming upcoming[R];
    for (int r = 0; r < R; ++r) {
      expand<D, true>(l, packed + r * group, x.k, from, length, spans[r]);
      requantise<D>(spans[r], length);
      upcoming[r] = span_at<D>(l, packed + r * group, x.k, from + length, next ? next + r * group : nullptr, x.tiles);
    }
    for (int tile = 0; tile < x.tiles; ++tile) {
      for (Upcoming& u : upcoming) u.fetch();
      const int first = x.start(tile), tokens = x.start(tile + 1) - first;
      const int64_t at = first * (x.k / 32) + from / 32 * tokens;
      fast_kernel<R>(tokens)(spans, length, x.q + first * x.k + from * tokens, x.scale + at, x.part32 + at, out + first * 16, stride);
    }
  }
}
