// Products with integer weights: dot products of int8 codes, scaled and summed in f32. GEMV and GEMM.
//
// Letters: D = decoder of the weight type (dequant.inl), T = tokens, R = groups of 16 rows at once, k = columns,
// w = codes of weights, q = codes of activations, t = token, r = group, g = vector of four columns.
// With q(t) the int8 activations of token t and d(t) their scale, a sub-block adds to the output of each row and token
//   scale * d(t) * sum((code - OFFSET) * q(t))  -  minimum * d(t) * sum(q(t)).
// The sums of q are known from quantization: sum16/sum32 hold minus sum(q), which start the int32 sum so that OFFSET
// cancels; scaled_sum16/scaled_sum32 hold d * sum(q), here `scaled_sums`, which minimums multiply.

// An integer as a type, for lambdas whose argument has to be a constant.
template <int N> struct IntConstant {
  static constexpr int value = N;
};

// Returns where the fields of block b of a group are.
AI Block locate_block(const Layout& l, const uint8_t* group, int64_t k, int64_t b) {
  const size_t plane = narrow_plane_bytes(l, k);
  return {group + b * l.narrow_bytes * 16, group + plane + b * l.narrow_bytes * 16,
      group + l.num_narrow_fields * plane + b * size_t(l.word_count()) * 64};
}

template <class D> struct Traits {
  // How much larger codes in registers are than the codes they stand for: the weight type's OFFSET, or 128 for signed
  // codes where `dot` takes unsigned bytes.
  static constexpr int REGISTER_OFFSET = D::SIGNED ? SIGNED_OFFSET : D::OFFSET;
  // A unit is 32 columns, which share one activation scale.
  static constexpr int UNITS = D::BLOCK / 32;     // of a block
  static constexpr int SUB_BLOCKS = 32 / D::SUB;  // of a unit
};

// Decodes a unit: eight vectors w of codes, and the scale and minimum of each of its sub-blocks.
template <class D>
AI void decode_unit(const typename D::BlockScales& block_scales, const Block& b, int unit, V* w, F* scale, F* minimum) {
  if constexpr (D::DECODES_PAIRS) D::decode_pair(block_scales, b, unit, w, scale);
  else
    for (int p = 0; p < Traits<D>::SUB_BLOCKS; ++p)
      D::decode_sub_block(block_scales, b, unit * Traits<D>::SUB_BLOCKS + p, w + p * (D::SUB / 4), scale[p],
          minimum[p]);
}

// Returns the start of an int32 sum of products whose codes are REGISTER_OFFSET too large: -REGISTER_OFFSET * sum(q).
template <int REGISTER_OFFSET> AI V initial_sum(const int32_t* minus_sum) {
  static_assert((REGISTER_OFFSET & (REGISTER_OFFSET - 1)) == 0, "offsets are powers of two");
  return REGISTER_OFFSET ? shl(broadcast(minus_sum), __builtin_ctz(REGISTER_OFFSET | 1 << 30)) : set(0);
}

#ifndef KTX_SUMS_IN_16_BITS
// How many products are added in 16 bits before they are widened; more than one only in simd_avx2.inl.
constexpr int sums_in_16_bits(int) { return 1; }
// Sums dot products of four bytes per lane in int32.
template <bool SIGNED, int SUMS> struct DotSum {
  V total;
  AI explicit DotSum(V first = V()) : total(first) {}
  AI void add_product(int, int, V w, V x) { total = dot<SIGNED>(total, w, x); }
};
#endif
#undef KTX_SUMS_IN_16_BITS

// ---- GEMV: weights are dequantized in registers and used at once ----------------------------------------------

