// The kernels, over the verbs and decoders of one instruction set.

constexpr int SPAN = 256;  // k unpacked at once: 4 KB of weights for a group of 16 rows

// Weights that are read once are fetched this far ahead; and the page after next is touched, because in a large model every page is a miss of the
// page tables as well. Past the end of what was asked for, fetching goes on at the beginning of what comes next. A few lines at a time: a
// processor drops what it has no room to wait for.
constexpr int64_t LINES_AHEAD = 4096, SPANS_AHEAD = 6144, PAGES_AHEAD = 16384;
struct Upcoming {  // memory that will be read soon, fetched in so many steps
  const uint8_t *at, *end;
  int64_t lines;  // of a step
  AI explicit Upcoming(const uint8_t* begin = nullptr, int64_t bytes = 0, int steps = 1)
      : at(begin), end(begin + bytes), lines(((bytes + 63) / 64 + steps - 1) / steps) {}
  AI void fetch() {
    const uint8_t* to = at + lines * 64 < end ? at + lines * 64 : end;
    for (; at < to; at += 64) __builtin_prefetch(at, 0, 2);
  }
};
struct Ahead {
  const uint8_t* end;
  int64_t jump;
  AI Ahead(const uint8_t* end, const uint8_t* next) : end(end), jump(next ? next - end : -PAGES_AHEAD) {}
  AI const uint8_t* from(const uint8_t* p) const { return p + (p >= end ? jump : 0); }
  AI int64_t lines(const uint8_t* p, int64_t bytes) const {  // used once: not into the second-level cache; how many bytes, in whole lines
    const uint8_t* to = from(p + LINES_AHEAD);
    int64_t at = 0;
    for (; at < bytes; at += 64) __builtin_prefetch(to + at, 0, 0);
    return at;
  }
  AI Upcoming span(const uint8_t* p, int64_t bytes, int steps) const { return Upcoming(from(p + SPANS_AHEAD), bytes, steps); }
  AI void page(const uint8_t* p) const { __builtin_prefetch(from(p + PAGES_AHEAD), 0, 2); }
};

template <int N> struct Int { static constexpr int value = N; };

AI Block block_at(const Layout& l, const uint8_t* group, int64_t k, int64_t b) {
  const size_t plane = narrow_plane(l, k);
  return {group + b * l.narrow_bytes * 16, group + plane + b * l.narrow_bytes * 16,
          group + l.narrows * plane + b * size_t(l.word_count()) * 64};
}

template <class D> struct Traits {
  static constexpr int OFF = D::SIGNED ? SIGNED_OFFSET : D::OFFSET;  // what the carried codes have too much
  static constexpr int UNITS = D::BLOCK / 32;  // of 32 k, which share an activation scale
  static constexpr int PARTS = 32 / D::SUB;    // sub-blocks of a unit
};

// A unit's eight vectors, and the scale and minimum of each of its sub-blocks.
template <class D> AI void decode(const typename D::Head& head, const Block& b, int unit, V* w, F* scale, F* minimum) {
  if constexpr (D::WHOLE_UNITS) D::unit(head, b, unit, w, scale);
  else
    for (int p = 0; p < Traits<D>::PARTS; ++p) D::part(head, b, unit * Traits<D>::PARTS + p, w + p * (D::SUB / 4), scale[p], minimum[p]);
}

// Where a sum of products starts when the codes are OFF too large.
template <int OFF> AI V offset_by(const int32_t* minus_sum) {
  static_assert((OFF & (OFF - 1)) == 0, "offsets are powers of two");
  return OFF ? shl(broadcast(minus_sum), __builtin_ctz(OFF | 1 << 30)) : set(0);
}

#ifndef KTX_NARROW_SUMS
constexpr int room_for(int) { return 1; }
// The sum of `steps` dot products a lane.
template <bool SIGNED, int ROOM> struct Sum {
  V total;
  AI explicit Sum(V first = V()) : total(first) {}
  AI void add_product(int, int, V w, V x) { total = dot<SIGNED>(total, w, x); }
};
#endif
#undef KTX_NARROW_SUMS

// ---- few tokens: weights are expanded in registers and used at once --------------------------------------------------

