// Code books of the IQ types: each word is four signed bytes (IQ2, IQ1: two words an entry; IQ3: one).
#pragma once
#include <cstdint>
namespace ktx {
extern const uint32_t GRID_IQ2_XXS[512], GRID_IQ2_XS[1024], GRID_IQ2_S[2048], GRID_IQ3_XXS[256], GRID_IQ3_S[512], GRID_IQ1[4096];
extern const uint32_t SIGNS[128];  // seven sign bits -> eight
}  // namespace ktx
