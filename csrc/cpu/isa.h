// Which instruction set the kernels use: decided once, from what the CPU and the operating system offer.
#pragma once
namespace ktx {
enum Isa { SCALAR = 0, AVX2 = 1, AVX512VNNI = 2, AVX512VBMI = 3, ISA_COUNT = 4 };
extern const char* const ISA_NAMES[ISA_COUNT];
Isa best_isa();    // what this machine could do
Isa picked_isa();  // best_isa() lowered by KTX_ISA; throws std::runtime_error on an unknown name
}  // namespace ktx
