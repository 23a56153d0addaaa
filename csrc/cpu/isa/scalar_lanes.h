// For files in which a vector is an array: the portable kernels and the emulated AMX.
#pragma once

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#define AI inline  // with a sanitizer's check at each access, inlined loops take the compiler many minutes
#else
#define AI inline __attribute__((always_inline))
#endif
#define KTX_SCALAR_LANES  // a lane is a loop
