// GEMM over AMX tile registers in bf16. A span of weights of any type is dequantized to pairs of bf16 (two consecutive
// columns of a row in a 32-bit word), scales and minimums included, so that sums stay in their tile register until the
// span ends; in int8 they leave it after each sub-block. Rounding to eight bits of mantissa costs weights and
// activations 0.1 to 0.2 % each.
//
// Letters: W = what dequantizes (Bf16FromInts, Bf16FromFloats), R = groups of 16 rows at once, TILES = tiles of tokens
// at once.

constexpr int PRODUCT_COLUMNS = 32;  // columns that one tile instruction multiplies
// Groups dequantized before they are multiplied. The bottleneck is loading activations from the second-level cache: a
// load serves all of them.
constexpr int GROUPS_AT_ONCE = 4;
static_assert(GROUPS_AT_ONCE * SPAN * 16 * 2 <= WORK_BYTES, "groups of a span in bf16");

// decode_span dequantizes `length` columns of a group, from column `from` on, to pairs of bf16: `to` [column/2][16
// rows]. `next`: the weights multiplied next, whose start is prefetched at the end of this group.
template <class D> struct Bf16FromInts {
  // Dequantizes integer weights. A code's byte is placed in the mantissa of 1.0, which saves the conversion to float;
  // one multiply-add then applies scale, offset and minimum.
  static void decode_span(const Layout& l, const uint8_t* group, int64_t k, int64_t from, int length, uint32_t* to,
      const uint8_t* next) {
    typedef Traits<D> DTraits;
    constexpr int CENTER = D::SIGNED ? 128 : D::OFFSET;
    locate_next_span<D>(l, group, k, from + length, next, 1).fetch();
    for (int at = 0; at < length; at += D::BLOCK) {
      const Block b = locate_block(l, group, k, (from + at) / D::BLOCK);
      const typename D::BlockScales block_scales = D::load_scales(b);
      for (int u = 0; u < DTraits::UNITS; ++u, to += 16 * 16) {
        V w[8];
        F scale[DTraits::SUB_BLOCKS], minimum[DTraits::SUB_BLOCKS];
        decode_unit<D>(block_scales, b, u, w, scale, minimum);
#pragma GCC unroll 2
        for (int p = 0; p < DTraits::SUB_BLOCKS; ++p) {
          // value = scale * (code - CENTER) - minimum, from a float 1 + code/256: value = that * (256 * scale) + base.
          const F factor = mulf(scale[p], setf(256)), zero_value = mulf(scale[p], setf(-256 - CENTER));
          const F base = D::MINIMUM ? fma(minimum[p], setf(-1), zero_value) : zero_value;
          // A code's byte in the upper bits of a mantissa is 1 + code / 256.
          const auto to_value = [&](V byte_in_place) {
            return fma(as_float(with_bits(set(0x3f800000), byte_in_place, set(0x7f8000))), factor, base);
          };
#pragma GCC unroll 8
          for (int g = p * D::SUB / 4; g < (p + 1) * D::SUB / 4; ++g) {
            const V c = D::SIGNED && !(D::WITH_OFFSET && SIGNED_OFFSET) ? xor_(w[g], set8(128)) : w[g];
            store(to + 2 * g * 16, pair_as_bf16(to_value(shl(c, 15)), to_value(shl(c, 7))));
            store(to + (2 * g + 1) * 16, pair_as_bf16(to_value(shr(c, 1)), to_value(shr(c, 9))));
          }
        }
      }
    }
  }
};
template <class L> struct Bf16FromFloats {
  // Copies weights of two bytes, which are bf16 already, as pairs; converts e4m3 and multiplies it by the scale of its
  // row and 128 columns.
  static void decode_span(const Layout&, const uint8_t* group, int64_t k, int64_t from, int length, uint32_t* to,
      const uint8_t*) {
    for (int at = 0; at < length; at += FLOAT_SPAN) {
      const int columns = length - at < FLOAT_SPAN ? length - at : FLOAT_SPAN;
      const uint8_t* src = group + (from + at) * 16 * L::BYTES;
      if (L::BYTES == 2) {
        for (int i = 0; i < columns; i += 2, to += 16, src += 32 * L::BYTES) store_pairs(to, L::load_bf16_pairs(src));
        continue;
      }
      const F scale = load_float_scale<L>(group, k, from + at);
      for (int i = 0; i < columns; i += 2, to += 16, src += 32 * L::BYTES) {
        F a, b;
        L::load_columns(src, a, b);
        store(to, pair_as_bf16(mulf(a, scale), mulf(b, scale)));
      }
    }
  }
};

