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
const char* const ISA_NAMES[ISA_COUNT] = {"amxmodel", "scalar", "avx2", "avxvnni", "avx512vnni", "avx512vbmi", "avx512bf16", "amx"};

namespace {
bool bit(uint32_t word, int i) { return (word >> i) & 1; }

// Register state that the operating system saves (XCR0): a CPU may have instructions that the kernel does not enable.
uint64_t saved_state() {
  uint32_t low, high;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (uint64_t(high) << 32) | low;
}

// Tile registers are large, so Linux enables them per process on request (arch_prctl ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA).
bool tiles_permitted() { return syscall(SYS_arch_prctl, 0x1023, 18) == 0; }

Isa probe() {
  uint32_t a, b, c, d;
  if (!__get_cpuid(1, &a, &b, &c, &d) || !bit(c, 27)) return SCALAR;  // 27: OSXSAVE
  const bool fma = bit(c, 12), f16c = bit(c, 29);
  const uint64_t state = saved_state();
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return SCALAR;
  const bool ymm = (state & 0x06) == 0x06, zmm = (state & 0xe6) == 0xe6;
  if (!(ymm && fma && f16c && bit(b, 5))) return SCALAR;
  const bool avx512 = bit(b, 16) && bit(b, 17) && bit(b, 30) && bit(b, 31);  // F, DQ, BW, VL
  if (!(zmm && avx512 && bit(c, 11))) return has_vex_vnni() ? AVXVNNI : AVX2;  // 11: VNNI
  if (!bit(c, 1)) return AVX512VNNI;  // 1: VBMI
  const bool tiles = bit(d, 22) && bit(d, 24) && bit(d, 25) && (state & 0x60000) == 0x60000;  // AMX: bf16, tile, int8
  if (!__get_cpuid_count(7, 1, &a, &b, &c, &d) || !bit(a, 5)) return AVX512VBMI;
  return tiles && tiles_permitted() ? AMX : AVX512BF16;
}

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
  uint32_t a, b, c, d;
  return __get_cpuid_count(7, 1, &a, &b, &c, &d) && bit(a, 4);
}

Isa best_isa() {
  static const Isa isa = probe();
  return isa;
}

Isa picked_isa() {
  static const Isa isa = limited_by_env(best_isa());
  return isa;
}
}  // namespace ktx
