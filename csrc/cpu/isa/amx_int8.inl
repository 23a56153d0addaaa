// GEMM over AMX tile registers in int8 (amx_tiles.inl, amx_tiles_emulated.inl). A dequantized span [column/4][16 rows][4] has the layout of a weight
// tile; activations are [column/32][token][32], so the columns of a sub-block of 16 tokens are a tile. A tile of sums covers one sub-block, because each
// has its own scales: it goes through memory into sixteen vectors of totals.

constexpr int TILE_TOKENS = 16;

struct Sums { alignas(64) int32_t at[TILE_TOKENS][16]; };
constexpr int TILES_IN_FLIGHT = 4;  // tiles of sums: while four are multiplied, the previous four are added, because storing a tile takes longer than its products

// Sixteen named vectors: GCC would keep an array in memory, because the inline assembly of the tiles is between its uses.
#define KTX_EACH_TOKEN(X) X(0) X(1) X(2) X(3) X(4) X(5) X(6) X(7) X(8) X(9) X(10) X(11) X(12) X(13) X(14) X(15)

// One group of rows times T tokens (T is a multiple of four; tokens past the end are not stored).
template <class D, int T>
static void amx_int8_group(const Span& span, int length, const int8_t* q, int tokens, const float* scales, const float* parts, float* out) {
#define X(t) F total##t = t < T && t < tokens ? loadf(out + t * 16) : zero();
  KTX_EACH_TOKEN(X)
#undef X
  Sums sums[2][TILES_IN_FLIGHT];
  const int count = length / D::SUB;
  const auto product = [&](auto place, int s, Sums& to) __attribute__((always_inline)) {
    constexpr int C = decltype(place)::value, A = 4 + C % 2, B = 6 + C % 2;
    tile_zero<C>(), tile_load<A>(q + s * D::SUB / 32 * 32 * tokens + s * D::SUB % 32, 32), tile_load<B>(span.w + s * D::SUB * 16, 64);
    tile_dot_bytes<C, A, B>(), tile_store<C>(to.at, 64);
  };
#define X(t)                                                                                    \
  if constexpr (t < T) {                                                                        \
    total##t = fma(mulf(to_float(load(from->at[t])), scale), broadcastf(by + t), total##t);     \
    if (D::MINIMUM) total##t = fnma(minimum, broadcastf(part + t), total##t);                   \
  }
#define KTX_ADD(place, s)                                                                                                 \
  {                                                                                                                       \
    const Sums* from = place;                                                                                             \
    const float *by = scales + (s) * D::SUB / 32 * tokens, *part = parts + (s) * tokens;                                  \
    const F scale = loadf(span.scale + (s) * 16), minimum = D::MINIMUM ? loadf(span.minimum + (s) * 16) : zero();         \
    KTX_EACH_TOKEN(X)                                                                                                     \
  }
  for (int s = 0; s < count + TILES_IN_FLIGHT; s += TILES_IN_FLIGHT) {
    Sums *now = sums[s / TILES_IN_FLIGHT % 2], *before = sums[1 - s / TILES_IN_FLIGHT % 2];
#define KTX_STEP(C)                                                              \
  if (s + C < count) product(Int<C>(), s + C, now[C]);                           \
  if (s && s - TILES_IN_FLIGHT + C < count) KTX_ADD(before + C, s - TILES_IN_FLIGHT + C)
    KTX_STEP(0) KTX_STEP(1) KTX_STEP(2) KTX_STEP(3)
  }
#undef KTX_STEP
#undef KTX_ADD
#undef X
#define X(t) if (t < T && t < tokens) storef(out + t * 16, total##t);
  KTX_EACH_TOKEN(X)
#undef X
}

template <class D> static void amx_int8_gemm(const Layout& l, const uint8_t* packed, int groups, const ActTiles& x, float* out, uint8_t* work, const uint8_t* next) {
  typedef Shape<D::SUB, D::SIGNED, 0, D::MINIMUM> S;
  typedef void (*Kernel)(const Span&, int, const int8_t*, int, const float*, const float*, float*);
  static const Kernel table[] = {amx_int8_group<S, 4>, amx_int8_group<S, 8>, amx_int8_group<S, 12>, amx_int8_group<S, 16>};
  const size_t group = group_bytes(l, x.k), stride = size_t(x.n) * 16;
  const float* parts = D::SUB == 16 ? x.part16 : x.part32;
  Span& span = *reinterpret_cast<Span*>(work);
  int configured = 0;
  for (int g = 0; g < groups; ++g, packed += group, out += stride) {
    __builtin_memset(out, 0, stride * sizeof(float));
    for (int64_t from = 0; from < x.k; from += SPAN) {
      const int length = x.k - from < SPAN ? int(x.k - from) : SPAN;
      next_span<D>(l, packed, x.k, from + length, g + 1 < groups ? packed + group : next, 1).fetch();
      expand<D, true>(l, packed, x.k, from, length, span);
      for (int tile = 0; tile < x.tiles; ++tile) {
        const int first = x.start(tile), tokens = x.start(tile + 1) - first;
        if (tokens != configured) tiles_begin(tokens, tokens, D::SUB), configured = tokens;
        table[(tokens - 1) / 4](span, length, x.q + first * x.k + from * tokens, tokens, x.scale + first * (x.k / 32) + from / 32 * tokens,
                                parts + first * (x.k / D::SUB) + from / D::SUB * tokens, out + first * 16);
      }
    }
  }
  tiles_end();
}

// One product, for the test that compares instructions with emulation.
static void tile_product(TileKind kind, int rows, int bytes, const void* a, const void* b, void* c) {
  tiles_begin(rows, rows, bytes);
  tile_load<0>(c, 64), tile_load<4>(a, bytes), tile_load<6>(b, 64);
  if (kind == SSD) tile_dot_bytes<0, 4, 6>();
  else if (kind == USD) tile_dot_unsigned<0, 4, 6>();
  else tile_dot_bf16<0, 4, 6>();
  tile_store<0>(c, 64);
  tiles_end();
}
