// The layout of packed matrices: where the bytes of a ggml block go.
//
// A packed matrix is cut into groups of 16 rows. A plane is an array of one kind of field for all blocks of a group. A
// group has one plane for every field narrower than four bytes (a narrow field: f16 or u8 scales, [block][16 rows]) and
// one plane of 32-bit words ([block][word][16 rows]). A vector register then holds the same word of 16 rows, so packing
// is data movement and a packed matrix is as large as the file's, up to rounding a plane to 64 bytes; except IQ1, whose
// code book entries are expanded. Float types are a single plane [k][16 rows]. Everywhere in csrc/cpu, k is the number
// of columns of a matrix (the length of a dot product) and n its number of rows.
#pragma once
#include <cstddef>
#include <cstdint>

namespace ktx {
// clang-format off
enum Code : int {  // ids of ggml; ktx types from 1000
  F32 = 0, F16 = 1, Q4_0 = 2, Q4_1 = 3, Q5_0 = 6, Q5_1 = 7, Q8_0 = 8, Q2_K = 10, Q3_K = 11, Q4_K = 12, Q5_K = 13, Q6_K
  = 14, IQ2_XXS = 16, IQ2_XS = 17, IQ3_XXS = 18, IQ1_S = 19, IQ4_NL = 20, IQ3_S = 21, IQ2_S = 22, IQ4_XS = 23, IQ1_M =
  29, BF16 = 30, TQ1_0 = 34, TQ2_0 = 35, MXFP4 = 39, F8_E4M3 = 1000, INT8_128 = 1001, INT4_64 = 1002, INT4_128 = 1003,
};
// clang-format on

struct WordRange {
  int16_t offset, bytes;
};  // consecutive 32-bit words of a file's block

// Where the fields of a block are, in the file and in a packed group. layout.cpp has one Layout for each weight type.
struct Layout {
  int code;
  const char* name;
  int block, bytes;  // weights and file bytes of a block
  int narrow_bytes;  // width of a narrow field: 2 (f16), 1, or 0 when there is none
  int num_narrow_fields;
  int16_t narrow_offset[2];  // of each narrow field, in the block
  WordRange words[4];        // the other bytes, in the order in which the decoder expects them
  bool is_float;
  int extra_words = 0;  // packed words beyond those of the file's block: IQ1 grows, see expand_iq1_indices
  // Packed 32-bit words of a block and row.
  int word_count() const {
    int n = extra_words;
    for (const WordRange& s : words) n += s.bytes / 4;
    return n;
  }
};

const Layout* find_layout(int code);  // nullptr when the type is unknown

// Rounds up to full cache lines, because each plane starts at one.
constexpr size_t round_to_cache_line(size_t bytes) { return (bytes + 63) & ~size_t(63); }
// Sizes and offsets in bytes for a group of 16 rows of k columns: narrow planes, then the word plane. Float types:
// [k][16]; F8_E4M3 is followed by f32 scales, one for each row and 128 columns.
inline size_t narrow_plane_bytes(const Layout& l, int64_t k) {
  return round_to_cache_line(size_t(k / l.block) * l.narrow_bytes * 16);
}
inline size_t words_offset(const Layout& l, int64_t k) { return l.num_narrow_fields * narrow_plane_bytes(l, k); }
inline size_t float_scales_offset(const Layout& l, int64_t k) { return round_to_cache_line(size_t(k) * l.bytes * 16); }
inline size_t group_bytes(const Layout& l, int64_t k) {
  if (l.code == F8_E4M3) return float_scales_offset(l, k) + round_to_cache_line(size_t((k + 127) / 128) * 16 * 4);
  if (l.is_float) return round_to_cache_line(size_t(k) * l.bytes * 16);
  return words_offset(l, k) + size_t(k / l.block) * l.word_count() * 64;
}
// Bytes of a packed matrix of n rows.
inline size_t packed_bytes(const Layout& l, int64_t n, int64_t k) { return size_t((n + 15) / 16) * group_bytes(l, k); }

// Packs `rows` rows of k columns, which start at `source` and are `row_bytes` apart, into the groups from row `row0` (a
// multiple of 16) on. Rows that are missing in the last group become zero. F8_E4M3 only: `scale` f32 [rows of the
// matrix / 128][scale_columns] is copied to each group; else null.
void pack_rows(const Layout& l, const uint8_t* source, size_t row_bytes, int64_t rows, int64_t k, uint8_t* packed,
    int64_t row0, const float* scale, int64_t scale_columns);
}  // namespace ktx
