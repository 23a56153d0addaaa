// Many tokens of BF16 and FP8 weights over tile registers; see tiles_ints.inl.

// bf16: [column/2][16 rows] pairs are a tile of weights; sums of 128 columns stay in their tile.
template <class L> static void multiply_bf16_tiles(const Layout& l, const uint8_t* packed, int groups, const Tokens& x, float* out, uint8_t* work, const Ahead& ahead) {
  const size_t group = group_bytes(l, x.k), stride = size_t(x.n) * 16;
  uint32_t* span = reinterpret_cast<uint32_t*>(work);
  Sums sums;
  int configured = 0;
  for (int g = 0; g < groups; ++g, packed += group, out += stride) {
    __builtin_memset(out, 0, stride * sizeof(float));
    for (int64_t from = 0; from < x.k; from += FLOAT_SPAN) {
      const int length = x.k - from < FLOAT_SPAN ? int(x.k - from) : FLOAT_SPAN;
      const F scale = float_scale<L>(packed, x.k, from);
      expand_pairs<L>(packed + from * 16 * L::BYTES, length, span, 16, ahead);
      for (int tile = 0; tile < x.tiles; ++tile) {
        const int first = x.start(tile), tokens = x.start(tile + 1) - first;
        if (tokens != configured) tiles_begin(configured = tokens, 64);
        const uint32_t* pairs = x.pair + first * (x.k / 2) + from / 2 * tokens;
        tile_zero<0>();
        for (int i = 0; i < length / 2; i += 16)
          tile_load<4>(pairs + i * tokens, 64), tile_load<6>(span + i * 16, 64), tile_dot_bf16<0, 4, 6>();
        tile_store<0>(sums.at, 64);
        float* to = out + first * 16;
        for (int t = 0; t < tokens; ++t, to += 16) storef(to, fma(as_float(load(sums.at[t])), scale, loadf(to)));
      }
    }
  }
  tiles_end();
}
