// GEMM over AMX tile registers in bf16: a span of weights of any type is dequantized to pairs of bf16, scales and minimums included, so that sums stay
// in their tile until the span ends. Rounding to eight bits of mantissa costs weights and activations 0.1 to 0.2 % each.

constexpr int PRODUCT_COLUMNS = 32;  // columns of a product
constexpr int GROUPS_AT_ONCE = 4;  // dequantized at once: loads of activations from the second-level cache, the bottleneck here, serve all of them
static_assert(GROUPS_AT_ONCE * SPAN * 16 * 2 <= WORK_BYTES, "groups of a span in bf16");

// A span of a group as pairs of bf16, [column/2][16 rows].
template <class D> struct Bf16FromInts {
  static void expand(const Layout& l, const uint8_t* group, int64_t k, int64_t from, int length, uint32_t* to, const uint8_t* next) {
    typedef Traits<D> R;
    constexpr int CENTRE = D::SIGNED ? 128 : D::OFFSET;
    next_span<D>(l, group, k, from + length, next, 1).fetch();
    for (int at = 0; at < length; at += D::BLOCK) {
      const Block b = block_at(l, group, k, (from + at) / D::BLOCK);
      const typename D::BlockScales block_scales = D::load_scales(b);
      for (int u = 0; u < R::UNITS; ++u, to += 16 * 16) {
        V w[8];
        F scale[R::PARTS], minimum[R::PARTS];
        decode<D>(block_scales, b, u, w, scale, minimum);
#pragma GCC unroll 2
        for (int p = 0; p < R::PARTS; ++p) {
          const F by = mulf(scale[p], setf(256)), less = mulf(scale[p], setf(-256 - CENTRE));
          const F base = D::MINIMUM ? fma(minimum[p], setf(-1), less) : less;
          // A code's byte in the upper bits of a mantissa is 1 + code / 256.
          const auto value = [&](V byte_in_place) { return fma(as_float(with_bits(set(0x3f800000), byte_in_place, set(0x7f8000))), by, base); };
#pragma GCC unroll 8
          for (int g = p * D::SUB / 4; g < (p + 1) * D::SUB / 4; ++g) {
            const V c = D::SIGNED && !(D::WITH_OFFSET && SIGNED_OFFSET) ? xor_(w[g], set8(128)) : w[g];
            store(to + 2 * g * 16, paired(value(shl(c, 15)), value(shl(c, 7))));
            store(to + (2 * g + 1) * 16, paired(value(shr(c, 1)), value(shr(c, 9))));
          }
        }
      }
    }
  }
};
template <class L> struct Bf16FromFloats {
  static void expand(const Layout&, const uint8_t* group, int64_t k, int64_t from, int length, uint32_t* to, const uint8_t*) {
    for (int at = 0; at < length; at += FLOAT_SPAN) {
      const int columns = length - at < FLOAT_SPAN ? length - at : FLOAT_SPAN;
      const uint8_t* here = group + (from + at) * 16 * L::BYTES;
      if (L::BYTES == 2) {
        for (int i = 0; i < columns; i += 2, to += 16, here += 32 * L::BYTES) store_pairs(to, L::pairs(here));
        continue;
      }
      const F scale = float_scale<L>(group, k, from + at);
      for (int i = 0; i < columns; i += 2, to += 16, here += 32 * L::BYTES) {
        F a, b;
        L::pair(here, a, b);
        store(to, paired(mulf(a, scale), mulf(b, scale)));
      }
    }
  }
};

