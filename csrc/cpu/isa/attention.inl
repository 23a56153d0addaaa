// Attention in f32 on one block of rows and keys, over the primitives of one instruction set. A row is one query of one
// head; rows that share keys (heads of a KV head, queries of a sequence) are processed together. The driver calls for
// each block of keys
//   score            scores = q . k
//   online_softmax   scores -> probabilities, rescales what earlier blocks added
//   accumulate_pv    out += probabilities . v
// All arrays are contiguous: q [rows][d], k [keys][d], scores [rows][BLOCK_KEYS], v [keys][dv], out [rows][dv].
// Letters: R = rows and C = columns (keys of scores, vectors of 16 columns of values) of a register tile, r and c their
// indices, d = columns of q and k, dv = columns of v.

// Converts n values of the KV cache (Q8_0: full blocks) to f32, sixteen at a time and the rest one by one.
static void convert(const void* from, DType type, int64_t n, float* to) {
  const uint8_t* p = static_cast<const uint8_t*>(from);
  int64_t i = 0;
  if (type == DType::Q8_0) {
    for (; i < n; i += Q8_BLOCK, p += Q8_BYTES) {
      uint16_t scale;
      __builtin_memcpy(&scale, p, 2);
      const F factors = setf(from_f16(scale));
      storef(to + i, mulf(to_float(load_s8(p + 2)), factors));
      storef(to + i + 16, mulf(to_float(load_s8(p + 18)), factors));
    }
    return;
  }
  if (type == DType::F16)
    for (; i + 16 <= n; i += 16) storef(to + i, load_f16(p + 2 * i));
  else if (type == DType::BF16)
    for (; i + 16 <= n; i += 16) storef(to + i, as_float(shl(load_u16(p + 2 * i), 16)));
  else
    for (; i + 16 <= n; i += 16) storef(to + i, loadf(reinterpret_cast<const float*>(p) + i));
  for (; i < n; ++i) {
    uint16_t h = 0;
    if (type == DType::F32) __builtin_memcpy(to + i, p + 4 * i, 4);
    else {
      __builtin_memcpy(&h, p + 2 * i, 2);
      to[i] = type == DType::F16 ? from_f16(h) : from_bf16(h);
    }
  }
}

// Computes the scores (dot products of queries and keys) of R rows and C keys, with all sums in registers. If d is no
// multiple of 16, the last columns are added one by one.
template <int R, int C> static void score_tile(const float* q, const float* k, int d, float* scores) {
  F acc[R * C];
#pragma GCC unroll 16
  for (int i = 0; i < R * C; ++i) acc[i] = zero();
  int column = 0;
  for (; column + 16 <= d; column += 16) {
    F a[R];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) a[r] = loadf(q + r * d + column);
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) {
      const F b = loadf(k + c * d + column);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) acc[r * C + c] = fma(a[r], b, acc[r * C + c]);
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) {
      float dot_product = sum_lanes(acc[r * C + c]);
      for (int i = column; i < d; ++i) dot_product += q[r * d + i] * k[c * d + i];
      scores[r * BLOCK_KEYS + c] = dot_product;
    }
}

// Computes scores in tiles of 4 x 4, so that a load of q or k serves four products.
static void score(const float* q, const float* k, int queries, int keys, int d, float* scores) {
  int r = 0;
  for (; r + 4 <= queries; r += 4) {
    int c = 0;
    for (; c + 4 <= keys; c += 4) score_tile<4, 4>(q + r * d, k + c * d, d, scores + r * BLOCK_KEYS + c);
    for (; c < keys; ++c) score_tile<4, 1>(q + r * d, k + c * d, d, scores + r * BLOCK_KEYS + c);
  }
  for (; r < queries; ++r) {
    int c = 0;
    for (; c + 4 <= keys; c += 4) score_tile<1, 4>(q + r * d, k + c * d, d, scores + r * BLOCK_KEYS + c);
    for (; c < keys; ++c) score_tile<1, 1>(q + r * d, k + c * d, d, scores + r * BLOCK_KEYS + c);
  }
}

