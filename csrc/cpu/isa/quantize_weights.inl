// Quantization of weights to the types that ktx makes itself while it loads (INT8_128, INT4_*, Q8_0, Q4_0).

// Returns 16 weights as codes: x / scale, rounded and clamped to low..high.
AI F round_to_codes(const float* x, F inverse, float low, float high) {
  return minf(maxf(to_float(to_int(mulf(loadf(x), inverse))), setf(low)), setf(high));
}
// Returns the squared error of n weights (a multiple of 16) quantized with this scale. Each is weighted by the square
// of the weight plus their mean, because errors of large weights matter more for the product.
AI float weighted_error(const float* x, int n, float scale, float low, float high, float mean) {
  const F scales = setf(scale), inverse = setf(scale != 0 ? 1 / scale : 0.0f);
  F error = zero();
  for (int i = 0; i < n; i += 16) {
    const F v = loadf(x + i), difference = fnma(round_to_codes(x + i, inverse, low, high), scales, v);
    error = fma(mulf(difference, difference), fma(v, v, setf(mean)), error);
  }
  return sum_lanes(error);
}

// Quantizes a block of n weights: an f16 scale, then int8 codes, or (four_bits) nibbles plus 8, byte i of 16 holding
// weights i and i + 16. For four bits the scale with the least error of nine within 12 % of extreme / low is taken,
// where `extreme` is the weight of the largest magnitude: with its sign, so that it gets the code -8, which has no
// positive counterpart.
static void quantize_block(const float* x, int n, bool four_bits, uint8_t* out) {
  float extreme = 0, mean = 0;
  for (int i = 0; i < n; ++i) extreme = x[i] * x[i] > extreme * extreme ? x[i] : extreme, mean += x[i] * x[i];
  mean /= float(n);
  const float low = four_bits ? -8.0f : -127.0f, high = four_bits ? 7.0f : 127.0f;
  uint16_t best = to_f16(extreme / low);
  if (four_bits) {
    float least_error = -1;
    for (int step = -4; step <= 4; ++step) {
      const uint16_t scale = to_f16(extreme / low * (1 + 0.03f * float(step)));
      const float error = weighted_error(x, n, from_f16(scale), low, high, mean);
      if (least_error < 0 || error < least_error) least_error = error, best = scale;
    }
  }
  const float scale = from_f16(best);
  const F inverse = setf(scale != 0 ? 1 / scale : 0.0f);
  __builtin_memcpy(out, &best, 2);
  int8_t codes[128];
  for (int i = 0; i < n; i += 16) store_s8(codes + i, to_int(round_to_codes(x + i, inverse, low, high)));
  if (!four_bits) {
    __builtin_memcpy(out + 2, codes, size_t(n));
    return;
  }
  for (int i = 0; i < n; i += 32)
    for (int j = 0; j < 16; ++j) out[2 + i / 2 + j] = uint8_t((codes[i + j] + 8) | (codes[i + 16 + j] + 8) << 4);
}
