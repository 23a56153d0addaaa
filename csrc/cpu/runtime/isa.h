// Which instruction set the kernels use: decided once, from what the CPU and the operating system offer.
#pragma once
namespace ktx {
// Each can do what those before it can. AMXMODEL: the kernels of AMX on tiles in software.
enum Isa { AMXMODEL, SCALAR, AVX2, AVXVNNI, AVX512VNNI, AVX512VBMI, AVX512BF16, AMX, ISA_COUNT };
extern const char* const ISA_NAMES[ISA_COUNT];
Isa best_isa();       // what this machine could do
Isa picked_isa();     // best_isa() lowered by KTX_ISA; throws std::runtime_error on an unknown name
bool has_vex_vnni();  // 256-bit VNNI as machines without AVX-512 encode it
}  // namespace ktx
