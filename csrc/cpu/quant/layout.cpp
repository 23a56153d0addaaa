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

// Files are unaligned: a block may have an odd number of bytes.
uint32_t load32(const uint8_t* p) {
  uint32_t word;
  std::memcpy(&word, p, 4);
  return word;
}

// In the comments below, a vector is 64 bytes: the same 32-bit word of the 16 rows of a group, as one register of the
// decoder holds it.

// Reorders the fifth bits of 32 weights of Q5_0 or Q5_1, which the file stores apart from the four low bits. The file
// has bit 4*i+b for byte b of vector i of the decoded codes; the decoder needs bit 8*b+i, because one shift and one
// mask then serve all four bytes of a vector.
uint32_t transpose_fifth_bits(uint32_t bits) {
  // The index of a bit has five bits. Swaps the roles of i and b by exchanging adjacent bits of it: i2 i1 i0 b1 b0 ->
  // b1 b0 i2 i1 i0 in three perfect shuffles.
  auto swap = [](uint32_t x, uint32_t mask, int by) {
    const uint32_t t = (x ^ (x >> by)) & mask;
    return x ^ t ^ (t << by);
  };
  for (int round = 0; round < 3; ++round) {  // a perfect shuffle rotates the five index bits by one
    bits = swap(bits, 0x0000ff00u, 8), bits = swap(bits, 0x00f000f0u, 4), bits = swap(bits, 0x0c0c0c0cu, 2),
    bits = swap(bits, 0x22222222u, 1);
  }
  return bits;
}

// Puts four code book indices, a byte each, in the order 0 2 1 3, because the decoder looks up two at a time: one mask
// then leaves indices 0 and 1 (after a shift, 2 and 3) in the 16-bit halves of the word.
uint32_t swap_middle_bytes(uint32_t x) { return (x & 0xff0000ffu) | (x & 0x0000ff00u) << 8 | (x & 0x00ff0000u) >> 8; }

// Replaces each row's word of a vector by f(word).
template <class F>
void transform_words(uint8_t* vector, F&& f) {
  uint32_t words[16];
  std::memcpy(words, vector, 64);
  for (uint32_t& word : words) word = f(word);
  std::memcpy(vector, words, 64);
}
// Applies swap_middle_bytes to the vectors from, from + step, ... below `to`.
void swap_middle_bytes_of(uint8_t* words, int from, int to, int step) {
  for (int i = from; i < to; i += step) transform_words(words + 64 * i, swap_middle_bytes);
}
// Transposes the 32 signs of each of 16 rows into eight masks of 64 bits, one for each vector of codes: bit 4*row + i
// is weight i of the vector's four in `row`. The decoder loads such a mask and negates the bytes it selects.
void transpose_signs(uint8_t* vector) {
  uint32_t rows[16];
  uint64_t masks[8] = {};
  std::memcpy(rows, vector, 64);
  for (int v = 0; v < 8; ++v)
    for (int r = 0; r < 16; ++r) masks[v] |= uint64_t(rows[r] >> (4 * v) & 15) << (4 * r);
  std::memcpy(vector, masks, 64);
}
// IQ2_XXS and IQ3_XXS store four times seven signs and, in the top four bits, a scale. Spreads them to a byte for each
// eight weights: seven signs, and one bit of the scale in place of the eighth sign, which the decoder computes from the
// seven (load_even_signs in isa/dequant.inl).
uint32_t spread_signs(uint32_t x) {
  uint32_t out = 0;
  for (int i = 0; i < 4; ++i) out |= (x >> (7 * i) & 127) << (8 * i) | (x >> (28 + i) & 1) << (8 * i + 7);
  return out;
}
// IQ2_XS, 32 weights: splits four 16-bit fields (nine bits of index, seven signs) in two vectors into a vector of low
// index bytes and a vector of signs, which has the ninth index bits in place of the eighth signs. The decoder then uses
// the look-up and the signs of the other IQ2 types.
void split_iq2_xs_pairs(uint8_t* vectors) {
  uint32_t rows[2][16];
  std::memcpy(rows, vectors, 128);
  for (int r = 0; r < 16; ++r) {
    uint32_t indices = 0, signs = 0;
    for (int i = 0; i < 4; ++i) {
      const uint32_t pair = rows[i / 2][r] >> (16 * (i % 2)) & 0xffff;
      indices |= (pair & 255) << (8 * i), signs |= (pair >> 9) << (8 * i) | (pair >> 8 & 1) << (8 * i + 7);
    }
    rows[0][r] = swap_middle_bytes(indices), rows[1][r] = signs;
  }
  std::memcpy(vectors, rows, 128);
  transpose_signs(vectors + 64);
}

// IQ1: packing expands code book entries (eight weights of -1, 0, 1, chosen by an index of eleven bits) to ternary
// digits (weight + 1), five per byte: sixteen bits for eight weights instead of eleven, but unpacking digits is five
// times as fast as a lookup. Bytes are encoded like TQ1_0: a fraction of 243, rounded up to one of 256. A quad is four
// weights of a row, one digit per byte.

