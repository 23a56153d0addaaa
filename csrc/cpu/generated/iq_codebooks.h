// Code books of the IQ types: an entry tells the values of eight weights (IQ2, IQ1) or of four (IQ3), in 16 bits or in two bytes; see
// make_grids.py; IQ1's only in bytes, for packing. Past the end of the 16-bit entries lies room for a vector that is read too far.
#pragma once
#include <cstdint>
namespace ktx {
extern const uint16_t GRID_IQ2_XXS[256 + 32];
extern const uint8_t FIRST_IQ2_XXS[256], SECOND_IQ2_XXS[256];
extern const uint16_t GRID_IQ2_XS[512 + 32];
extern const uint8_t FIRST_IQ2_XS[512], SECOND_IQ2_XS[512];
extern const uint16_t GRID_IQ2_S[1024 + 32];
extern const uint8_t FIRST_IQ2_S[1024], SECOND_IQ2_S[1024];
extern const uint16_t GRID_IQ3_XXS[256 + 32];
extern const uint8_t FIRST_IQ3_XXS[256], SECOND_IQ3_XXS[256];
extern const uint16_t GRID_IQ3_S[512 + 32];
extern const uint8_t FIRST_IQ3_S[512], SECOND_IQ3_S[512];
extern const uint8_t FIRST_IQ1[2048], SECOND_IQ1[2048];
}  // namespace ktx
