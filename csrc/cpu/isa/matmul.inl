// The entry points of the kernels: `multiply` and `unpack` for any weight type. `multiply` picks the path (GEMV, GEMM,
// AMX) by the number of tokens and by what this instruction set has. Common parameters: `packed` = the first group of
// 16 rows, `groups` = their number, out [group][token][16 rows], `work` = WORK_BYTES of this thread, `next` = the
// weights that the caller multiplies next, or null.

// ---- integer weights ------------------------------------------------------------------------------------------------

// Multiplies integer weights; D: decoder (dequant.inl). Up to KTX_GEMV_TOKENS tokens in one tile take the GEMV path,
// which has no intermediate buffer; more take AMX or the GEMM, two groups at a time where registers allow it.
template <class D>
static void multiply_int_weights(const Layout& l, const uint8_t* packed, int groups, const ActTiles& x, float* out,
    uint8_t* work, const uint8_t* next) {
  const size_t group_stride = group_bytes(l, x.k), out_stride = size_t(x.n) * 16;
#ifdef KTX_AMX
  if (x.bf16) return amx_bf16_gemm<Bf16FromInts<D>>(l, packed, groups, x, out, work, next);
#endif
  const Prefetcher prefetcher(packed + groups * group_stride, next);
  int g = 0;
  if (x.tiles == 1 && x.n <= KTX_GEMV_TOKENS) {
    for (; g < groups; ++g, packed += group_stride, out += out_stride) {
      switch (x.n) {
        case 1: gemv<D, 1>(l, packed, x, out, prefetcher); break;
        case 2: gemv<D, 2>(l, packed, x, out, prefetcher); break;
#if KTX_GEMV_TOKENS == 8
        case 3: gemv<D, 3>(l, packed, x, out, prefetcher); break;
        case 4: gemv<D, 4>(l, packed, x, out, prefetcher); break;
        case 5: gemv<D, 5>(l, packed, x, out, prefetcher); break;
        case 6: gemv<D, 6>(l, packed, x, out, prefetcher); break;
        case 7: gemv<D, 7>(l, packed, x, out, prefetcher); break;
        case 8: gemv<D, 8>(l, packed, x, out, prefetcher); break;
#endif
      }
    }
    return;
  }
#ifdef KTX_AMX
  return amx_int8_gemm<D>(l, packed, groups, x, out, work, next);
#else
  Span* spans = reinterpret_cast<Span*>(work);
#if KTX_TILE_TOKENS >= 6
  for (; g + 2 <= groups; g += 2, packed += 2 * group_stride, out += 2 * out_stride)
    gemm<D, 2>(l, packed, x, out, spans, g + 2 < groups ? packed + 2 * group_stride : next);
#endif
  for (; g < groups; ++g, packed += group_stride, out += out_stride)
    gemm<D, 1>(l, packed, x, out, spans, g + 1 < groups ? packed + group_stride : next);
#endif
}

// ---- float weights --------------------------------------------------------------------------------------------------

// Multiplies R groups in bf16 if the weights are exact in it and the activations have pairs, else in f32.
template <class L, int R>
static void gemm_any_float(const uint8_t* packed, size_t group_stride, const ActTiles& x, float* out, uint8_t* work,
    const Prefetcher& prefetcher) {
#ifdef KTX_BF16
  if constexpr (L::EXACT_IN_BF16)
    if (x.pair) return bf16_gemm<L, R>(packed, group_stride, x, out, reinterpret_cast<uint32_t*>(work), prefetcher);
#endif
  float_gemm<L, R>(packed, group_stride, x, out, reinterpret_cast<float*>(work), prefetcher);
}

// Multiplies one group by T tokens, in bf16 or f32 as gemm_any_float.
template <class L, int T>
AI void gemv_any_float(const uint8_t* packed, const ActTiles& x, float* out, const Prefetcher& prefetcher) {
#ifdef KTX_BF16
  if constexpr (L::EXACT_IN_BF16)
    if (x.pair) return bf16_gemv<L, T>(packed, x.k, x.pair, out, prefetcher);
#endif
  float_gemv<L, T>(packed, x.k, x.f, out, prefetcher);
}

// Multiplies float weights; L: loader (float_gemm.inl). Up to FLOAT_TILE tokens in one tile take the GEMV path, more
// AMX or the GEMM.
template <class L>
static void multiply_float_weights(const Layout& l, const uint8_t* packed, int groups, const ActTiles& x, float* out,
    uint8_t* work, const uint8_t* next) {
  const size_t group_stride = group_bytes(l, x.k), out_stride = size_t(x.n) * 16;
#ifdef KTX_AMX
  if constexpr (L::EXACT_IN_BF16)
    if (x.bf16 && x.pair) return amx_bf16_gemm<Bf16FromFloats<L>>(l, packed, groups, x, out, work, next);
#endif
  const Prefetcher prefetcher(packed + groups * group_stride, next);
  int g = 0;
  if (x.tiles == 1 && x.n <= FLOAT_TILE) {
    for (; g < groups; ++g, packed += group_stride, out += out_stride) {
      switch (x.n) {
        case 1: gemv_any_float<L, 1>(packed, x, out, prefetcher); break;
        case 2: gemv_any_float<L, 2>(packed, x, out, prefetcher); break;
#if KTX_TILE_TOKENS >= 6
        case 3: gemv_any_float<L, 3>(packed, x, out, prefetcher); break;
        case 4: gemv_any_float<L, 4>(packed, x, out, prefetcher); break;
        case 5: gemv_any_float<L, 5>(packed, x, out, prefetcher); break;
        case 6: gemv_any_float<L, 6>(packed, x, out, prefetcher); break;
#endif
      }
    }
    return;
  }
#if KTX_TILE_TOKENS >= 6
  for (; g + 2 <= groups; g += 2, packed += 2 * group_stride, out += 2 * out_stride)
    gemm_any_float<L, 2>(packed, group_stride, x, out, work, prefetcher);
#endif
  for (; g < groups; ++g, packed += group_stride, out += out_stride)
    gemm_any_float<L, 1>(packed, group_stride, x, out, work, prefetcher);
}