// Replaces scores by exp(score - row_max), where row_max is the maximum of all keys so far; columns from `keys` to
// BLOCK_KEYS become zero. If a row's maximum grows, its `sum` and `out` of earlier blocks are multiplied by exp(old -
// new), so that all blocks are relative to the same maximum. A row without a visible key so far stays zero.
static void online_softmax(float* scores, int queries, int keys, int dv, SoftmaxState state) {
  for (int r = 0; r < queries; ++r) {
    float *row = scores + r * BLOCK_KEYS, *out = state.out + int64_t(r) * dv, row_max = state.row_max[r];
    for (int c = 0; c < keys; ++c) row_max = row[c] > row_max ? row[c] : row_max;
    if (row_max == -__builtin_inff()) {  // nothing visible yet
      for (int c = 0; c < keys; ++c) row[c] = 0;
      continue;
    }
    for (int c = keys; c < BLOCK_KEYS; ++c) row[c] = -__builtin_inff();
    F sum = zero();
    for (int c = 0; c < BLOCK_KEYS; c += 16) {
      const F x = loadf(row + c);
      // exp_ clamps its argument, so masked scores (-inf) are set to zero here: x > -1e30 as a 0/1 factor
      const F visible = minf(maxf(addf(x, setf(1e30f)), setf(0)), setf(1));
      const F prob = mulf(exp_(maxf(addf(x, setf(-row_max)), setf(-126.0f))), visible);
      storef(row + c, prob);
      sum = addf(sum, prob);
    }
    const float old_max = state.row_max[r];
    const float rescale = old_max == -__builtin_inff() ? 0.0f : expf(old_max - row_max);
    state.sum[r] = state.sum[r] * rescale + sum_lanes(sum);
    state.row_max[r] = row_max;
    if (rescale != 1.0f) {
      int i = 0;
      for (; i + 16 <= dv; i += 16) storef(out + i, mulf(loadf(out + i), setf(rescale)));
      for (; i < dv; ++i) out[i] *= rescale;
    }
  }
}

// out [R rows][16 * C columns] += probabilities . v over `keys` keys; sums are in registers, so that a vector of v is
// loaded once for R rows.
template <int R, int C>
static void accumulate_pv_tile(const float* probs, const float* v, int keys, int dv, float* out) {
  F acc[R * C];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) acc[r * C + c] = loadf(out + int64_t(r) * dv + c * 16);
  for (int t = 0; t < keys; ++t) {
    F b[C];
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) b[c] = loadf(v + int64_t(t) * dv + c * 16);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const F a = broadcastf(probs + r * BLOCK_KEYS + t);
#pragma GCC unroll 4
      for (int c = 0; c < C; ++c) acc[r * C + c] = fma(a, b[c], acc[r * C + c]);
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) storef(out + int64_t(r) * dv + c * 16, acc[r * C + c]);
}

// out [R rows][dv] += probabilities . v over `keys` keys; columns past a multiple of 16 are added one by one.
template <int R> static void accumulate_pv_rows(const float* probs, const float* v, int keys, int dv, float* out) {
  int c = 0;
  for (; c + 64 <= dv; c += 64) accumulate_pv_tile<R, 4>(probs, v + c, keys, dv, out + c);
  for (; c + 16 <= dv; c += 16) accumulate_pv_tile<R, 1>(probs, v + c, keys, dv, out + c);
  for (; c < dv; ++c)
    for (int r = 0; r < R; ++r)
      for (int t = 0; t < keys; ++t) out[int64_t(r) * dv + c] += probs[r * BLOCK_KEYS + t] * v[int64_t(t) * dv + c];
}

// out += probabilities . v for all rows, four at a time, so that a load of v serves four.
static void accumulate_values(const float* probs, const float* v, int queries, int keys, int dv, float* out) {
  int r = 0;
  for (; r + 4 <= queries; r += 4) accumulate_pv_rows<4>(probs + r * BLOCK_KEYS, v, keys, dv, out + int64_t(r) * dv);
  for (; r < queries; ++r) accumulate_pv_rows<1>(probs + r * BLOCK_KEYS, v, keys, dv, out + int64_t(r) * dv);
}

// Returns the table of this instruction set; `bf16`: its kernels in bf16, or null.
constexpr AttentionKernels attention_table(const Bf16Kernels* bf16) {
  return {.convert = convert,
      .score = score,
      .online_softmax = online_softmax,
      .accumulate_pv = accumulate_values,
      .bf16 = bf16};
}
