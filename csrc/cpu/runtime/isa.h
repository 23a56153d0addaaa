// The instruction set of the kernels: chosen once, from CPUID and from the register state that the operating system
// saves.
#pragma once
namespace ktx {
// In ascending order: a CPU with one set has all sets before it. AMXMODEL: the AMX kernels on emulated tile registers.
enum Isa { AMXMODEL, SCALAR, AVX2, AVXVNNI, AVX512VNNI, AVX512VBMI, AVX512BF16, AMX, ISA_COUNT };
extern const char* const ISA_NAMES[ISA_COUNT];
Isa best_isa();       // the highest that this machine has
Isa picked_isa();     // best_isa() limited by KTX_ISA; throws std::runtime_error for an unknown name
bool has_vex_vnni();  // AVX-VNNI: 256-bit VNNI in the VEX encoding
}  // namespace ktx
