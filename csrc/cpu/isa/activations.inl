// Activations: quantization to int8, the order in which the GEMMs read them (ActTiles), conversion of results, and
// activation functions. Letters: T = tokens of the tile, t = index of the token in it; the arrays of a tile start at
// `first` * (elements of a row).

// Quantizes a row of k columns to int8, symmetrically, with a scale for each 32 columns. x holds sixteen columns every
// `step` floats. The sums of 16 columns are what offsets and minimums of weight types need.
static void quantize(const float* x, int64_t step, int64_t k, RowView out) {
  for (int64_t b = 0; b < k / 32; ++b, x += 2 * step) {
    const F first = loadf(x), second = loadf(x + step);
    // As integers, so that a NaN is the largest of all: it must reach the scale, because its code cannot show it.
    const uint32_t bits = largest_lane(maxu(as_int(absf(first)), as_int(absf(second))));
    float amax;
    __builtin_memcpy(&amax, &bits, 4);
    const F inverse = setf(amax > 0 ? 127.0f / amax : 0.0f);
    const V first_codes = to_int(mulf(first, inverse)), second_codes = to_int(mulf(second, inverse));
    out.scale[b] = amax / 127.0f;
    store_s8(out.q + b * 32, first_codes), store_s8(out.q + b * 32 + 16, second_codes);
    out.sum16[2 * b] = sum_lanes(first_codes), out.sum16[2 * b + 1] = sum_lanes(second_codes);
  }
}

// Copies `length` columns of a quantized token to its place in a tile: codes, scales, and the sums as the products use
// them (negated, and times the scale). With tile registers (AMX) codes are [k/32][T][32], else [k/4][T][4], so that one
// broadcast loads four columns of a token.
static void scatter(const RowView& row, const ActTiles& to, TileSlot token, int64_t from, int64_t length) {
  const int first = token.first, T = token.count, t = token.at;
  const int64_t at16 = first * (to.k / 16) + from / 16 * T + t, at32 = first * (to.k / 32) + from / 32 * T + t;
  int32_t *q = reinterpret_cast<int32_t*>(to.q + first * to.k + from * T) + t, *sum16 = to.sum16 + at16,
          *sum32 = to.sum32 + at32;
  float *scale = to.scale + at32, *scaled16 = to.scaled_sum16 + at16, *scaled32 = to.scaled_sum32 + at32;
#ifdef KTX_AMX
  if (to.n > KTX_GEMV_TOKENS) {
    int8_t* amx_q = to.q + first * to.k + from * T + t * 32;
    for (int64_t i = 0; i < length; i += 32) __builtin_memcpy(amx_q + i * T, row.q + i, 32);
  } else
#endif
  {
    const int32_t* source = reinterpret_cast<const int32_t*>(row.q);
    for (int64_t i = 0; i < length / 4; ++i) q[i * T] = source[i];
  }
  for (int64_t i = 0; i < length / 32; ++i) {
    const int32_t even_sum = row.sum16[2 * i], odd_sum = row.sum16[2 * i + 1];
    const float d = row.scale[i];
    scale[i * T] = d;
    sum16[2 * i * T] = -even_sum, sum16[(2 * i + 1) * T] = -odd_sum, sum32[i * T] = -even_sum - odd_sum;
    scaled16[2 * i * T] = d * float(even_sum), scaled16[(2 * i + 1) * T] = d * float(odd_sum);
    scaled32[i * T] = d * float(even_sum + odd_sum);
  }
}