// ---- packed weights as f32 ------------------------------------------------------------------------------------------

// Dequantizes a group to f32, out [k][16 rows], for callers that need the weights themselves: embedding look-ups, for
// example.
template <class D> static void unpack_ints(const Layout& l, const uint8_t* group, int64_t k, float* out) {
  typedef Traits<D> DTraits;
  for (int64_t i = 0; i < k / D::BLOCK; ++i) {
    const Block b = locate_block(l, group, k, i);
    const typename D::BlockScales block_scales = D::load_scales(b);
    for (int u = 0; u < DTraits::UNITS; ++u) {
      V w[8];
      F scales[DTraits::SUB_BLOCKS], minimums[DTraits::SUB_BLOCKS];
      decode_unit<D>(block_scales, b, u, w, scales, minimums);
      for (int j = 0; j < 32; ++j, out += 16) {
        const F scale = scales[j / D::SUB], minimum = D::MINIMUM ? minimums[j / D::SUB] : zero();
        V code = take_byte(w[j / 4], j % 4);
        code = D::SIGNED ? sign_extend8(D::WITH_OFFSET ? with_offset(code) : code)
                         : add(code, set(uint32_t(-D::OFFSET)));
        const F value = mulf(scale, to_float(code));
        storef(out, D::MINIMUM ? fma(minimum, setf(-1), value) : value);
      }
    }
  }
}

// Converts a group of 16 rows of float weights to f32, out [k][16 rows], two columns at a time; k may be odd.
template <class L> static void unpack_floats(const Layout&, const uint8_t* group, int64_t k, float* out) {
  for (int64_t i = 0; i < k; i += 2) {
    F a, b;
    if (i + 2 <= k) L::load_columns(group + i * 16 * L::BYTES, a, b);
    else last_column<L>(group + i * 16 * L::BYTES, a, b);
    const F scale = load_float_scale<L>(group, k, i);  // shared by both columns of a pair
    storef(out + i * 16, mulf(a, scale));
    if (i + 1 < k) storef(out + (i + 1) * 16, mulf(b, scale));
  }
}

// ---- the table of weight types ------------------------------------------------------------------------------

// X(type) for each weight type compiled here: all of them, unless an instruction set extends another. It then defines
// these lists with the types that gain, and KTX_BASE_KERNELS serve the others.
#ifndef KTX_BASE_KERNELS
// clang-format off
#define KTX_INT_TYPES(X)                                                                                         \
  X(Q4_0) X(Q4_1) X(Q5_0) X(Q5_1) X(Q8_0) X(Q2_K) X(Q3_K) X(Q4_K) X(Q5_K) X(Q6_K) X(IQ4_NL) X(IQ4_XS) X(MXFP4)   \
  X(TQ1_0) X(TQ2_0) X(IQ2_XXS) X(IQ2_XS) X(IQ2_S) X(IQ3_XXS) X(IQ3_S) X(IQ1_S) X(IQ1_M) X(INT8_128) X(INT4_64)   \
  X(INT4_128)
// clang-format on
#define KTX_FLOAT_TYPES(X) X(F32, LoadF32) X(F16, LoadF16) X(BF16, LoadBF16) X(F8_E4M3, LoadF8)
#endif

typedef void (*Multiply)(const Layout&, const uint8_t*, int, const ActTiles&, float*, uint8_t*, const uint8_t*);
typedef void (*Unpack)(const Layout&, const uint8_t*, int64_t, float*);
struct TypeKernels {
  int code;
  Multiply multiply;
  Unpack unpack;
};
// clang-format off
static const TypeKernels TYPES[] = {
#define X(name) {ktx::name, multiply_int_weights<D##name>, unpack_ints<D##name>},
    KTX_INT_TYPES(X)
#undef X
#define X(name, L) {ktx::name, multiply_float_weights<L>, unpack_floats<L>},
    KTX_FLOAT_TYPES(X)
#undef X
};
// clang-format on

// Returns the kernels for the weight type `code`.
static TypeKernels kernels_of(int code) {
  for (const TypeKernels& kernels : TYPES)
    if (kernels.code == code) return kernels;
#ifdef KTX_BASE_KERNELS
  return {code, KTX_BASE_KERNELS.multiply, KTX_BASE_KERNELS.unpack};
#else
  __builtin_trap();  // unreachable: the drivers check the code
#endif
}
static void multiply(const Layout& l, const uint8_t* packed, int groups, const ActTiles& x, float* out, uint8_t* work,
    const uint8_t* next) {
  kernels_of(l.code).multiply(l, packed, groups, x, out, work, next);
}
static void unpack(const Layout& l, const uint8_t* group, int64_t k, float* out) {
  kernels_of(l.code).unpack(l, group, k, out);
}