template <class D, int T>
static void multiply_few(const Layout& l, const uint8_t* group, const Tokens& x, float* out, const Ahead& ahead) {
  typedef Traits<D> R;
  F total[T];
  for (int t = 0; t < T; ++t) total[t] = zero();
  const int8_t* q = x.q;
  const int32_t* sums = D::SUB == 16 ? x.sum16 : x.sum32;
  const float *parts = D::SUB == 16 ? x.part16 : x.part32, *scales = x.scale;
  const int64_t blocks = x.k / D::BLOCK;
  const size_t plane = narrow_plane(l, x.k), words = size_t(l.word_count()) * 64, narrow = size_t(l.narrow_bytes) * 16;
  Block b = {group, group + plane, group + l.narrows * plane};
  const int64_t unit_bytes = int64_t(words + l.narrows * narrow) / R::UNITS;
  const uint8_t *fetched = group, *reached = group;  // all of the group in its order, at the pace of the units
  for (int64_t i = 0; i < blocks; ++i) {
    ahead.page(b.words);
    const typename D::Head head = D::head(b);
    const auto unit = [&](int u) __attribute__((always_inline)) {
      reached += unit_bytes;
      fetched += ahead.lines(fetched, reached - fetched);
      V w[8];
      F scale[R::PARTS], minimum[R::PARTS];
      decode<D>(head, b, u, w, scale, minimum);
#pragma GCC unroll 8
      for (int t = 0; t < T; ++t) {
#pragma GCC unroll 2
        for (int p = 0; p < R::PARTS; ++p) {
          constexpr int STEPS = D::SUB / 4;
          Sum<D::SIGNED, room_for(D::MOST)> acc(offset_by<R::OFF>(sums + p * T + t));
#pragma GCC unroll 8
          for (int i = 0; i < STEPS; ++i) {
            const int g = p * STEPS + i;
            acc.add_product(i, STEPS, D::SIGNED && !D::CARRIED ? carried(w[g]) : w[g], broadcast(q + (g * T + t) * 4));
          }
          total[t] = fma(mulf(to_float(acc.total), scale[p]), broadcastf(scales + t), total[t]);
          if (D::MINIMUM) total[t] = fnma(minimum[p], broadcastf(parts + p * T + t), total[t]);
        }
      }
      q += 32 * T, sums += R::PARTS * T, parts += R::PARTS * T, scales += T;
    };
#ifndef KTX_LOOPED  // where a lane is a loop, GCC 12 drops stores of the unrolled units
    if (T == 1) {  // shifts by numbers that are known: a token alone leaves the multiplier idle, decoding is what takes time
#pragma GCC unroll 8
      for (int u = 0; u < R::UNITS; ++u) unit(u);
    } else
#endif
    {
#pragma GCC unroll 2
      for (int u = 0; u < R::UNITS; ++u) unit(u);
    }
    b.n0 += narrow, b.n1 += narrow, b.words += words;
  }
  for (int t = 0; t < T; ++t) storef(out + t * 16, total[t]);
}

// ---- many tokens: a span of weights is expanded once into L1 and used by every tile -----------------------------------

struct Span {  // one group's expanded weights
  uint8_t w[SPAN / 4 * 64];
  float scale[SPAN / 16 * 16], minimum[SPAN / 16 * 16];
};
static_assert(2 * sizeof(Span) <= WORK_BYTES, "work buffer");

// The span of column `from`: of this group, or behind its end the first of `next` with its narrow fields.
template <class D> AI Upcoming span_at(const Layout& l, const uint8_t* group, int64_t k, int64_t from, const uint8_t* next, int steps) {
  if (from >= k && !next) return Upcoming();
  const uint8_t *words = from < k ? block_at(l, group, k, from / D::BLOCK).words : block_at(l, next, k, 0).words, *begin = from < k ? words : next;
  const int64_t columns = from < k ? k - from : k;
  return Upcoming(begin, words - begin + (columns < SPAN ? columns : SPAN) / D::BLOCK * l.word_count() * 64, steps);
}

// PLAIN: codes as signed bytes without what is carried or too much.
template <class D, bool PLAIN = false>
static void expand(const Layout& l, const uint8_t* group, int64_t k, int64_t from, int length, Span& out) {
  typedef Traits<D> R;
  for (int at = 0, sub = 0; at < length; at += D::BLOCK) {
    const Block b = block_at(l, group, k, (from + at) / D::BLOCK);
    const typename D::Head head = D::head(b);
    for (int u = 0; u < R::UNITS; ++u) {
      V w[8];
      F scale[R::PARTS], minimum[R::PARTS];
      decode<D>(head, b, u, w, scale, minimum);
      uint8_t* to = out.w + (at + u * 32) * 16;
#pragma GCC unroll 8
      for (int g = 0; g < 8; ++g)
        store(to + g * 64, D::SIGNED ? (D::CARRIED == PLAIN ? carried(w[g]) : w[g]) : PLAIN && D::OFFSET ? sub8(w[g], set8(D::OFFSET)) : w[g]);
      for (int p = 0; p < R::PARTS; ++p, ++sub) {
        storef(out.scale + sub * 16, scale[p]);
        if (D::MINIMUM) storef(out.minimum + sub * 16, minimum[p]);
      }
    }
  }
}

template <class D, int R, int T>
static void multiply_tile(const Span* spans, int length, const int8_t* q, const float* scales, const int32_t* sums,
                          const float* parts, float* out, size_t stride) {
  F total[R * T];
#pragma GCC unroll 2
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 6
    for (int t = 0; t < T; ++t) total[r * T + t] = loadf(out + r * stride + t * 16);
  for (int s = 0; s < length / D::SUB; ++s) {
    Sum<D::SIGNED, D::ROOM> acc[R * T];
#pragma GCC unroll 6
    for (int t = 0; t < T; ++t) {
      const V first = offset_by<Traits<D>::OFF>(sums + t);
#pragma GCC unroll 2
      for (int r = 0; r < R; ++r) acc[r * T + t] = Sum<D::SIGNED, D::ROOM>(first);
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
        for (int t = 0; t < T; ++t) total[r * T + t] = fnma(minimum, broadcastf(parts + t), total[r * T + t]);
      }
    }
    q += D::SUB * T, sums += T, parts += T;
    if (D::SUB == 32 || s % 2) scales += T;
  }
