// GEMM over AMX tile registers in int8 (amx_tiles.inl, amx_tiles_emulated.inl). A tile register has up to 16 rows of 64
// bytes; one instruction multiplies two of them. Layouts, so that tiles load without rearranging bytes:
//   weights: a dequantized span is [column/4][16 rows][4], so the SUB/4 vectors of a sub-block are the rows of a tile
//   activations q: [column/32][token][32], so the columns of a sub-block of 16 tokens are a tile
// A tile of int32 sums covers one sub-block only, because each sub-block has scales of its own. The sums therefore go
// through memory, [token][16 rows], into sixteen vectors of f32 totals, one for each token.

constexpr int TILE_TOKENS = 16;

// A tile of sums in memory.
struct TileSums {
  alignas(64) int32_t values[TILE_TOKENS][16];
};
// Sub-blocks are processed four at a time in a pipeline of two stages: while four are multiplied, the sums of the
// previous four are scaled and added, because storing a tile takes longer than its products.
constexpr int TILES_IN_FLIGHT = 4;

// Sixteen named vectors: GCC would keep an array in memory, because the inline assembly of the tiles is between its
// uses.
#define KTX_EACH_TOKEN(X) X(0) X(1) X(2) X(3) X(4) X(5) X(6) X(7) X(8) X(9) X(10) X(11) X(12) X(13) X(14) X(15)

// Adds the products of one span (`length` columns of a group of 16 rows) and a tile of `tokens` tokens to out
// [token][16 rows]. T: `tokens` rounded up to a multiple of four; tokens past the end are not stored. s: sub-block, t:
// token.
template <class D, int T>
static void amx_int8_group(const Span& span, int length, const int8_t* q, int tokens, const float* scales,
    const float* scaled_sums, float* out) {
#define KTX_INIT(t) F total##t = t < T && t < tokens ? loadf(out + t * 16) : zero();
  KTX_EACH_TOKEN(KTX_INIT)
#undef KTX_INIT
  TileSums sums[2][TILES_IN_FLIGHT];
  const int count = length / D::SUB;
  // Stage 1: multiplies sub-block s in the tile register of sums number `index`, and stores the sums in `to`.
  const auto multiply_sub_block = [&](auto index, int s, TileSums& to) __attribute__((always_inline)) {
    constexpr int SUM = decltype(index)::value, ACTIVATIONS = 4 + SUM % 2, WEIGHTS = 6 + SUM % 2;
    tile_zero<SUM>(), tile_load<ACTIVATIONS>(q + s * D::SUB / 32 * 32 * tokens + s * D::SUB % 32, 32),
        tile_load<WEIGHTS>(span.w + s * D::SUB * 16, 64);
    tile_dot_bytes<SUM, ACTIVATIONS, WEIGHTS>(), tile_store<SUM>(to.values, 64);
  };
  // Stage 2: for each token, total += scale * token_scale * sum - minimum * token_scale * sum(q), 16 rows at once.
#define KTX_ACCUMULATE(t)                                                                                     \
  if constexpr (t < T) {                                                                                      \
    total##t = fma(mulf(to_float(load(finished->values[t])), scale), broadcastf(token_scales + t), total##t); \
    if (D::MINIMUM) total##t = fnma(minimum, broadcastf(token_sums + t), total##t);                           \
  }
#define KTX_ADD_SUB_BLOCK(tile_sums, s)                                                                           \
  {                                                                                                               \
    const TileSums* finished = tile_sums;                                                                         \
    const float *token_scales = scales + (s) * D::SUB / 32 * tokens, *token_sums = scaled_sums + (s) * tokens;    \
    const F scale = loadf(span.scale + (s) * 16), minimum = D::MINIMUM ? loadf(span.minimum + (s) * 16) : zero(); \
    KTX_EACH_TOKEN(KTX_ACCUMULATE)                                                                                \
  }
  for (int s = 0; s < count + TILES_IN_FLIGHT; s += TILES_IN_FLIGHT) {
    TileSums *multiplied = sums[s / TILES_IN_FLIGHT % 2], *finished_tiles = sums[1 - s / TILES_IN_FLIGHT % 2];
#define KTX_STEP(SUM)                                                                    \
  if (s + SUM < count) multiply_sub_block(IntConstant<SUM>(), s + SUM, multiplied[SUM]); \
  if (s && s - TILES_IN_FLIGHT + SUM < count) KTX_ADD_SUB_BLOCK(finished_tiles + SUM, s - TILES_IN_FLIGHT + SUM)
    KTX_STEP(0) KTX_STEP(1) KTX_STEP(2) KTX_STEP(3)
  }
#undef KTX_STEP
#undef KTX_ADD_SUB_BLOCK
#undef KTX_ACCUMULATE
#define KTX_STORE(t) \
  if (t < T && t < tokens) storef(out + t * 16, total##t);
  KTX_EACH_TOKEN(KTX_STORE)
#undef KTX_STORE
}

// Multiplies `groups` groups by all tiles of tokens: out [group][token][16 rows]. `work` holds one dequantized span,
// which every tile uses while it is cached. Tiles are configured anew only when their number of tokens changes.
template <class D>
static void amx_int8_gemm(const Layout& l, const uint8_t* packed, int groups, const ActTiles& x, float* out,
    uint8_t* work, const uint8_t* next) {
  typedef GemmTraits<D::SUB, D::SIGNED, 0, D::MINIMUM> S;
  typedef void (*Kernel)(const Span&, int, const int8_t*, int, const float*, const float*, float*);
  static const Kernel table[] = {amx_int8_group<S, 4>, amx_int8_group<S, 8>, amx_int8_group<S, 12>,
      amx_int8_group<S, 16>};
  const size_t group_stride = group_bytes(l, x.k), out_stride = size_t(x.n) * 16;
  const float* scaled_sums = D::SUB == 16 ? x.scaled_sum16 : x.scaled_sum32;
  Span& span = *reinterpret_cast<Span*>(work);
  int configured = 0;
  for (int g = 0; g < groups; ++g, packed += group_stride, out += out_stride) {
    __builtin_memset(out, 0, out_stride * sizeof(float));
    for (int64_t from = 0; from < x.k; from += SPAN) {
      const int length = x.k - from < SPAN ? int(x.k - from) : SPAN;
      locate_next_span<D>(l, packed, x.k, from + length, g + 1 < groups ? packed + group_stride : next, 1).fetch();
      decode_span<D, true>(l, packed, x.k, from, length, span);
      for (int tile = 0; tile < x.tiles; ++tile) {
        const int first = x.start(tile), tokens = x.start(tile + 1) - first;
        if (tokens != configured) tiles_begin(tokens, tokens, D::SUB), configured = tokens;
        table[(tokens - 1) / 4](span, length, x.q + first * x.k + from * tokens, tokens,
            x.scale + first * (x.k / 32) + from / 32 * tokens,
            scaled_sums + first * (x.k / D::SUB) + from / D::SUB * tokens, out + first * 16);
      }
    }
  }
  tiles_end();
}

// Multiplies one pair of tiles, c += a * b, for the test that compares the instructions with the emulation.
static void tile_product(TileKind kind, int rows, int bytes, const void* a, const void* b, void* c) {
  tiles_begin(rows, rows, bytes);
  tile_load<0>(c, 64), tile_load<4>(a, bytes), tile_load<6>(b, 64);
  if (kind == SSD) tile_dot_bytes<0, 4, 6>();
  else if (kind == USD) tile_dot_unsigned<0, 4, 6>();
  else tile_dot_bf16<0, 4, 6>();
  tile_store<0>(c, 64);
  tiles_end();
}
