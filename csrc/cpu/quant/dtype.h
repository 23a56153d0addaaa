// Dtypes of activations: the drivers take and return f32, f16 or bf16 and compute in f32. The KV cache may also store
// Q8_0. The conversions here are portable and serve what is left over; the kernels convert with their instruction set
// (isa/simd_*.inl).
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

namespace ktx {
// Q8_0, only for keys and values: blocks of 32 columns, an f16 scale followed by 32 int8 (ggml's block_q8_0). Strides
// of a Q8_0 tensor count bytes, because a block is no multiple of an element.
enum class DType { F32, F16, BF16, Q8_0 };
constexpr int64_t Q8_BLOCK = 32, Q8_BYTES = 34;

inline float from_bf16(uint16_t h) {
  const uint32_t bits = uint32_t(h) << 16;
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}
inline uint16_t to_bf16(float f) {  // rounds to nearest even, keeps NaN
  uint32_t x;
  std::memcpy(&x, &f, 4);
  if ((x & 0x7fffffffu) > 0x7f800000u) return uint16_t(x >> 16 | 0x40);
  return uint16_t((x + 0x7fff + ((x >> 16) & 1)) >> 16);
}
// Converts the bits of an f16 to f32, exactly for all values: multiplying by 2^112 also normalizes subnormals, which a
// shift of the exponent would not.
inline float from_f16(uint16_t h) {
  const uint32_t sign = uint32_t(h & 0x8000u) << 16, magnitude = uint32_t(h & 0x7fffu) << 13;
  float f;
  std::memcpy(&f, &magnitude, 4);
  f *= 0x1p112f;  // moves the exponent bias from 15 to 127, subnormals too
  uint32_t x;
  std::memcpy(&x, &f, 4);
  if ((h & 0x7c00u) == 0x7c00u) x |= 0x7f800000u;
  x |= sign;
  std::memcpy(&f, &x, 4);
  return f;
}
// Converts an f32 to the bits of an f16: rounds to nearest even, keeps NaN. Magnitudes are compared as bits, which
// order as the floats do.
inline uint16_t to_f16(float f) {
  uint32_t x;
  std::memcpy(&x, &f, 4);
  const uint32_t sign = (x >> 16) & 0x8000u, magnitude = x & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return uint16_t(sign | 0x7e00u);   // NaN
  if (magnitude >= 0x477ff000u) return uint16_t(sign | 0x7c00u);  // rounds to infinity
  if (magnitude < 0x38800000u) {                                  // subnormal: adding 0.5 lines the bits up
    float m;
    std::memcpy(&m, &magnitude, 4);
    m += 0.5f;
    std::memcpy(&x, &m, 4);
    return uint16_t(sign | (x - 0x3f000000u));
  }
  // subtracts 112 from the exponent, whose bias is 15 in place of 127, and rounds off 13 bits of mantissa
  return uint16_t(sign | ((magnitude + 0xc8000fffu + ((magnitude >> 13) & 1)) >> 13));
}

// Bytes of what a stride of this type counts: elements, or the bytes of Q8_0.
inline size_t size_of(DType type) { return type == DType::F32 ? 4 : type == DType::Q8_0 ? 1 : 2; }

// Quantizes n values (a multiple of Q8_BLOCK) to Q8_0. A block that holds an infinity or a NaN becomes NaN, because an
// int8 code cannot represent it and an error in a key must stay visible in the output.
inline void to_q8_0(const float* x, int64_t n, uint8_t* out) {
  constexpr uint16_t F16_NAN = 0x7e00;
  for (; n > 0; n -= Q8_BLOCK, x += Q8_BLOCK, out += Q8_BYTES) {
    float largest = 0;
    bool finite = true;
    for (int i = 0; i < Q8_BLOCK; ++i)
      finite &= std::isfinite(x[i]), largest = std::fabs(x[i]) > largest ? std::fabs(x[i]) : largest;
    const uint16_t scale = finite ? to_f16(largest / 127) : F16_NAN;
    const float stored = from_f16(scale), inverse = finite && stored > 0 && std::isfinite(stored) ? 1 / stored : 0;
    std::memcpy(out, &scale, 2);
    for (int i = 0; i < Q8_BLOCK; ++i) {
      const float q = finite ? std::nearbyintf(x[i] * inverse) : 1;  // 1: any code, times the NaN
      out[2 + i] = uint8_t(int8_t(q > 127 ? 127 : q < -127 ? -127 : q));
    }
  }
}
// Dequantizes n values, a multiple of Q8_BLOCK.
inline void from_q8_0(const uint8_t* block, int64_t n, float* out) {
  for (; n > 0; n -= Q8_BLOCK, block += Q8_BYTES, out += Q8_BLOCK) {
    uint16_t scale;
    std::memcpy(&scale, block, 2);
    for (int i = 0; i < Q8_BLOCK; ++i) out[i] = from_f16(scale) * float(int8_t(block[2 + i]));
  }
}

// Returns n values as f32: `x` without a copy if it is f32 already, else `buffer` with the converted values.
inline const float* as_floats(const void* x, DType type, int64_t n, float* buffer) {
  if (type == DType::F32) return static_cast<const float*>(x);
  const uint16_t* h = static_cast<const uint16_t*>(x);
  if (type == DType::Q8_0) from_q8_0(static_cast<const uint8_t*>(x), n, buffer);
  else if (type == DType::BF16)
    for (int64_t i = 0; i < n; ++i) buffer[i] = from_bf16(h[i]);
  else
    for (int64_t i = 0; i < n; ++i) buffer[i] = from_f16(h[i]);
  return buffer;
}
// Stores n f32 values as `type`: the counterpart of as_floats, for results.
inline void from_floats(const float* x, DType type, int64_t n, void* out) {
  uint16_t* h = static_cast<uint16_t*>(out);
  if (type == DType::F32) std::memcpy(out, x, size_t(n) * 4);
  else if (type == DType::Q8_0) to_q8_0(x, n, static_cast<uint8_t*>(out));
  else if (type == DType::BF16)
    for (int64_t i = 0; i < n; ++i) h[i] = to_bf16(x[i]);
  else
    for (int64_t i = 0; i < n; ++i) h[i] = to_f16(x[i]);
}
}  // namespace ktx