// The two quads of each of the 2048 code book entries.
struct EntryDigits {
  uint32_t quads[2048][2];
  EntryDigits() {
    for (int entry = 0; entry < 2048; ++entry)
      for (int half = 0; half < 2; ++half) {
        const uint32_t fields = half ? SECOND_IQ1[entry] : FIRST_IQ1[entry];
        quads[entry][half] = (fields & 3) | (fields >> 2 & 3) << 8 | (fields >> 4 & 3) << 16 | (fields >> 6) << 24;
      }
  }
};
// Packs the 64 quads of a block (256 weights, of 16 rows) into 13 words of five digits a byte. Of the 16 quads of each
// pair of units (64 weights), fifteen go to three words; the last one goes to word 12, which has four digits a byte.
void pack_digits(const uint32_t (*quads)[16], uint32_t (*words)[16]) {
  static const uint32_t ZEROS[16] = {};
  for (int i = 0; i < 13; ++i) {
    const uint32_t* quad[5];
    for (int d = 0; d < 5; ++d)
      quad[d] = i < 12 ? quads[i / 3 * 16 + i % 3 * 5 + d] : d < 4 ? quads[16 * d + 15] : ZEROS;
    uint8_t vector[64];
    for (int r = 0; r < 16; ++r) {
      uint32_t x = quad[0][r];  // four bytes, each of which becomes a number of five digits to the base 3
      for (int d = 1; d < 5; ++d) x = 3 * x + quad[d][r];
      std::memcpy(vector + 4 * r, &x, 4);
    }
    for (uint8_t& x : vector) x = uint8_t(x + ((uint32_t(x) * 13 + 242) * 270 >> 16));  // ceil(256 x / 243)
    std::memcpy(words[i], vector, 64);
  }
}
// Replaces the code book indices of a block of IQ1_S or IQ1_M by the entries' ternary digits (weight + 1), five per
// byte, because the decoder unpacks digits faster than it looks up entries. In place, for 16 rows: a word of the table
// is 32 bits of each row. A unit is 32 weights: four indices.
//
//   words  | as the file has them                                       | as the decoder reads them
//   IQ1_S  |  8: low eight bits of the indices, a byte each             | 13: digits
//          |  4: for each unit 16 bits: 4 x 3 high index bits,          |  1: a nibble per unit: scale, sign of delta
//          |     scale (3 bits), sign of delta                          |
//   IQ1_M  |  8: low eight bits of the indices, a byte each             | 13: digits
//          |  4: for each index a nibble: 3 high bits, sign of delta    |  1: a bit for each index: sign of delta
//          |  2: scales                                                 |  2: scales, unchanged
template <bool IS_IQ1_S> void expand_iq1_indices(uint8_t* words) {
  static const EntryDigits entry_digits;
  uint32_t rows_of_word[16][16], quads[64][16], extra_bits[16] = {};
  std::memcpy(rows_of_word, words, 14 * 64);
  for (int unit = 0; unit < 8; ++unit)
    for (int r = 0; r < 16; ++r) {
      const uint32_t low = rows_of_word[unit][r], high = rows_of_word[8 + unit / 2][r] >> (16 * (unit % 2));
      if (IS_IQ1_S) extra_bits[r] |= (high >> 12 & 15) << (4 * unit);
      for (int i = 0; i < 4; ++i) {
        const uint32_t high_bits = high >> ((IS_IQ1_S ? 3 : 4) * i),
                       entry = (low >> (8 * i) & 255) | (high_bits & 7) << 8;
        if (!IS_IQ1_S) extra_bits[r] |= (high_bits >> 3 & 1) << (4 * unit + i);
        quads[8 * unit + 2 * i][r] = entry_digits.quads[entry][0];
        quads[8 * unit + 2 * i + 1][r] = entry_digits.quads[entry][1];
      }
    }
  if (!IS_IQ1_S) std::memcpy(rows_of_word[14], words + 12 * 64, 2 * 64);  // the scales
  std::memcpy(rows_of_word[13], extra_bits, 64);
  pack_digits(quads, rows_of_word);
  std::memcpy(words, rows_of_word, (IS_IQ1_S ? 14 : 16) * 64);
}