// Multiplies one group of 16 rows by T tokens: out [T][16 rows]. All tokens use a code while it is in a register.
template <class D, int T>
static void gemv(const Layout& l, const uint8_t* group, const ActTiles& x, float* out, const Prefetcher& prefetcher) {
  typedef Traits<D> DTraits;
  F total[T];
  for (int t = 0; t < T; ++t) total[t] = zero();
  const int8_t* q = x.q;
  const int32_t* sums = D::SUB == 16 ? x.sum16 : x.sum32;
  const float *scaled_sums = D::SUB == 16 ? x.scaled_sum16 : x.scaled_sum32, *scales = x.scale;
  const int64_t blocks = x.k / D::BLOCK;
  const size_t plane = narrow_plane_bytes(l, x.k), words_stride = size_t(l.word_count()) * 64,
               narrow_stride = size_t(l.narrow_bytes) * 16;
  Block b = {group, group + plane, group + l.num_narrow_fields * plane};
  const int64_t unit_bytes = int64_t(words_stride + l.num_narrow_fields * narrow_stride) / DTraits::UNITS;
  // Prefetches lines up to `fetched` whenever units are decoded up to `reached`, so that prefetches are spread evenly.
  const uint8_t *fetched = group, *reached = group;
  for (int64_t i = 0; i < blocks; ++i) {
    prefetcher.prefetch_page(b.words);
    const typename D::BlockScales block_scales = D::load_scales(b);
    // Decodes unit u of the block, 32 columns, and adds its products with all tokens to `total`.
    const auto multiply_unit = [&](int u) __attribute__((always_inline)) {
      reached += unit_bytes;
      fetched += prefetcher.prefetch_lines(fetched, reached - fetched);
      V w[8];
      F scale[DTraits::SUB_BLOCKS], minimum[DTraits::SUB_BLOCKS];
      decode_unit<D>(block_scales, b, u, w, scale, minimum);
#pragma GCC unroll 8
      for (int t = 0; t < T; ++t) {
#pragma GCC unroll 2
        for (int p = 0; p < DTraits::SUB_BLOCKS; ++p) {
          constexpr int STEPS = D::SUB / 4;
          DotSum<D::SIGNED, sums_in_16_bits(D::MAX_CODE)> acc(initial_sum<DTraits::REGISTER_OFFSET>(sums + p * T + t));
#pragma GCC unroll 8
          for (int i = 0; i < STEPS; ++i) {
            const int g = p * STEPS + i;
            acc.add_product(i, STEPS, D::SIGNED && !D::WITH_OFFSET ? with_offset(w[g]) : w[g],
                broadcast(q + (g * T + t) * 4));
          }
          total[t] = fma(mulf(to_float(acc.total), scale[p]), broadcastf(scales + t), total[t]);
          if (D::MINIMUM) total[t] = fnma(minimum[p], broadcastf(scaled_sums + p * T + t), total[t]);
        }
      }
      q += 32 * T, sums += DTraits::SUB_BLOCKS * T, scaled_sums += DTraits::SUB_BLOCKS * T, scales += T;
    };
#ifndef KTX_SCALAR_LANES  // GCC 12 drops stores of unrolled units if a lane is a loop
    // Unrolled for constant shifts: with a single token dequantization is the bottleneck, not the products.
    if (T == 1) {
#pragma GCC unroll 8
      for (int u = 0; u < DTraits::UNITS; ++u) multiply_unit(u);
    } else
#endif
    {
#pragma GCC unroll 2
      for (int u = 0; u < DTraits::UNITS; ++u) multiply_unit(u);
    }
    b.narrow0 += narrow_stride, b.narrow1 += narrow_stride, b.words += words_stride;
  }
  for (int t = 0; t < T; ++t) storef(out + t * 16, total[t]);
}

// ---- GEMM: a span of weights is dequantized once into L1 and used by every tile --------------------------------

// SPAN (256) columns of one group as codes with scales and minimums. R of them fit the first-level cache.
struct Span {
  uint8_t w[SPAN / 4 * 64];                              // [column/4][16 rows][4]
  float scale[SPAN / 16 * 16], minimum[SPAN / 16 * 16];  // [sub-block][16 rows]
};
static_assert(2 * sizeof(Span) <= WORK_BYTES, "work buffer");

