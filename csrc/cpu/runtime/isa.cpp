#include "cpu/runtime/isa.h"

#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cstdint>
#include <cstdlib>
#include <stdexcept>
#include <string>

#include "cpu/isa/kernels.h"

namespace ktx {
const char* const ISA_NAMES[ISA_COUNT] = {"amxmodel", "scalar", "avx2", "avxvnni", "avx512vnni", "avx512vbmi",
    "avx512bf16", "amx"};

namespace {
bool has_bit(uint32_t word, int i) { return (word >> i) & 1; }

// Register state that the operating system saves (XCR0): a CPU may have instructions that the kernel does not enable.
uint64_t read_xcr0() {
  uint32_t low, high;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (uint64_t(high) << 32) | low;
}

// Tile registers are large, so Linux enables them per process on request (arch_prctl ARCH_REQ_XCOMP_PERM,
// XFEATURE_XTILEDATA).
bool tiles_permitted() { return syscall(SYS_arch_prctl, 0x1023, 18) == 0; }

// Returns the highest set whose instructions this CPU has (CPUID) and whose registers the system saves (XCR0), checked
// from the lowest up.
Isa detect_isa() {
  // CPUID bits, by leaf and register.
  constexpr int OSXSAVE = 27, FMA = 12, F16C = 29;                                        // leaf 1, ecx
  constexpr int AVX2_BIT = 5, AVX512F = 16, AVX512DQ = 17, AVX512BW = 30, AVX512VL = 31;  // leaf 7, ebx
  constexpr int VBMI = 1, VNNI = 11;                                                      // leaf 7, ecx
  constexpr int AMX_BF16 = 22, AMX_TILE = 24, AMX_INT8 = 25;                              // leaf 7, edx
  constexpr int AVX512_BF16_BIT = 5;                                                      // leaf 7.1, eax
  // XCR0: registers that a context switch saves.
  constexpr uint64_t YMM_STATE = 0x06, ZMM_STATE = 0xe6, TILE_STATE = 0x60000;
  uint32_t eax, ebx, ecx, edx;
  if (!__get_cpuid(1, &eax, &ebx, &ecx, &edx) || !has_bit(ecx, OSXSAVE)) return SCALAR;
  const bool fma = has_bit(ecx, FMA), f16c = has_bit(ecx, F16C);
  const uint64_t xcr0 = read_xcr0();
  if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx)) return SCALAR;
  const bool saves_ymm = (xcr0 & YMM_STATE) == YMM_STATE, saves_zmm = (xcr0 & ZMM_STATE) == ZMM_STATE;
  if (!(saves_ymm && fma && f16c && has_bit(ebx, AVX2_BIT))) return SCALAR;
  const bool avx512 = has_bit(ebx, AVX512F) && has_bit(ebx, AVX512DQ) && has_bit(ebx, AVX512BW) &&
      has_bit(ebx, AVX512VL);
  if (!(saves_zmm && avx512 && has_bit(ecx, VNNI))) return has_vex_vnni() ? AVXVNNI : AVX2;
  if (!has_bit(ecx, VBMI)) return AVX512VNNI;
  const bool has_tiles = has_bit(edx, AMX_BF16) && has_bit(edx, AMX_TILE) && has_bit(edx, AMX_INT8) &&
      (xcr0 & TILE_STATE) == TILE_STATE;
  if (!__get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) || !has_bit(eax, AVX512_BF16_BIT)) return AVX512VBMI;
  return has_tiles && tiles_permitted() ? AMX : AVX512BF16;
}

// Returns `best`, or the set that KTX_ISA names if that is lower: a set that the machine lacks would crash.
Isa limited_by_env(Isa best) {
  const char* requested = std::getenv("KTX_ISA");
  if (!requested || !*requested) return best;
  for (int i = 0; i < ISA_COUNT; ++i)
    if (std::string(requested) == ISA_NAMES[i]) return i < best ? Isa(i) : best;
  std::string known;
  for (const char* name : ISA_NAMES) known += (known.empty() ? "" : ", ") + std::string(name);
  throw std::runtime_error("KTX_ISA=" + std::string(requested) + " is not known: use one of " + known);
}
}  // namespace

bool has_vex_vnni() {
  uint32_t eax, ebx, ecx, edx;
  return __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) && has_bit(eax, 4);
}

Isa best_isa() {
  static const Isa isa = detect_isa();
  return isa;
}

Isa picked_isa() {
  static const Isa isa = limited_by_env(best_isa());
  return isa;
}
}  // namespace ktx