// Copies `length` columns of a token that is not quantized to its place in a tile, in the forms that `to` has: f32 for
// products in f32 [k][T], pairs of bf16 for products in bf16 [k/2][T], for tile registers (AMX) [k/32][T][16 pairs].
static void scatter_floats(const float* x, const ActTiles& to, TileSlot token, int64_t from, int64_t length) {
  const int first = token.first, T = token.count, t = token.at;
  if (to.f) {
    float* f = to.f + first * to.k + from * T + t;
    for (int64_t i = 0; i < length; ++i) f[i * T] = x[i];
  }
#ifdef KTX_BF16
  if (!to.pair) return;
#ifdef KTX_AMX
  if (to.bf16) {
    uint32_t* rows = to.pair + first * (to.k / 2) + from / 2 * T + t * 16;
    for (int64_t i = 0; i < length; i += 32)
      store(rows + i / 2 * T, pair_neighbors_as_bf16(loadf(x + i), loadf(x + i + 16)));
    return;
  }
#endif
  uint32_t* pair = to.pair + first * (to.k / 2) + from / 2 * T + t;
  for (int64_t i = 0; i < length; i += 32) {
    float columns[32] = {};
    uint32_t words[16];
    const int64_t count = length - i < 32 ? length - i : 32;
    __builtin_memcpy(columns, x + i, size_t(count) * 4);
    store(words, pair_neighbors_as_bf16(loadf(columns), loadf(columns + 16)));
    for (int64_t j = 0; j < count / 2; ++j) pair[(i / 2 + j) * T] = words[j];
  }
#endif
}

// Stores `groups` times sixteen sums, which are `step` floats apart, as a dense row of `type`.
static void write(const float* x, int64_t step, int64_t groups, DType type, void* out) {
  uint8_t* to = static_cast<uint8_t*>(out);
  if (type == DType::F32)
    for (; groups; --groups, x += step, to += 64) storef(reinterpret_cast<float*>(to), loadf(x));
  else if (type == DType::BF16)
    for (; groups; --groups, x += step, to += 32) store_bf16(to, loadf(x));
  else
    for (; groups; --groups, x += step, to += 32) store_f16(to, loadf(x));
}

// Adds the results of an expert to its tokens: total [token[t]][columns] += weight[t] * sums [group][t][16 rows] for n
// tokens. `weight`: the router's.
static void add_weighted(const float* sums, int n, int groups, const int64_t* token, const float* weight, float* total,
    int64_t columns) {
  for (int g = 0; g < groups; ++g, total += 16)
    for (int t = 0; t < n; ++t, sums += 16) {
      float* to = total + token[t] * columns;
      storef(to, fma(broadcastf(weight + t), loadf(sums), loadf(to)));
    }
}

// exp(x) as 2^n * p(f), where x / ln 2 = n + f and p is a polynomial for 2^f. Relative error below 2e-7 for |x| <= 87;
// x is clamped.
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

// The middle of a gated MLP: out = activation(gate) * up for n values, a multiple of 16. alpha and limit belong to
// SWIGLU_OAI:
//   gate * sigmoid(alpha * gate) * (up + 1), with gate clamped from above and up from both sides by limit.
static void gated_activation(Activation act, float alpha, float limit, const float* gate_in, const float* up_in,
    float* out, int64_t n) {
  for (int64_t i = 0; i < n; i += 16) {
    F gate = loadf(gate_in + i), up = loadf(up_in + i);
    if (act == SILU) gate = mulf(gate, sigmoid(gate));
    else if (act == SWIGLU_OAI) {
      gate = minf(gate, setf(limit)), up = addf(minf(maxf(up, setf(-limit)), setf(limit)), setf(1));
      gate = mulf(gate, sigmoid(mulf(gate, setf(alpha))));
    } else if (act == GELU_TANH) {  // 0.5 (1 + tanh z) is sigmoid(2 z); 0.798 is sqrt(2 / pi)
      const F z = mulf(mulf(gate, setf(0.79788456f)), fma(mulf(gate, gate), setf(0.044715f), setf(1)));
      gate = mulf(gate, sigmoid(addf(z, z)));
    } else if (act == GELU) {  // 0.707 is sqrt(1 / 2)
      float values[16];
      storef(values, gate);
      for (float& value : values) value *= 0.5f * (1.0f + erff(value * 0.70710678f));
      gate = loadf(values);
    } else {
      gate = maxf(gate, zero());
      if (act == RELU2) gate = mulf(gate, gate);
    }
    storef(out + i, mulf(gate, up));
  }
}