// Multiplies R groups by TILES tiles of tokens (tile_tokens[0] and tile_tokens[1] tokens) over the columns of one span,
// `products` instructions per sum. Up to four independent sums hide the latency of an instruction. Sums continue from
// out0 and out1 unless this is the first span.
template <int R, int TILES>
static void amx_bf16_block(const uint32_t* w, int products, const uint32_t* x_tile0, const uint32_t* x_tile1,
    const int* tile_tokens, bool first, float* out0, float* out1, size_t out_stride) {
  static_assert(R * TILES <= 4, "four tiles hold sums");
  // Words from one product to the next and from one group to the next, in the dequantized weights.
  constexpr int PRODUCT_WORDS = PRODUCT_COLUMNS / 2 * 16, GROUP_WORDS = SPAN / 2 * 16;
#define KTX_EACH_SUM(X) X(0) X(1) X(2) X(3)  // sum i: of group i / TILES and of tile i % TILES
  if (first) {
#define KTX_ZERO(i) \
  if (i < R * TILES) tile_zero<i>();
    KTX_EACH_SUM(KTX_ZERO)
#undef KTX_ZERO
  } else {
#define KTX_LOAD(i) \
  if (i < R * TILES) tile_load<i>((i % TILES ? out1 : out0) + i / TILES * out_stride, 64);
    KTX_EACH_SUM(KTX_LOAD)
#undef KTX_LOAD
  }
  for (int s = 0; s < products;
      ++s, w += PRODUCT_WORDS, x_tile0 += 16 * tile_tokens[0], x_tile1 += TILES > 1 ? 16 * tile_tokens[1] : 0) {
#define KTX_MULTIPLY(i)                                                                \
  if constexpr (i < R * TILES) {                                                       \
    if (i % TILES == 0) tile_load<6 + i / TILES % 2>(w + i / TILES * GROUP_WORDS, 64); \
    if (i < TILES) tile_load<4 + i % TILES>(i ? x_tile1 : x_tile0, 64);                \
    tile_dot_bf16<i, 4 + i % TILES, 6 + i / TILES % 2>();                              \
  }
    KTX_EACH_SUM(KTX_MULTIPLY)
#undef KTX_MULTIPLY
  }
#define KTX_STORE(i) \
  if (i < R * TILES) tile_store<i>((i % TILES ? out1 : out0) + i / TILES * out_stride, 64);
  KTX_EACH_SUM(KTX_STORE)
#undef KTX_STORE
#undef KTX_EACH_SUM
}

// Multiplies R groups by all tiles of tokens, span by span, two tiles at a time. `span` has R spans of pairs of bf16.
template <class W, int R>
static void amx_bf16_groups(const Layout& l, const uint8_t* packed, const ActTiles& x, float* out, uint32_t* span,
    const uint8_t* next) {
  const size_t group_stride = group_bytes(l, x.k), out_stride = size_t(x.n) * 16;
  int configured[2] = {0, 0};  // tokens of the two tiles that the tile registers are configured for
  for (int64_t from = 0; from < x.k; from += SPAN) {
    const int length = x.k - from < SPAN ? int(x.k - from) : SPAN;
    for (int r = 0; r < R; ++r)
      W::decode_span(l, packed + r * group_stride, x.k, from, length, span + r * SPAN / 2 * 16,
          next ? next + r * group_stride : nullptr);
    for (int tile = 0; tile < x.tiles; tile += 2) {
      const bool has_second = tile + 1 < x.tiles;
      const int first = x.start(tile), second = x.start(tile + 1),
                tile_tokens[2] = {second - first, has_second ? x.start(tile + 2) - second : second - first};
      if (tile_tokens[0] != configured[0] || tile_tokens[1] != configured[1])
        tiles_begin(configured[0] = tile_tokens[0], configured[1] = tile_tokens[1], 64);
      // Where the activations of a tile are for the columns of this span.
      const auto pairs = [&](int token, int count) { return x.pair + token * (x.k / 2) + from / 2 * count; };
      const uint32_t *x_tile0 = pairs(first, tile_tokens[0]),
                     *x_tile1 = has_second ? pairs(second, tile_tokens[1]) : nullptr;
      float *out0 = out + first * 16, *out1 = out + second * 16;
      const int products = length / PRODUCT_COLUMNS;
      constexpr int GROUPS_PER_BLOCK = R < 2 ? R : 2;
      if (!has_second)
        amx_bf16_block<R, 1>(span, products, x_tile0, x_tile1, tile_tokens, from == 0, out0, out1, out_stride);
      else
        for (int r = 0; r < R; r += GROUPS_PER_BLOCK)
          amx_bf16_block<GROUPS_PER_BLOCK, 2>(span + r * SPAN / 2 * 16, products, x_tile0, x_tile1, tile_tokens,
              from == 0, out0 + r * out_stride, out1 + r * out_stride, out_stride);
    }
  }
}

// Multiplies `groups` groups by all tiles of tokens: out [group][token][16 rows]; four, two or one group at a time.
template <class W>
static void amx_bf16_gemm(const Layout& l, const uint8_t* packed, int groups, const ActTiles& x, float* out,
    uint8_t* work, const uint8_t* next) {
  const size_t group_stride = group_bytes(l, x.k), out_stride = size_t(x.n) * 16;
  uint32_t* span = reinterpret_cast<uint32_t*>(work);
  for (int g = 0, count; g < groups; g += count, packed += count * group_stride, out += count * out_stride) {
    count = groups - g >= GROUPS_AT_ONCE ? GROUPS_AT_ONCE : groups - g >= 2 ? 2 : 1;
    const uint8_t* next_weights = g + count < groups ? packed + count * group_stride : next;
    (count == GROUPS_AT_ONCE ? amx_bf16_groups<W, GROUPS_AT_ONCE>
            : count == 2     ? amx_bf16_groups<W, 2>
                             : amx_bf16_groups<W, 1>)(l, packed, x, out, span, next_weights);
  }
  tiles_end();
}