// Returns the memory of the span at column `from` of this group, to prefetch in `steps` calls; past the group's end,
// the first span of `next` and its narrow fields; nothing if there is no `next`.
template <class D>
AI PrefetchRange locate_next_span(const Layout& l, const uint8_t* group, int64_t k, int64_t from, const uint8_t* next,
    int steps) {
  if (from >= k && !next) return PrefetchRange();
  const uint8_t *words = from < k ? locate_block(l, group, k, from / D::BLOCK).words
                                  : locate_block(l, next, k, 0).words,
                *begin = from < k ? words : next;
  const int64_t columns = from < k ? k - from : k;
  return PrefetchRange(begin, words - begin + (columns < SPAN ? columns : SPAN) / D::BLOCK * l.word_count() * 64,
      steps);
}

// Decodes `length` columns of 16 rows, from column `from` of a group on, to codes, scales and minimums, which a GEMM
// then uses for all its tiles. SIGNED_BYTES: codes are stored as signed bytes around zero, for AMX; else they are
// REGISTER_OFFSET (Traits) larger, for `dot`.
template <class D, bool SIGNED_BYTES = false>
static void decode_span(const Layout& l, const uint8_t* group, int64_t k, int64_t from, int length, Span& out) {
  typedef Traits<D> DTraits;
  for (int at = 0, sub = 0; at < length; at += D::BLOCK) {
    const Block b = locate_block(l, group, k, (from + at) / D::BLOCK);
    const typename D::BlockScales block_scales = D::load_scales(b);
    for (int u = 0; u < DTraits::UNITS; ++u) {
      V w[8];
      F scale[DTraits::SUB_BLOCKS], minimum[DTraits::SUB_BLOCKS];
      decode_unit<D>(block_scales, b, u, w, scale, minimum);
      uint8_t* to = out.w + (at + u * 32) * 16;
      // The decoder has added SIGNED_OFFSET and AMX needs it removed, or it has not and `dot` needs it added:
      // with_offset does both, because both flip the top bit.
      constexpr bool FLIP_TOP_BIT = D::SIGNED && D::WITH_OFFSET == SIGNED_BYTES;
      constexpr bool SUBTRACT_OFFSET = !D::SIGNED && SIGNED_BYTES && D::OFFSET;
#pragma GCC unroll 8
      for (int g = 0; g < 8; ++g)
        store(to + g * 64, FLIP_TOP_BIT ? with_offset(w[g]) : SUBTRACT_OFFSET ? sub8(w[g], set8(D::OFFSET)) : w[g]);
      for (int p = 0; p < DTraits::SUB_BLOCKS; ++p, ++sub) {
        storef(out.scale + sub * 16, scale[p]);
        if (D::MINIMUM) storef(out.minimum + sub * 16, minimum[p]);
      }
    }
  }
}

// Adds to out [R groups, out_stride apart][T tokens][16 rows] the products of a span (`length` columns) and a tile of T
// tokens, by the formula at the top. All R * T sums are in registers: a code loaded serves T tokens, an activation R
// groups.
template <class D, int R, int T>
static void gemm_tile(const Span* spans, int length, const int8_t* q, const float* scales, const int32_t* sums,
    const float* scaled_sums, float* out, size_t out_stride) {
  F total[R * T];
#pragma GCC unroll 2
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 6
    for (int t = 0; t < T; ++t) total[r * T + t] = loadf(out + r * out_stride + t * 16);
  for (int s = 0; s < length / D::SUB; ++s) {
    DotSum<D::SIGNED, D::SUMS> acc[R * T];
#pragma GCC unroll 6
    for (int t = 0; t < T; ++t) {
      const V first = initial_sum<Traits<D>::REGISTER_OFFSET>(sums + t);
#pragma GCC unroll 2
      for (int r = 0; r < R; ++r) acc[r * T + t] = DotSum<D::SIGNED, D::SUMS>(first);
    }
#pragma GCC unroll 8
    for (int g = 0; g < D::SUB / 4; ++g) {
      V w[R];
#pragma GCC unroll 2
      for (int r = 0; r < R; ++r) w[r] = load(spans[r].w + (s * (D::SUB / 4) + g) * 64);
#pragma GCC unroll 6
      for (int t = 0; t < T; ++t) {
        const V x = broadcast(q + (g * T + t) * 4);
#pragma GCC unroll 2
        for (int r = 0; r < R; ++r) acc[r * T + t].add_product(g, D::SUB / 4, w[r], x);
      }
    }
#pragma GCC unroll 2
    for (int r = 0; r < R; ++r) {
      const F scale = loadf(spans[r].scale + s * 16);
#pragma GCC unroll 6
      for (int t = 0; t < T; ++t)
        total[r * T + t] = fma(mulf(to_float(acc[r * T + t].total), scale), broadcastf(scales + t), total[r * T + t]);
      if (D::MINIMUM) {
        const F minimum = loadf(spans[r].minimum + s * 16);
#pragma GCC unroll 6
        for (int t = 0; t < T; ++t) total[r * T + t] = fnma(minimum, broadcastf(scaled_sums + t), total[r * T + t]);
      }
    }
    q += D::SUB * T, sums += T, scaled_sums += T;
    if (D::SUB == 32 || s % 2) scales += T;
  }
#pragma GCC unroll 2
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 6
    for (int t = 0; t < T; ++t) storef(out + r * out_stride + t * 16, total[r * T + t]);
}

