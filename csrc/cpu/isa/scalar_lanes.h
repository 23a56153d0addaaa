// For files in which a lane of a vector is a loop: the portable kernels, and the model of AMX.
#pragma once

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#define AI inline  // lanes are loops: with a check at each access, all of them in one function take the compiler many minutes
#else
#define AI inline __attribute__((always_inline))
#endif
#define KTX_SCALAR_LANES  // a lane is a loop