#pragma GCC unroll 2
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 6
    for (int t = 0; t < T; ++t) storef(out + r * stride + t * 16, total[r * T + t]);
}

// The tile kernel depends on the type only through these traits, so types of one shape share the code.
template <int SUB_, bool SIGNED_, int OFFSET_, bool MINIMUM_, int ROOM_ = 1> struct Shape {
  static constexpr int SUB = SUB_, OFFSET = OFFSET_, BLOCK = SUB_, ROOM = ROOM_;
  static constexpr bool SIGNED = SIGNED_, MINIMUM = MINIMUM_;
};

typedef void (*TileKernel)(const Span*, int, const int8_t*, const float*, const int32_t*, const float*, float*, size_t);
template <class S, int R> static TileKernel tile_kernel(int tokens) {
  static const TileKernel table[] = {nullptr, multiply_tile<S, R, 1>, multiply_tile<S, R, 2>,
#if KTX_TILE >= 6
                                     multiply_tile<S, R, 3>, multiply_tile<S, R, 4>, multiply_tile<S, R, 5>, multiply_tile<S, R, 6>
#endif
  };
  return table[tokens];
}

#ifdef KTX_TILES
#include "tiles_ints.inl"
template <class D> struct WideInts;  // see tiles_wide.inl
template <class W> static void multiply_wide(const Layout& l, const uint8_t* packed, int groups, const Tokens& x, float* out, uint8_t* work, const uint8_t* next);
#endif

template <class D, int R>
static void multiply_many(const Layout& l, const uint8_t* packed, const Tokens& x, float* out, Span* spans, const uint8_t* next) {
  typedef Shape<D::SUB, D::SIGNED, D::SIGNED ? 0 : D::OFFSET, D::MINIMUM, room_for(D::MOST)> S;
  const size_t group = group_bytes(l, x.k), stride = size_t(x.n) * 16;
  const int32_t* sums = D::SUB == 16 ? x.sum16 : x.sum32;
  const float* parts = D::SUB == 16 ? x.part16 : x.part32;
  __builtin_memset(out, 0, R * stride * sizeof(float));
  for (int64_t from = 0; from < x.k; from += SPAN) {
    const int length = x.k - from < SPAN ? int(x.k - from) : SPAN;
    Upcoming upcoming[R];  // a few lines beside each tile: a processor drops what it has no room to wait for
    for (int r = 0; r < R; ++r) {
      expand<D>(l, packed + r * group, x.k, from, length, spans[r]);
      upcoming[r] = span_at<D>(l, packed + r * group, x.k, from + length, next ? next + r * group : nullptr, x.tiles);
    }
    for (int tile = 0; tile < x.tiles; ++tile) {
      for (Upcoming& u : upcoming) u.fetch();
      const int first = x.start(tile), tokens = x.start(tile + 1) - first;
      const int64_t at32 = first * (x.k / 32) + from / 32 * tokens;
      const int64_t at = first * (x.k / D::SUB) + from / D::SUB * tokens;
      tile_kernel<S, R>(tokens)(spans, length, x.q + first * x.k + from * tokens, x.scale + at32, sums + at, parts + at,
                                out + first * 16, stride);
    }
  }
}

#ifdef KTX_FAST
#include "fast.inl"
#endif

template <class D>
static void multiply_ints(const Layout& l, const uint8_t* packed, int groups, const Tokens& x, float* out, uint8_t* work,
                          const uint8_t* next) {
  const size_t group = group_bytes(l, x.k), stride = size_t(x.n) * 16;
#ifdef KTX_TILES
  if (x.wide) return multiply_wide<WideInts<D>>(l, packed, groups, x, out, work, next);
#endif
  const Ahead ahead(packed + groups * group, next);
  int g = 0;
  if (x.tiles == 1 && x.n <= KTX_FEW) {
    for (; g < groups; ++g, packed += group, out += stride) {
      switch (x.n) {
        case 1: multiply_few<D, 1>(l, packed, x, out, ahead); break;
        case 2: multiply_few<D, 2>(l, packed, x, out, ahead); break;
#if KTX_FEW == 8
        case 3: multiply_few<D, 3>(l, packed, x, out, ahead); break;
        case 4: multiply_few<D, 4>(l, packed, x, out, ahead); break;
        case 5: multiply_few<D, 5>(l, packed, x, out, ahead); break;
        case 6: multiply_few<D, 6>(l, packed, x, out, ahead); break;
        case 7: multiply_few<D, 7>(l, packed, x, out, ahead); break;
        case 8: multiply_few<D, 8>(l, packed, x, out, ahead); break;
#endif
      }
    }
    return;
  }
#ifdef KTX_TILES
  return multiply_tiles<D>(l, packed, groups, x, out, work, next);
#else
  Span* spans = reinterpret_cast<Span*>(work);
#ifdef KTX_FAST
  if constexpr (range_of<D>().most) {
    for (; fast_gemm() && g + 2 <= groups; g += 2, packed += 2 * group, out += 2 * stride)
      multiply_fast<D, 2>(l, packed, x, out, spans, g + 2 < groups ? packed + 2 * group : next);
    for (; fast_gemm() && g < groups; ++g, packed += group, out += stride)
      multiply_fast<D, 1>(l, packed, x, out, spans, g + 1 < groups ? packed + group : next);
  }
#endif
#if KTX_TILE >= 6
  for (; g + 2 <= groups; g += 2, packed += 2 * group, out += 2 * stride)
    multiply_many<D, 2>(l, packed, x, out, spans, g + 2 < groups ? packed + 2 * group : next);
#endif
  for (; g < groups; ++g, packed += group, out += stride)
    multiply_many<D, 1>(l, packed, x, out, spans, g + 1 < groups ? packed + group : next);
#endif
}

