// Many tokens over tile registers (tiles_amx.inl, tiles_model.inl). The expanded span [column/4][16 rows][4] is a tile of weights as it stands;
// activations lie as [column/32][token][32], so the columns of a sub-block of 16 tokens are a tile. A tile of sums is one sub-block's, because
// each has its scales: it goes through memory into sixteen vectors of totals.

constexpr int TILE_TOKENS = 16;

struct Sums { alignas(64) int32_t at[TILE_TOKENS][16]; };

// One group of rows times T tokens (T: rounded up to a multiple of four; what lies past the end is not stored).
template <class D, int T>
static void multiply_sums(const Span& span, int length, const int8_t* q, int tokens, const float* scales, const float* parts, float* out) {
  F total[T];
KTX_UNROLL
  for (int t = 0; t < T; ++t) total[t] = t < tokens ? loadf(out + t * 16) : zero();
  Sums even, odd;
  const auto start = [&](int s) { return q + s * D::SUB / 32 * 32 * tokens + s * D::SUB % 32; };
  const auto add = [&](const Sums& sums, int s) {
    const float *by = scales + s * D::SUB / 32 * tokens, *part = parts + s * tokens;
    const F scale = loadf(span.scale + s * 16), minimum = D::MINIMUM ? loadf(span.minimum + s * 16) : zero();
KTX_UNROLL
    for (int t = 0; t < T; ++t) {
      total[t] = fma(mulf(to_float(load(sums.at[t])), scale), broadcastf(by + t), total[t]);
      if (D::MINIMUM) total[t] = fnma(minimum, broadcastf(part + t), total[t]);
    }
  };
  const auto weights = [&](int s) { return span.w + s * D::SUB * 16; };
  const int count = length / D::SUB;
  for (int s = 0; s < count; s += 2) {  // the second sub-block's products run while the first one's sums are added
    tile_zero<0>(), tile_load<4>(start(s), 32), tile_load<6>(weights(s), 64), tile_dot_bytes<0, 4, 6>(), tile_store<0>(even.at, 64);
    if (s + 1 < count)
      tile_zero<1>(), tile_load<5>(start(s + 1), 32), tile_load<7>(weights(s + 1), 64), tile_dot_bytes<1, 5, 7>(), tile_store<1>(odd.at, 64);
    add(even, s);
    if (s + 1 < count) add(odd, s + 1);
  }
KTX_UNROLL
  for (int t = 0; t < T; ++t)
    if (t < tokens) storef(out + t * 16, total[t]);
}

template <class D> static void multiply_tiles(const Layout& l, const uint8_t* packed, int groups, const Tokens& x, float* out, uint8_t* work, const uint8_t* next) {
  typedef Shape<D::SUB, D::SIGNED, 0, D::MINIMUM> S;
  typedef void (*Kernel)(const Span&, int, const int8_t*, int, const float*, const float*, float*);
  static const Kernel table[] = {multiply_sums<S, 4>, multiply_sums<S, 8>, multiply_sums<S, 12>, multiply_sums<S, 16>};
  const size_t group = group_bytes(l, x.k), stride = size_t(x.n) * 16;
  const float* parts = D::SUB == 16 ? x.part16 : x.part32;
  Span& span = *reinterpret_cast<Span*>(work);
  int configured = 0;
  for (int g = 0; g < groups; ++g, packed += group, out += stride) {
    __builtin_memset(out, 0, stride * sizeof(float));
    for (int64_t from = 0; from < x.k; from += SPAN) {
      const int length = x.k - from < SPAN ? int(x.k - from) : SPAN;
      expand<D, true>(l, packed, x.k, from, length, span, g + 1 < groups ? packed + group : next);
      for (int tile = 0; tile < x.tiles; ++tile) {
        const int first = x.start(tile), tokens = x.start(tile + 1) - first;
        if (tokens != configured) tiles_begin(configured = tokens, D::SUB);
        table[(tokens - 1) / 4](span, length, x.q + first * x.k + from * tokens, tokens, x.scale + first * (x.k / 32) + from / 32 * tokens,
                                parts + first * (x.k / D::SUB) + from / D::SUB * tokens, out + first * 16);
      }
    }
  }
  tiles_end();
}

// What is tested against the other back end: one product.
static void one_product(TileKind kind, int rows, int bytes, const void* a, const void* b, void* c) {
  tiles_begin(rows, bytes);
  tile_load<0>(c, 64), tile_load<4>(a, bytes), tile_load<6>(b, 64);
  if (kind == SSD) tile_dot_bytes<0, 4, 6>();
  else if (kind == USD) tile_dot_unsigned<0, 4, 6>();
  else tile_dot_bf16<0, 4, 6>();
  tile_store<0>(c, 64);
  tiles_end();
}