// Reorders the bits of a packed block of the types whose decoder (isa/dequant.inl) needs another order than the file's.
// Loading pays for the reordering once; the decoder would pay for it in every product. Which words are indices and
// which signs: see the comments `words` of the decoders.
void reorder_bits(int code, uint8_t* words) {
  switch (code) {
    case Q5_0:
    case Q5_1: transform_words(words + 64 * 4, transpose_fifth_bits); break;
    case IQ1_S: expand_iq1_indices<true>(words); break;
    case IQ1_M: expand_iq1_indices<false>(words); break;
    case IQ2_XXS:
      swap_middle_bytes_of(words, 0, 16, 2);
      for (int i = 1; i < 16; i += 2) transform_words(words + 64 * i, spread_signs), transpose_signs(words + 64 * i);
      break;
    case IQ2_XS:
      for (int i = 0; i < 16; i += 2) split_iq2_xs_pairs(words + 64 * i);
      break;
    case IQ2_S:
      swap_middle_bytes_of(words, 0, 8, 1);
      for (int i = 8; i < 16; ++i) transpose_signs(words + 64 * i);
      break;
    case IQ3_XXS:
      swap_middle_bytes_of(words, 0, 16, 1);
      for (int i = 16; i < 24; ++i) transform_words(words + 64 * i, spread_signs), transpose_signs(words + 64 * i);
      break;
    case IQ3_S:
      swap_middle_bytes_of(words, 0, 16, 1);
      for (int i = 16; i < 24; ++i) transpose_signs(words + 64 * i);
      break;
  }
}

// Packs block `index` of up to 16 rows into their group (see layout.h): its narrow fields (f16 or u8 scales) into their
// planes, then its 32-bit words, one word of all rows at a time, so that a store fills a cache line; then reorders bits
// within the words as the decoder reads them.
void pack_block(const Layout& l, const uint8_t* const* rows, int num_rows, int64_t index, int64_t k, uint8_t* group) {
  const size_t plane = narrow_plane_bytes(l, k), block_offset = size_t(index) * l.bytes;
  for (int i = 0; i < l.num_narrow_fields; ++i) {
    uint8_t* field = group + i * plane + index * 16 * l.narrow_bytes;
    for (int r = 0; r < num_rows; ++r)
      std::memcpy(field + r * l.narrow_bytes, rows[r] + block_offset + l.narrow_offset[i], l.narrow_bytes);
  }
  uint8_t* words = group + words_offset(l, k) + index * l.word_count() * 64;
  for (const WordRange& range : l.words)
    for (int offset = range.offset; offset < range.offset + range.bytes; offset += 4, words += 64) {
      uint32_t vector[16] = {};
      if (num_rows == 16)  // the usual case, with a constant count, which the compiler unrolls
        for (int r = 0; r < 16; ++r) vector[r] = load32(rows[r] + block_offset + offset);
      else
        for (int r = 0; r < num_rows; ++r) vector[r] = load32(rows[r] + block_offset + offset);
      std::memcpy(words, vector, 64);
    }
  reorder_bits(l.code, group + words_offset(l, k) + index * l.word_count() * 64);
}

// Packs rows of a float type (BYTES per weight) as [k][16 rows], because these types have no blocks.
template <int BYTES>
void pack_floats(const uint8_t* const* rows, int num_rows, int64_t k, uint8_t* group) {
  for (int64_t i = 0; i < k; ++i)
    for (int r = 0; r < num_rows; ++r) std::memcpy(group + (i * 16 + r) * BYTES, rows[r] + i * BYTES, BYTES);
}

// Packs up to 16 full rows into one group.
void pack_group(const Layout& l, const uint8_t* const* rows, int num_rows, int64_t k, uint8_t* group) {
  if (!l.is_float)
    for (int64_t b = 0; b < k / l.block; ++b) pack_block(l, rows, num_rows, b, k, group);
  else if (l.bytes == 4) pack_floats<4>(rows, num_rows, k, group);
  else if (l.bytes == 2) pack_floats<2>(rows, num_rows, k, group);
  else pack_floats<1>(rows, num_rows, k, group);
}
}  // namespace

const Layout* find_layout(int code) {
  for (const Layout& l : LAYOUTS)
    if (l.code == code) return &l;
  return nullptr;
}

// Packs group by group. A last group of fewer than 16 rows is zero past them; `scale` is copied to each of the 128 rows
// that share it, because the kernels load one scale per row.
void pack_rows(const Layout& l, const uint8_t* source, size_t row_bytes, int64_t rows, int64_t k, uint8_t* packed,
    int64_t row0, const float* scale, int64_t scale_columns) {
  const size_t group_stride = group_bytes(l, k);
  for (int64_t row = 0; row < rows; row += 16) {
    uint8_t* group = packed + (row0 + row) / 16 * group_stride;
    const int num_rows = rows - row < 16 ? int(rows - row) : 16;
    if (num_rows < 16) std::memset(group, 0, group_stride);
    const uint8_t* row_data[16];
    for (int r = 0; r < num_rows; ++r) row_data[r] = source + (row + r) * row_bytes;
    pack_group(l, row_data, num_rows, k, group);
    if (!scale) continue;
    float* scales = reinterpret_cast<float*>(group + float_scales_offset(l, k));
    for (int64_t c = 0; c < scale_columns; ++c)
      for (int r = 0; r < num_rows; ++r) scales[c * 16 + r] = scale[(row0 + row + r) / 128 * scale_columns + c];
  }
}
}  // namespace ktx