// What gemm_tile depends on, in place of the decoder: types with the same traits share the compiled kernel.
template <int SUB_, bool SIGNED_, int OFFSET_, bool MINIMUM_, int SUMS_ = 1> struct GemmTraits {
  static constexpr int SUB = SUB_, OFFSET = OFFSET_, BLOCK = SUB_, SUMS = SUMS_;
  static constexpr bool SIGNED = SIGNED_, MINIMUM = MINIMUM_;
};

typedef void (*TileKernel)(const Span*, int, const int8_t*, const float*, const int32_t*, const float*, float*, size_t);
// Returns gemm_tile for this number of tokens, 1 to KTX_TILE_TOKENS; S: GemmTraits.
template <class S, int R> static TileKernel select_gemm_tile(int tokens) {
  static const TileKernel table[] = {nullptr, gemm_tile<S, R, 1>, gemm_tile<S, R, 2>,
#if KTX_TILE_TOKENS >= 6
      gemm_tile<S, R, 3>, gemm_tile<S, R, 4>, gemm_tile<S, R, 5>, gemm_tile<S, R, 6>
#endif
  };
  return table[tokens];
}

// Multiplies R groups by all tiles of tokens, span by span: out [R][n tokens][16 rows]. `spans`: buffer for a span of
// each group. `next`: the weights that are multiplied next, to prefetch, or null.
template <class D, int R>
static void gemm(const Layout& l, const uint8_t* packed, const ActTiles& x, float* out, Span* spans,
    const uint8_t* next) {
  typedef GemmTraits<D::SUB, D::SIGNED, D::SIGNED ? 0 : D::OFFSET, D::MINIMUM, sums_in_16_bits(D::MAX_CODE)> S;
  const size_t group_stride = group_bytes(l, x.k), out_stride = size_t(x.n) * 16;
  const int32_t* sums = D::SUB == 16 ? x.sum16 : x.sum32;
  const float* scaled_sums = D::SUB == 16 ? x.scaled_sum16 : x.scaled_sum32;
  __builtin_memset(out, 0, R * out_stride * sizeof(float));
  for (int64_t from = 0; from < x.k; from += SPAN) {
    const int length = x.k - from < SPAN ? int(x.k - from) : SPAN;
    PrefetchRange ranges[R];  // fetched a few lines per tile, because a CPU drops prefetches when its buffers are full
    for (int r = 0; r < R; ++r) {
      decode_span<D>(l, packed + r * group_stride, x.k, from, length, spans[r]);
      ranges[r] = locate_next_span<D>(l, packed + r * group_stride, x.k, from + length,
          next ? next + r * group_stride : nullptr, x.tiles);
    }
    for (int tile = 0; tile < x.tiles; ++tile) {
      for (PrefetchRange& range : ranges) range.fetch();
      const int first = x.start(tile), tokens = x.start(tile + 1) - first;
      const int64_t at32 = first * (x.k / 32) + from / 32 * tokens;
      const int64_t at = first * (x.k / D::SUB) + from / D::SUB * tokens;
      select_gemm_tile<S, R>(tokens)(spans, length, x.q + first * x.k + from * tokens, x.scale + at32, sums + at,
          scaled_sums + at, out + first * 16, out_stride);
    }
  }
}
