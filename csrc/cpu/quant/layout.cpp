#include "cpu/quant/layout.h"

#include <cstring>

#include "cpu/generated/iq_codebooks.h"

namespace ktx {
namespace {
// Offsets are those of the ggml block structures (gguf-py's constants and dequantizers name the same fields).
const Layout LAYOUTS[] = {
    //  code     name      elems bytes  narrow           words (in the decoder's order)
    {F32, "F32", 1, 4, 0, 0, {0, 0}, {}, true},
    {F16, "F16", 1, 2, 0, 0, {0, 0}, {}, true},
    {BF16, "BF16", 1, 2, 0, 0, {0, 0}, {}, true},
    {F8_E4M3, "F8_E4M3", 1, 1, 0, 0, {0, 0}, {}, true},
    {Q4_0, "Q4_0", 32, 18, 2, 1, {0, 0}, {{2, 16}}, false},
    {Q4_1, "Q4_1", 32, 20, 2, 2, {0, 2}, {{4, 16}}, false},
    {Q5_0, "Q5_0", 32, 22, 2, 1, {0, 0}, {{6, 16}, {2, 4}}, false},
    {Q5_1, "Q5_1", 32, 24, 2, 2, {0, 2}, {{8, 16}, {4, 4}}, false},
    {Q8_0, "Q8_0", 32, 34, 2, 1, {0, 0}, {{2, 32}}, false},
    {Q2_K, "Q2_K", 256, 84, 2, 2, {80, 82}, {{16, 64}, {0, 16}}, false},
    {Q3_K, "Q3_K", 256, 110, 2, 1, {108, 0}, {{32, 64}, {0, 32}, {96, 12}}, false},
    {Q4_K, "Q4_K", 256, 144, 2, 2, {0, 2}, {{16, 128}, {4, 12}}, false},
    {Q5_K, "Q5_K", 256, 176, 2, 2, {0, 2}, {{48, 128}, {16, 32}, {4, 12}}, false},
    {Q6_K, "Q6_K", 256, 210, 2, 1, {208, 0}, {{0, 128}, {128, 64}, {192, 16}}, false},
    {IQ2_XXS, "IQ2_XXS", 256, 66, 2, 1, {0, 0}, {{2, 64}}, false},
    {IQ2_XS, "IQ2_XS", 256, 74, 2, 1, {0, 0}, {{2, 64}, {66, 8}}, false},
    {IQ2_S, "IQ2_S", 256, 82, 2, 1, {0, 0}, {{2, 32}, {34, 32}, {66, 8}, {74, 8}}, false},
    {IQ3_XXS, "IQ3_XXS", 256, 98, 2, 1, {0, 0}, {{2, 64}, {66, 32}}, false},
    {IQ3_S, "IQ3_S", 256, 110, 2, 1, {0, 0}, {{2, 64}, {74, 32}, {66, 8}, {106, 4}}, false},
    {IQ1_S, "IQ1_S", 256, 50, 2, 1, {0, 0}, {{2, 32}, {34, 16}}, false, 2},
    {IQ1_M, "IQ1_M", 256, 56, 0, 0, {0, 0}, {{0, 32}, {32, 16}, {48, 8}}, false, 2},
    {IQ4_NL, "IQ4_NL", 32, 18, 2, 1, {0, 0}, {{2, 16}}, false},
    {IQ4_XS, "IQ4_XS", 256, 136, 2, 2, {0, 2}, {{8, 128}, {4, 4}}, false},
    {MXFP4, "MXFP4", 32, 17, 1, 1, {0, 0}, {{1, 16}}, false},
    {TQ1_0, "TQ1_0", 256, 54, 2, 1, {52, 0}, {{0, 48}, {48, 4}}, false},
    {TQ2_0, "TQ2_0", 256, 66, 2, 1, {64, 0}, {{0, 64}}, false},
    {INT8_128, "INT8_128", 128, 130, 2, 1, {0, 0}, {{2, 128}}, false},
    {INT4_64, "INT4_64", 64, 34, 2, 1, {0, 0}, {{2, 32}}, false},
    {INT4_128, "INT4_128", 128, 66, 2, 1, {0, 0}, {{2, 64}}, false},
};

uint32_t load32(const uint8_t* p) {
  uint32_t word;
  std::memcpy(&word, p, 4);
  return word;
}

// The fifth bits of Q5_0 and Q5_1: the file has bit 4*i+b for byte b of vector i; with bit 8*b+i one shift and one mask serve a vector.
uint32_t fifth_bits(uint32_t bits) {
  // Swaps the roles of (i, b) by exchanging adjacent index bits: i2 i1 i0 b1 b0 -> b1 b0 i2 i1 i0 in two perfect shuffles.
  auto swap = [](uint32_t x, uint32_t mask, int by) { const uint32_t t = (x ^ (x >> by)) & mask; return x ^ t ^ (t << by); };
  for (int round = 0; round < 3; ++round) {  // a perfect shuffle rotates the five index bits by one
    bits = swap(bits, 0x0000ff00u, 8), bits = swap(bits, 0x00f000f0u, 4), bits = swap(bits, 0x0c0c0c0cu, 2), bits = swap(bits, 0x22222222u, 1);
  }
  return bits;
}

// The order of four grid indices becomes 0 2 1 3: a mask then leaves two of them in the halves of the word.
uint32_t swap_middle(uint32_t x) { return (x & 0xff0000ffu) | (x & 0x0000ff00u) << 8 | (x & 0x00ff0000u) >> 8; }

template <class F>
void each_word(uint8_t* line, F&& f) {
  uint32_t words[16];
  std::memcpy(words, line, 64);
  for (uint32_t& word : words) word = f(word);
  std::memcpy(line, words, 64);
}
void swap_indices(uint8_t* words, int from, int to, int step) {
  for (int i = from; i < to; i += step) each_word(words + 64 * i, swap_middle);
}
// The 32 signs of each row -> eight times 64 bits, bit 4*row + i for weight i of four.
void signs_by_vector(uint8_t* line) {
  uint32_t rows[16];
  uint64_t masks[8] = {};
  std::memcpy(rows, line, 64);
  for (int v = 0; v < 8; ++v)
    for (int r = 0; r < 16; ++r) masks[v] |= uint64_t(rows[r] >> (4 * v) & 15) << (4 * r);
  std::memcpy(line, masks, 64);
}
// Four times seven signs and four bits of a scale, stored in place of the eighth signs.
uint32_t with_spare_bits(uint32_t x) {
  uint32_t out = 0;
  for (int i = 0; i < 4; ++i) out |= (x >> (7 * i) & 127) << (8 * i) | (x >> (28 + i) & 1) << (8 * i + 7);
  return out;
}
// IQ2_XS, 32 weights: four times nine bits of index and seven signs -> low index bytes, and signs with the ninth bits in the spare bits.
void part_pairs(uint8_t* lines) {
  uint32_t rows[2][16];
  std::memcpy(rows, lines, 128);
  for (int r = 0; r < 16; ++r) {
    uint32_t indices = 0, signs = 0;
    for (int i = 0; i < 4; ++i) {
      const uint32_t pair = rows[i / 2][r] >> (16 * (i % 2)) & 0xffff;
      indices |= (pair & 255) << (8 * i), signs |= (pair >> 9) << (8 * i) | (pair >> 8 & 1) << (8 * i + 7);
    }
    rows[0][r] = swap_middle(indices), rows[1][r] = signs;
  }
  std::memcpy(lines, rows, 128);
  signs_by_vector(lines + 64);
}

// IQ1: code book entries (of 2048) are expanded to ternary digits, five per byte: sixteen bits for eight weights instead of eleven, but unpacking digits
// is five times as fast as a lookup. Bytes are encoded like TQ1_0: a fraction of 243, rounded up to one of 256.
struct Spelling {  // the weights of each entry as bytes
  uint32_t fours[2048][2];
  Spelling() {
    for (int e = 0; e < 2048; ++e)
      for (int half = 0; half < 2; ++half) {
        const uint32_t fields = half ? SECOND_IQ1[e] : FIRST_IQ1[e];
        fours[e][half] = (fields & 3) | (fields >> 2 & 3) << 8 | (fields >> 4 & 3) << 16 | (fields >> 6) << 24;
      }
  }
};
// The words of digits from those of `fours`: of each pair of units fifteen fours in three words, and one in the last word.
void put_digits(const uint32_t (*fours)[16], uint32_t (*words)[16]) {
  static const uint32_t NONE[16] = {};
  for (int i = 0; i < 13; ++i) {
    const uint32_t* digit[5];
    for (int d = 0; d < 5; ++d) digit[d] = i < 12 ? fours[i / 3 * 16 + i % 3 * 5 + d] : d < 4 ? fours[16 * d + 15] : NONE;
    uint8_t line[64];
    for (int r = 0; r < 16; ++r) {
      uint32_t x = digit[0][r];
      for (int d = 1; d < 5; ++d) x = 3 * x + digit[d][r];
      std::memcpy(line + 4 * r, &x, 4);
    }
    for (uint8_t& x : line) x = uint8_t(x + ((uint32_t(x) * 13 + 242) * 270 >> 16));  // ceil(256 x / 243)
    std::memcpy(words[i], line, 64);
  }
}
// IQ1_S: 8 words of low index bytes, 4 of two times (3 x 4 index bits, scale, sign of delta) -> 13 of digits, 1 of (scale, sign) nibbles.
// IQ1_M: 8 and 4 of (3 index bits, sign of delta) nibbles, 2 of scales -> 13, 1 of signs, 2 of scales.
template <bool S> void spell_out(uint8_t* lines) {
  static const Spelling spelling;
  uint32_t words[16][16], fours[64][16], rest[16] = {};
  std::memcpy(words, lines, 14 * 64);
  for (int u = 0; u < 8; ++u)
    for (int r = 0; r < 16; ++r) {
      const uint32_t low = words[u][r], high = words[8 + u / 2][r] >> (16 * (u % 2));
      if (S) rest[r] |= (high >> 12 & 15) << (4 * u);
      for (int i = 0; i < 4; ++i) {
        const uint32_t more = high >> ((S ? 3 : 4) * i), entry = (low >> (8 * i) & 255) | (more & 7) << 8;
        if (!S) rest[r] |= (more >> 3 & 1) << (4 * u + i);
        fours[8 * u + 2 * i][r] = spelling.fours[entry][0], fours[8 * u + 2 * i + 1][r] = spelling.fours[entry][1];
      }
    }
  if (!S) std::memcpy(words[14], lines + 12 * 64, 2 * 64);
  std::memcpy(words[13], rest, 64);
  put_digits(fours, words);
  std::memcpy(lines, words, (S ? 14 : 16) * 64);
}

// Reorders the bits of types whose decoder needs another order (see isa/dequant.inl).
void arrange(int code, uint8_t* words) {
  switch (code) {
    case Q5_0: case Q5_1: each_word(words + 64 * 4, fifth_bits); break;
    case IQ1_S: spell_out<true>(words); break;
    case IQ1_M: spell_out<false>(words); break;
    case IQ2_XXS:
      swap_indices(words, 0, 16, 2);
      for (int i = 1; i < 16; i += 2) each_word(words + 64 * i, with_spare_bits), signs_by_vector(words + 64 * i);
      break;
    case IQ2_XS:
      for (int i = 0; i < 16; i += 2) part_pairs(words + 64 * i);
      break;
    case IQ2_S:
      swap_indices(words, 0, 8, 1);
      for (int i = 8; i < 16; ++i) signs_by_vector(words + 64 * i);
      break;
    case IQ3_XXS:
      swap_indices(words, 0, 16, 1);
      for (int i = 16; i < 24; ++i) each_word(words + 64 * i, with_spare_bits), signs_by_vector(words + 64 * i);
      break;
    case IQ3_S:
      swap_indices(words, 0, 16, 1);
      for (int i = 16; i < 24; ++i) signs_by_vector(words + 64 * i);
      break;
  }
}

// Block `index` of up to 16 rows into their group: a word of all rows at a time, so that stores are whole lines.
void put_blocks(const Layout& l, const uint8_t* const* rows, int lanes, int64_t index, int64_t k, uint8_t* group) {
  const size_t plane = narrow_plane(l, k), at = size_t(index) * l.bytes;
  for (int i = 0; i < l.narrows; ++i) {
    uint8_t* narrow = group + i * plane + index * 16 * l.narrow_bytes;
    for (int r = 0; r < lanes; ++r) std::memcpy(narrow + r * l.narrow_bytes, rows[r] + at + l.narrow_at[i], l.narrow_bytes);
  }
  uint8_t* words = group + words_at(l, k) + index * l.word_count() * 64;
  for (const Segment& s : l.words)
    for (int offset = s.offset; offset < s.offset + s.bytes; offset += 4, words += 64) {
      uint32_t line[16] = {};
      if (lanes == 16)
        for (int r = 0; r < 16; ++r) line[r] = load32(rows[r] + at + offset);
      else
        for (int r = 0; r < lanes; ++r) line[r] = load32(rows[r] + at + offset);
      std::memcpy(words, line, 64);
    }
  arrange(l.code, group + words_at(l, k) + index * l.word_count() * 64);
}

template <int BYTES>
void put_floats(const uint8_t* const* rows, int lanes, int64_t k, uint8_t* group) {
  for (int64_t i = 0; i < k; ++i)
    for (int r = 0; r < lanes; ++r) std::memcpy(group + (i * 16 + r) * BYTES, rows[r] + i * BYTES, BYTES);
}

void put_rows(const Layout& l, const uint8_t* const* rows, int lanes, int64_t k, uint8_t* group) {
  if (!l.is_float)
    for (int64_t b = 0; b < k / l.block; ++b) put_blocks(l, rows, lanes, b, k, group);
  else if (l.bytes == 4) put_floats<4>(rows, lanes, k, group);
  else if (l.bytes == 2) put_floats<2>(rows, lanes, k, group);
  else put_floats<1>(rows, lanes, k, group);
}
}  // namespace

const Layout* find_layout(int code) {
  for (const Layout& l : LAYOUTS)
    if (l.code == code) return &l;
  return nullptr;
}

void pack_rows(const Layout& l, const uint8_t* source, size_t row_bytes, int64_t rows, int64_t k, uint8_t* packed, int64_t row0,
               const float* scale, int64_t scale_columns) {
  const size_t stride = group_bytes(l, k);
  for (int64_t row = 0; row < rows; row += 16) {
    uint8_t* group = packed + (row0 + row) / 16 * stride;
    const int lanes = rows - row < 16 ? int(rows - row) : 16;
    if (lanes < 16) std::memset(group, 0, stride);
    const uint8_t* lines[16];
    for (int r = 0; r < lanes; ++r) lines[r] = source + (row + r) * row_bytes;
    put_rows(l, lines, lanes, k, group);
    if (!scale) continue;
    float* scales = reinterpret_cast<float*>(group + float_scales_at(l, k));
    for (int64_t c = 0; c < scale_columns; ++c)
      for (int r = 0; r < lanes; ++r) scales[c * 16 + r] = scale[(row0 + row + r) / 128 * scale_columns + c];
  }
}
}  // namespace ktx