// R groups times N tiles of tokens (of rows[0] and rows[1] tokens) over `steps` products, at most four independent sums to hide latency.
// Sums continue from `out` unless this is the first span.
template <int R, int N>
static void amx_bf16_block(const uint32_t* w, int steps, const uint32_t* x0, const uint32_t* x1, const int* rows, bool first, float* out0, float* out1, size_t stride) {
  static_assert(R * N <= 4, "four tiles hold sums");
  constexpr int PRODUCT = PRODUCT_COLUMNS / 2 * 16, GROUP = SPAN / 2 * 16;
#define KTX_EACH_SUM(X) X(0) X(1) X(2) X(3)  // sum i: of group i / N and of tile i % N
  if (first) {
#define X(i) if (i < R * N) tile_zero<i>();
    KTX_EACH_SUM(X)
#undef X
  } else {
#define X(i) if (i < R * N) tile_load<i>((i % N ? out1 : out0) + i / N * stride, 64);
    KTX_EACH_SUM(X)
#undef X
  }
  for (int s = 0; s < steps; ++s, w += PRODUCT, x0 += 16 * rows[0], x1 += N > 1 ? 16 * rows[1] : 0) {
#define X(i)                                                                                              \
  if constexpr (i < R * N) {                                                                              \
    if (i % N == 0) tile_load<6 + i / N % 2>(w + i / N * GROUP, 64);                                      \
    if (i < N) tile_load<4 + i % N>(i ? x1 : x0, 64);                                                     \
    tile_dot_bf16<i, 4 + i % N, 6 + i / N % 2>();                                                         \
  }
    KTX_EACH_SUM(X)
#undef X
  }
#define X(i) if (i < R * N) tile_store<i>((i % N ? out1 : out0) + i / N * stride, 64);
  KTX_EACH_SUM(X)
#undef X
#undef KTX_EACH_SUM
}

template <class W, int R> static void amx_bf16_groups(const Layout& l, const uint8_t* packed, const ActTiles& x, float* out, uint32_t* span, const uint8_t* next) {
  const size_t group = group_bytes(l, x.k), stride = size_t(x.n) * 16;
  int configured[2] = {0, 0};
  for (int64_t from = 0; from < x.k; from += SPAN) {
    const int length = x.k - from < SPAN ? int(x.k - from) : SPAN;
    for (int r = 0; r < R; ++r) W::expand(l, packed + r * group, x.k, from, length, span + r * SPAN / 2 * 16, next ? next + r * group : nullptr);
    for (int tile = 0; tile < x.tiles; tile += 2) {
      const bool two = tile + 1 < x.tiles;
      const int first = x.start(tile), second = x.start(tile + 1), rows[2] = {second - first, two ? x.start(tile + 2) - second : second - first};
      if (rows[0] != configured[0] || rows[1] != configured[1]) tiles_begin(configured[0] = rows[0], configured[1] = rows[1], 64);
      const auto pairs = [&](int token, int count) { return x.pair + token * (x.k / 2) + from / 2 * count; };
      const uint32_t *x0 = pairs(first, rows[0]), *x1 = two ? pairs(second, rows[1]) : nullptr;
      float *out0 = out + first * 16, *out1 = out + second * 16;
      const int steps = length / PRODUCT_COLUMNS;
      constexpr int BOTH = R < 2 ? R : 2;
      if (!two) amx_bf16_block<R, 1>(span, steps, x0, x1, rows, from == 0, out0, out1, stride);
      else
        for (int r = 0; r < R; r += BOTH)
          amx_bf16_block<BOTH, 2>(span + r * SPAN / 2 * 16, steps, x0, x1, rows, from == 0, out0 + r * stride, out1 + r * stride, stride);
    }
  }
}

template <class W> static void amx_bf16_gemm(const Layout& l, const uint8_t* packed, int groups, const ActTiles& x, float* out, uint8_t* work, const uint8_t* next) {
  const size_t group = group_bytes(l, x.k), stride = size_t(x.n) * 16;
  uint32_t* span = reinterpret_cast<uint32_t*>(work);
  for (int g = 0, some; g < groups; g += some, packed += some * group, out += some * stride) {
    some = groups - g >= GROUPS_AT_ONCE ? GROUPS_AT_ONCE : groups - g >= 2 ? 2 : 1;
    const uint8_t* then = g + some < groups ? packed + some * group : next;
    (some == GROUPS_AT_ONCE ? amx_bf16_groups<W, GROUPS_AT_ONCE> : some == 2 ? amx_bf16_groups<W, 2> : amx_bf16_groups<W, 1>)(l, packed, x, out, span, then);
  }
  tiles_end();
}
