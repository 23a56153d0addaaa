// The layout of packed matrices: where the bytes of a ggml block go.
//
// A packed matrix is cut into groups of 16 rows. A group holds, for its 16 rows, one plane for every field narrower than four
// bytes (scales: [block][16] of f16 or u8) and one plane of 32-bit words ([block][word][16 rows]). A vector register then holds
// the same word of 16 rows, so packing is data movement and a packed matrix is as large as the file's, up to rounding a plane to
// 64 bytes; except IQ1, whose code book entries are expanded. Float types are a single plane [k][16 rows].
#pragma once
#include <cstddef>
#include <cstdint>

namespace ktx {
enum Code : int {  // ids of ggml; ktx types from 1000
  F32 = 0, F16 = 1, Q4_0 = 2, Q4_1 = 3, Q5_0 = 6, Q5_1 = 7, Q8_0 = 8, Q2_K = 10, Q3_K = 11, Q4_K = 12, Q5_K = 13, Q6_K = 14,
  IQ2_XXS = 16, IQ2_XS = 17, IQ3_XXS = 18, IQ1_S = 19, IQ4_NL = 20, IQ3_S = 21, IQ2_S = 22, IQ4_XS = 23, IQ1_M = 29, BF16 = 30,
  TQ1_0 = 34, TQ2_0 = 35, MXFP4 = 39, F8_E4M3 = 1000, INT8_128 = 1001, INT4_64 = 1002, INT4_128 = 1003,
};

struct Segment { int16_t offset, bytes; };  // a run of 32-bit words in the block

struct Layout {
  int code;
  const char* name;
  int block, bytes;       // elements and file bytes of a block
  int narrow_bytes;       // width of a narrow field: 2 (f16), 1, or 0 when there is none
  int narrows;            // number of narrow fields
  int16_t narrow_at[2];   // their offsets in the block
  Segment words[4];       // the rest, in the order the decoder expects
  bool is_float;
  int more = 0;           // packed words beyond those of the file's block
  int word_count() const { int n = more; for (const Segment& s : words) n += s.bytes / 4; return n; }
};

const Layout* find_layout(int code);  // nullptr when the type is unknown

constexpr size_t line(size_t bytes) { return (bytes + 63) & ~size_t(63); }
// Bytes of one group of 16 rows: narrow planes, then the word plane (float types: [k][16]).
inline size_t narrow_plane(const Layout& l, int64_t k) { return line(size_t(k / l.block) * l.narrow_bytes * 16); }
inline size_t words_at(const Layout& l, int64_t k) { return l.narrows * narrow_plane(l, k); }
inline size_t float_scales_at(const Layout& l, int64_t k) { return line(size_t(k) * l.bytes * 16); }
inline size_t group_bytes(const Layout& l, int64_t k) {
  if (l.code == F8_E4M3) return float_scales_at(l, k) + line(size_t((k + 127) / 128) * 16 * 4);  // + one f32 scale per row and 128 k
  if (l.is_float) return line(size_t(k) * l.bytes * 16);
  return words_at(l, k) + size_t(k / l.block) * l.word_count() * 64;
}
inline size_t packed_bytes(const Layout& l, int64_t n, int64_t k) { return size_t((n + 15) / 16) * group_bytes(l, k); }

// Packs `rows` rows starting at `source` (row_bytes apart) into the groups from row0 on. Rows past the end are zero.
void pack_rows(const Layout& l, const uint8_t* source, size_t row_bytes, int64_t rows, int64_t k, uint8_t* packed, int64_t row0,
               const float* scale, int64_t scale_columns);
}  // namespace ktx