// ---- float weights -----------------------------------------------------------------------------------------------------

// Two columns of 16 rows. STEP: what the values must be multiplied with; it goes into the scales. IN_BF16: bf16 holds them exactly.
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
struct LF8 {  // e4m3 as the f16 with the same bits in its upper byte, less one place of exponent: 2^8 mends the bias (subnormals too)
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
AI const float* scales_of(const uint8_t* group, int64_t k) { return reinterpret_cast<const float*>(group + (k * 16 + 63) / 64 * 64); }  // of e4m3, after its codes
template <class L> AI F float_scale(const uint8_t* group, int64_t k, int64_t from) {
  return L::BYTES == 1 ? mulf(loadf(scales_of(group, k) + from / 128 * 16), setf(L::STEP)) : setf(1);
}
constexpr int FLOAT_TILE = KTX_TILE < 6 ? KTX_TILE : 6;  // tokens whose sums are in registers
constexpr int FLOAT_SPAN = 128;  // columns that share a scale, and that are expanded at once

// One tile of tokens: weights are expanded in registers.
template <class L, int T>
static void multiply_float_few(const uint8_t* group, int64_t k, const float* x, float* out, const Ahead& ahead) {
  F total[T];
#pragma GCC unroll 6
  for (int t = 0; t < T; ++t) total[t] = zero();
  for (int64_t from = 0; from < k; from += FLOAT_SPAN) {
    const int64_t to = from + FLOAT_SPAN < k ? from + FLOAT_SPAN : k;
    ahead.page(group + from * 16 * L::BYTES);
    F sum[T];
#pragma GCC unroll 6
    for (int t = 0; t < T; ++t) sum[t] = zero();
    int64_t i = from;
    for (; i + 2 <= to; i += 2) {
      F a, b;
      if (i % 4 == 0) ahead.lines(group + i * 16 * L::BYTES, 64 * L::BYTES);
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

// Many tokens: a span of weights is expanded once, [column][group][16], and used by every tile.
template <int R, int T>
static void multiply_float_tile(const float* w, int columns, const float* x, int step, const F* scale, float* out, size_t stride) {
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

typedef void (*FloatTile)(const float*, int, const float*, int, const F*, float*, size_t);
template <int R> static FloatTile float_tile(int tokens) {
  static const FloatTile table[] = {nullptr, multiply_float_tile<R, 1>, multiply_float_tile<R, 2>,
#if KTX_TILE >= 6
                                    multiply_float_tile<R, 3>, multiply_float_tile<R, 4>, multiply_float_tile<R, 5>, multiply_float_tile<R, 6>
#endif
  };
  return table[tokens];
}

template <class L, int R>
static void multiply_float_many(const uint8_t* packed, size_t group, const Tokens& x, float* out, float* span, const Ahead& ahead) {
  const size_t stride = size_t(x.n) * 16;
  __builtin_memset(out, 0, R * stride * sizeof(float));
  for (int64_t from = 0; from < x.k; from += FLOAT_SPAN) {
    const int64_t to = from + FLOAT_SPAN < x.k ? from + FLOAT_SPAN : x.k;
    F scale[R];
    Upcoming upcoming[R];
    for (int r = 0; r < R; ++r) {
      const uint8_t* here = packed + r * group + from * 16 * L::BYTES;
      upcoming[r] = ahead.span(here, (to - from) * 16 * L::BYTES, x.tiles);
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
      for (Upcoming& u : upcoming) u.fetch();
      const int first = x.start(tile), tokens = x.start(tile + 1) - first;
      for (int t = 0; t < tokens; t += FLOAT_TILE)
        float_tile<R>(tokens - t < FLOAT_TILE ? tokens - t : FLOAT_TILE)(span, int(to - from), x.f + first * x.k + from * tokens + t, tokens, scale, out + (first + t) * 16, stride);
    }
  }
}

#ifdef KTX_BF16
// `columns` of a group as pairs of bf16, the 16 rows of a pair `step` words after those before.
template <class L> AI void expand_pairs(const uint8_t* here, int columns, uint32_t* w, int step) {
  int i = 0;
  for (; i + 4 <= columns; i += 4, w += 2 * step, here += 64 * L::BYTES) {
    Pairs a, b;
    L::four(here, a, b);
    store_pairs(w, a), store_pairs(w + step, b);
  }
  if (i < columns) store_pairs(w, L::pairs(here));
}

// One tile of tokens: pairs are made in registers.
template <class L, int T>
static void multiply_pair_few(const uint8_t* group, int64_t k, const uint32_t* x, float* out, const Ahead& ahead) {
  F total[T];
#pragma GCC unroll 6
  for (int t = 0; t < T; ++t) total[t] = zero();
  for (int64_t from = 0; from < k; from += FLOAT_SPAN) {
    const int64_t to = from + FLOAT_SPAN < k ? from + FLOAT_SPAN : k;
    ahead.page(group + from * 16 * L::BYTES);
    F sum[T], other[T];
#pragma GCC unroll 6
    for (int t = 0; t < T; ++t) sum[t] = other[t] = zero();
    int64_t i = from;
    for (; i + 4 <= to; i += 4) {  // two chains: one would wait for itself
      Pairs a, b;
      ahead.lines(group + i * 16 * L::BYTES, 64 * L::BYTES);
      L::four(group + i * 16 * L::BYTES, a, b);
#pragma GCC unroll 6
      for (int t = 0; t < T; ++t) sum[t] = dot_pairs(sum[t], x + i / 2 * T + t, a), other[t] = dot_pairs(other[t], x + (i / 2 + 1) * T + t, b);
    }
    if (i < to) {
      const Pairs a = L::pairs(group + i * 16 * L::BYTES);
#pragma GCC unroll 6
      for (int t = 0; t < T; ++t) sum[t] = dot_pairs(sum[t], x + i / 2 * T + t, a);
    }
    const F scale = float_scale<L>(group, k, from);
#pragma GCC unroll 6
    for (int t = 0; t < T; ++t) total[t] = fma(addf(sum[t], other[t]), scale, total[t]);
  }
#pragma GCC unroll 6
  for (int t = 0; t < T; ++t) storef(out + t * 16, total[t]);
}

template <int R, int T> AI void add_pairs(const uint32_t* w, const uint32_t* x, F* total) {
  Pairs v[R];
#pragma GCC unroll 2
  for (int r = 0; r < R; ++r) v[r] = load_pairs(w + r * 16);
#pragma GCC unroll 6
  for (int t = 0; t < T; ++t) {
#pragma GCC unroll 2
    for (int r = 0; r < R; ++r) total[r * T + t] = dot_pairs(total[r * T + t], x + t, v[r]);
  }
}

// Many tokens in bf16: weights lose nothing, activations what rounding to eight bits takes (0.1 %), sums are f32. Summed in the order of few tokens.
template <int R, int T> static void multiply_pair_tile(const uint32_t* w, int pairs, const uint32_t* x, int step, const F* scale, float* out, size_t stride) {
  F total[R * T], other[R * T];
#pragma GCC unroll 12
  for (int i = 0; i < R * T; ++i) total[i] = other[i] = zero();
  int i = 0;
  for (; i + 2 <= pairs; i += 2, w += 2 * R * 16, x += 2 * step) add_pairs<R, T>(w, x, total), add_pairs<R, T>(w + R * 16, x + step, other);
  if (i < pairs) add_pairs<R, T>(w, x, total);
#pragma GCC unroll 2
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 6
    for (int t = 0; t < T; ++t) {
      float* to = out + r * stride + t * 16;
      storef(to, fma(addf(total[r * T + t], other[r * T + t]), scale[r], loadf(to)));
    }
}

typedef void (*PairTile)(const uint32_t*, int, const uint32_t*, int, const F*, float*, size_t);
template <int R> static PairTile pair_tile(int tokens) {
  static const PairTile table[] = {nullptr, multiply_pair_tile<R, 1>, multiply_pair_tile<R, 2>, multiply_pair_tile<R, 3>,
                                   multiply_pair_tile<R, 4>, multiply_pair_tile<R, 5>, multiply_pair_tile<R, 6>};
  return table[tokens];
}

template <class L, int R>
static void multiply_pair_many(const uint8_t* packed, size_t group, const Tokens& x, float* out, uint32_t* span, const Ahead& ahead) {
  const size_t stride = size_t(x.n) * 16;
  __builtin_memset(out, 0, R * stride * sizeof(float));
  for (int64_t from = 0; from < x.k; from += FLOAT_SPAN) {
    const int64_t to = from + FLOAT_SPAN < x.k ? from + FLOAT_SPAN : x.k;
    F scale[R];
    Upcoming upcoming[R];
    for (int r = 0; r < R; ++r) {
      const uint8_t* here = packed + r * group + from * 16 * L::BYTES;
      upcoming[r] = ahead.span(here, (to - from) * 16 * L::BYTES, x.tiles);
      scale[r] = float_scale<L>(packed + r * group, x.k, from);
      expand_pairs<L>(here, int(to - from), span + r * 16, R * 16);
    }
    for (int tile = 0; tile < x.tiles; ++tile) {
      for (Upcoming& u : upcoming) u.fetch();
      const int first = x.start(tile), tokens = x.start(tile + 1) - first;
      for (int t = 0; t < tokens; t += FLOAT_TILE)
        pair_tile<R>(tokens - t < FLOAT_TILE ? tokens - t : FLOAT_TILE)(span, int(to - from) / 2, x.pair + first * (x.k / 2) + from / 2 * tokens + t, tokens, scale, out + (first + t) * 16, stride);
    }
  }
}
#endif

#ifdef KTX_TILES
#include "tiles_wide.inl"
#endif

template <class L, int R>
static void multiply_float_groups(const uint8_t* packed, size_t group, const Tokens& x, float* out, uint8_t* work, const Ahead& ahead) {
#ifdef KTX_BF16
  if constexpr (L::IN_BF16)
    if (x.pair) return multiply_pair_many<L, R>(packed, group, x, out, reinterpret_cast<uint32_t*>(work), ahead);
#endif
  multiply_float_many<L, R>(packed, group, x, out, reinterpret_cast<float*>(work), ahead);
}

template <class L, int T> AI void multiply_few_floats(const uint8_t* packed, const Tokens& x, float* out, const Ahead& ahead) {
#ifdef KTX_BF16
  if constexpr (L::IN_BF16)
    if (x.pair) return multiply_pair_few<L, T>(packed, x.k, x.pair, out, ahead);
#endif
  multiply_float_few<L, T>(packed, x.k, x.f, out, ahead);
}

template <class L>
static void multiply_floats(const Layout& l, const uint8_t* packed, int groups, const Tokens& x, float* out, uint8_t* work, const uint8_t* next) {
  const size_t group = group_bytes(l, x.k), stride = size_t(x.n) * 16;
#ifdef KTX_TILES
  if constexpr (L::IN_BF16)
    if (x.wide && x.pair) return multiply_wide<WideFloats<L>>(l, packed, groups, x, out, work, next);
#endif
  const Ahead ahead(packed + groups * group, next);
  int g = 0;
  if (x.tiles == 1 && x.n <= FLOAT_TILE) {
    for (; g < groups; ++g, packed += group, out += stride) {
      switch (x.n) {
        case 1: multiply_few_floats<L, 1>(packed, x, out, ahead); break;
        case 2: multiply_few_floats<L, 2>(packed, x, out, ahead); break;
#if KTX_TILE >= 6
        case 3: multiply_few_floats<L, 3>(packed, x, out, ahead); break;
        case 4: multiply_few_floats<L, 4>(packed, x, out, ahead); break;
        case 5: multiply_few_floats<L, 5>(packed, x, out, ahead); break;
        case 6: multiply_few_floats<L, 6>(packed, x, out, ahead); break;
#endif
      }
    }
    return;
  }
#if KTX_TILE >= 6
  for (; g + 2 <= groups; g += 2, packed += 2 * group, out += 2 * stride) multiply_float_groups<L, 2>(packed, group, x, out, work, ahead);
#endif
  for (; g < groups; ++g, packed += group, out += stride) multiply_float_groups<L, 1>(packed, group, x, out, work, ahead);
}

// ---- exact unpacking ------------------------------------------------------------------------------------------------------

template <class D> static void unpack_ints(const Layout& l, const uint8_t* group, int64_t k, float* out) {
  typedef Traits<D> R;
  for (int64_t i = 0; i < k / D::BLOCK; ++i) {
    const Block b = block_at(l, group, k, i);
    const typename D::Head head = D::head(b);
    for (int u = 0; u < R::UNITS; ++u) {
      V w[8];
      F scales[R::PARTS], minimums[R::PARTS];
      decode<D>(head, b, u, w, scales, minimums);
      for (int j = 0; j < 32; ++j, out += 16) {
        const F scale = scales[j / D::SUB], minimum = D::MINIMUM ? minimums[j / D::SUB] : zero();
        V code = byte(w[j / 4], j % 4);
        code = D::SIGNED ? sign_extend8(D::CARRIED ? carried(code) : code) : add(code, set(uint32_t(-D::OFFSET)));
        const F value = mulf(scale, to_float(code));
        storef(out, D::MINIMUM ? fma(minimum, setf(-1), value) : value);
      }
    }
  }
}

template <class L> static void unpack_floats(const Layout&, const uint8_t* group, int64_t k, float* out) {
  for (int64_t i = 0; i < k; i += 2) {
    F a, b;
    if (i + 2 <= k) L::pair(group + i * 16 * L::BYTES, a, b);
    else last_column<L>(group + i * 16 * L::BYTES, a, b);
    const F scale = float_scale<L>(group, k, i);  // two columns of one pair share it
    storef(out + i * 16, mulf(a, scale));
    if (i + 1 < k) storef(out + (i + 1) * 16, mulf(b, scale));
  }
}

// ---- dispatch on the type -------------------------------------------------------------------------------------------------

// An instruction set that adds to another compiles the types that gain by it; KTX_BASE are the kernels of the other, which have the rest.
#ifndef KTX_BASE
#define KTX_INTS(X)                                                                                                          \
  X(Q4_0) X(Q4_1) X(Q5_0) X(Q5_1) X(Q8_0) X(Q2_K) X(Q3_K) X(Q4_K) X(Q5_K) X(Q6_K) X(IQ4_NL) X(IQ4_XS) X(MXFP4) X(TQ1_0)      \
  X(TQ2_0) X(IQ2_XXS) X(IQ2_XS) X(IQ2_S) X(IQ3_XXS) X(IQ3_S) X(IQ1_S) X(IQ1_M) X(INT8_128) X(INT4_64)      \
  X(INT4_128)
#define KTX_FLOATS(X) X(F32, LF32) X(F16, LF16) X(BF16, LBF16) X(F8_E4M3, LF8)
#endif

typedef void (*Multiply)(const Layout&, const uint8_t*, int, const Tokens&, float*, uint8_t*, const uint8_t*);
typedef void (*Unpack)(const Layout&, const uint8_t*, int64_t, float*);
struct Row { int code; Multiply multiply; Unpack unpack; };
static const Row ROWS[] = {
#define X(name) {ktx::name, multiply_ints<D##name>, unpack_ints<D##name>},
    KTX_INTS(X)
#undef X
#define X(name, L) {ktx::name, multiply_floats<L>, unpack_floats<L>},
    KTX_FLOATS(X)
#undef X
};

static Row row_of(int code) {
  for (const Row& row : ROWS)
    if (row.code == code) return row;
#ifdef KTX_BASE
  return {code, KTX_BASE.multiply, KTX_BASE.unpack};
#else
  __builtin_trap();  // the drivers check the code before they come here
#endif
}
static void multiply(const Layout& l, const uint8_t* packed, int groups, const Tokens& x, float* out, uint8_t* work,
                     const uint8_t* next) {
  row_of(l.code).multiply(l, packed, groups, x, out, work, next);
}
static void unpack(const Layout& l, const uint8_t* group, int64_t k, float* out) { row_of(l.code).unpack(l, group, k, out); }

// ---- activations ----------------------------------------------------------------------------------------------------------

static void quantise(const float* x, int64_t step, int64_t k, RowView out) {
#ifdef KTX_FAST
  const bool wide = fast_gemm();  // then two neighbours share a scale
#else
  constexpr bool wide = false;
#endif
  float most = 0;
  for (int64_t b = 0; b < k / 32; ++b, x += 2 * step) {
    const F lo = loadf(x), hi = loadf(x + step);
    if (!wide || b % 2 == 0) {
      // As integers, so that a NaN is the largest of all: it must reach the scale, its code cannot tell.
      V largest = maxu(as_int(absf(lo)), as_int(absf(hi)));
      if (wide && b + 1 < k / 32) largest = maxu(largest, maxu(as_int(absf(loadf(x + 2 * step))), as_int(absf(loadf(x + 3 * step)))));
      const uint32_t bits = largest_lane(largest);
      __builtin_memcpy(&most, &bits, 4);
    }
    const F inverse = setf(most > 0 ? 127.0f / most : 0.0f);
    const V low = to_int(mulf(lo, inverse)), high = to_int(mulf(hi, inverse));
    out.scale[b] = most / 127.0f;
    store_s8(out.q + b * 32, low), store_s8(out.q + b * 32 + 16, high);
    out.sum16[2 * b] = sum_lanes(low), out.sum16[2 * b + 1] = sum_lanes(high);
  }
}

// ---- weights made on loading -----------------------------------------------------------------------------------------------

// Codes low..high of n weights (a multiple of 16) with this scale, and their squared error; larger weights count for more.
AI F round_to(const float* x, F inverse, float low, float high) { return minf(maxf(to_float(to_int(mulf(loadf(x), inverse))), setf(low)), setf(high)); }
AI float weighted_error(const float* x, int n, float scale, float low, float high, float mean) {
  const F d = setf(scale), inverse = setf(scale != 0 ? 1 / scale : 0.0f);
  F error = zero();
  for (int i = 0; i < n; i += 16) {
    const F v = loadf(x + i), off = fnma(round_to(x + i, inverse, low, high), d, v);
    error = fma(mulf(off, off), fma(v, v, setf(mean)), error);
  }
  return sum_lanes(error);
}

// One block of symmetric codes: the scale (f16) around the obvious one with the least error, then int8, or nibbles plus 8.
static void quantise_block(const float* x, int n, bool four, uint8_t* out) {
  float extreme = 0, mean = 0;
  for (int i = 0; i < n; ++i) extreme = x[i] * x[i] > extreme * extreme ? x[i] : extreme, mean += x[i] * x[i];
  mean /= float(n);
  const float low = four ? -8.0f : -127.0f, high = four ? 7.0f : 127.0f;
  uint16_t best = to_f16(extreme / low);
  if (four) {
    float least = -1;
    for (int step = -4; step <= 4; ++step) {
      const uint16_t scale = to_f16(extreme / low * (1 + 0.03f * float(step)));
      const float error = weighted_error(x, n, from_f16(scale), low, high, mean);
      if (least < 0 || error < least) least = error, best = scale;
    }
  }
  const float scale = from_f16(best);
  const F inverse = setf(scale != 0 ? 1 / scale : 0.0f);
  __builtin_memcpy(out, &best, 2);
  int8_t codes[128];
  for (int i = 0; i < n; i += 16) store_s8(codes + i, to_int(round_to(x + i, inverse, low, high)));
  if (!four) {
    __builtin_memcpy(out + 2, codes, size_t(n));
    return;
  }
  for (int i = 0; i < n; i += 32)
    for (int j = 0; j < 16; ++j) out[2 + i / 2 + j] = uint8_t((codes[i + j] + 8) | (codes[i + 16 + j] + 8) << 4);
}

static void place(const RowView& row, const Tokens& to, Spot token, int64_t from, int64_t length) {
  const int first = token.first, T = token.count, t = token.at;
  const int64_t at16 = first * (to.k / 16) + from / 16 * T + t, at32 = first * (to.k / 32) + from / 32 * T + t;
  int32_t *q = reinterpret_cast<int32_t*>(to.q + first * to.k + from * T) + t, *s16 = to.sum16 + at16, *s32 = to.sum32 + at32;
  float *scale = to.scale + at32, *p16 = to.part16 + at16, *p32 = to.part32 + at32;
#ifdef KTX_TILES
  if (to.n > KTX_FEW) {
    int8_t* rows = to.q + first * to.k + from * T + t * 32;
    for (int64_t i = 0; i < length; i += 32) __builtin_memcpy(rows + i * T, row.q + i, 32);
  } else
#endif
  {
    const int32_t* source = reinterpret_cast<const int32_t*>(row.q);
    for (int64_t i = 0; i < length / 4; ++i) q[i * T] = source[i];
  }
  for (int64_t i = 0; i < length / 32; ++i) {
    const int32_t a = row.sum16[2 * i], b = row.sum16[2 * i + 1];
    const float d = row.scale[i];
    scale[i * T] = d, s16[2 * i * T] = -a, s16[(2 * i + 1) * T] = -b, s32[i * T] = -a - b;
    p16[2 * i * T] = d * float(a), p16[(2 * i + 1) * T] = d * float(b), p32[i * T] = d * float(a + b);
  }
}

static void place_floats(const float* x, const Tokens& to, Spot token, int64_t from, int64_t length) {
  const int first = token.first, T = token.count, t = token.at;
  if (to.f) {
    float* f = to.f + first * to.k + from * T + t;
    for (int64_t i = 0; i < length; ++i) f[i * T] = x[i];
  }
#ifdef KTX_BF16
  if (!to.pair) return;
#ifdef KTX_TILES
  if (to.wide) {
    uint32_t* rows = to.pair + first * (to.k / 2) + from / 2 * T + t * 16;
    for (int64_t i = 0; i < length; i += 32) store(rows + i / 2 * T, bf16_pairs(loadf(x + i), loadf(x + i + 16)));
    return;
  }
#endif
  uint32_t* pair = to.pair + first * (to.k / 2) + from / 2 * T + t;
  for (int64_t i = 0; i < length; i += 32) {
    float columns[32] = {};
    uint32_t words[16];
    const int64_t count = length - i < 32 ? length - i : 32;
    __builtin_memcpy(columns, x + i, size_t(count) * 4);
    store(words, bf16_pairs(loadf(columns), loadf(columns + 16)));
    for (int64_t j = 0; j < count / 2; ++j) pair[(i / 2 + j) * T] = words[j];
  }
#endif
}

static void write(const float* x, int64_t step, int64_t groups, Number type, void* out) {
  uint8_t* to = static_cast<uint8_t*>(out);
  if (type == Number::F32)
    for (; groups; --groups, x += step, to += 64) storef(reinterpret_cast<float*>(to), loadf(x));
  else if (type == Number::BF16)
    for (; groups; --groups, x += step, to += 32) store_bf16(to, loadf(x));
  else
    for (; groups; --groups, x += step, to += 32) store_f16(to, loadf(x));
}

static void add_weighted(const float* sums, int n, int groups, const int64_t* token, const float* weight, float* total, int64_t columns) {
  for (int g = 0; g < groups; ++g, total += 16)
    for (int t = 0; t < n; ++t, sums += 16) {
      float* to = total + token[t] * columns;
      storef(to, fma(broadcastf(weight + t), loadf(sums), loadf(to)));
    }
}

// exp(x) by 2^n * p(f): relative error below 2e-7 for |x| <= 87
AI F exp_(F x) {
  const F y = minf(maxf(mulf(x, setf(1.44269504f)), setf(-126.0f)), setf(126.0f));
  const V n = to_int(y);
  const F f = addf(y, mulf(to_float(n), setf(-1.0f)));
  F p = setf(1.5403530e-4f);
  p = fma(p, f, setf(1.3333558e-3f));
  p = fma(p, f, setf(9.6181291e-3f));
  p = fma(p, f, setf(5.5504109e-2f));
  p = fma(p, f, setf(2.4022651e-1f));
  p = fma(p, f, setf(6.9314718e-1f));
  p = fma(p, f, setf(1.0f));
  return mulf(p, as_float(shl(add(n, set(127)), 23)));
}
AI F sigmoid(F x) { return divf(setf(1), addf(setf(1), exp_(mulf(x, setf(-1))))); }

static void gate(Activation act, float alpha, float limit, const float* g, const float* u, float* out, int64_t n) {
  for (int64_t i = 0; i < n; i += 16) {
    F a = loadf(g + i), b = loadf(u + i);
    if (act == SILU) a = mulf(a, sigmoid(a));
    else if (act == SWIGLU_OAI) {
      a = minf(a, setf(limit)), b = addf(minf(maxf(b, setf(-limit)), setf(limit)), setf(1));
      a = mulf(a, sigmoid(mulf(a, setf(alpha))));
    } else if (act == GELU_TANH) {  // 0.5 (1 + tanh z) is sigmoid(2 z)
      const F z = mulf(mulf(a, setf(0.79788456f)), fma(mulf(a, a), setf(0.044715f), setf(1)));
      a = mulf(a, sigmoid(addf(z, z)));
    } else if (act == GELU) {
      float v[16];
      storef(v, a);
      for (float& e : v) e *= 0.5f * (1.0f + erff(e * 0.70710678f));
      a = loadf(v);
    } else {
      a = maxf(a, zero());
      if (act == RELU2) a = mulf(a, a);
    }
    storef(out + i, mulf(a, b));
  }
}
