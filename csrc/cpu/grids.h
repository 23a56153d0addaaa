// Code books of the IQ types: an entry tells the values of eight weights (IQ2, IQ1) or of four (IQ3); see make_grids.py. Past the end lies
// room for a vector that is read too far.
#pragma once
#include <cstdint>
namespace ktx {
extern const uint16_t GRID_IQ2_XXS[256 + 32], GRID_IQ2_XS[512 + 32], GRID_IQ2_S[1024 + 32], GRID_IQ3_XXS[256 + 32], GRID_IQ3_S[512 + 32], GRID_IQ1[2048 + 32];
}  // namespace ktx
