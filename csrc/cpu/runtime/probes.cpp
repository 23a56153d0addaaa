#include "cpu/runtime/probes.h"

#include <immintrin.h>
#include <sys/mman.h>

#include <chrono>
#include <cstdint>
#include <cstring>
#include <iterator>
#include <stdexcept>
#include <thread>
#include <vector>

#include "cpu/runtime/isa.h"

namespace ktx {
namespace {
double now_s() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

// Runs body(thread) on threads of its own, because the pool may be smaller, and returns the seconds from first start to
// last end.
template <class F>
double time_threads(int threads, F&& body) {
  const double start = now_s();
  std::vector<std::thread> others;
  for (int t = 1; t < threads; ++t) others.emplace_back([&, t] { body(t); });
  body(0);
  for (auto& thread : others) thread.join();
  return now_s() - start;
}

// Reads `count` words and returns a value that depends on all of them, so that the compiler cannot drop the reads. Four
// independent sums and a prefetch 4 KiB ahead, because the probe must wait for memory only.
uint64_t read_words(const uint64_t* words, size_t count) {
  uint64_t a = 0, b = 0, c = 0, d = 0;
  for (size_t i = 0; i + 8 <= count; i += 8) {
    __builtin_prefetch(words + i + 512);
    a += words[i] ^ words[i + 4], b += words[i + 1] ^ words[i + 5], c += words[i + 2] ^ words[i + 6],
        d += words[i + 3] ^ words[i + 7];
  }
  return a + b + c + d;
}

constexpr int ROUNDS = 1000, CHAINS = 12;  // twelve independent chains hide the latency of the dot product
}  // namespace

// The loops are inline assembly because GCC copies every accumulator of intrinsics in and out, which makes them 2.6
// times slower.
#define KTX_CHAIN12(op) op(0) op(1) op(2) op(3) op(4) op(5) op(6) op(7) op(8) op(9) op(10) op(11)
#define KTX_VNNI(i) "vpdpbusd %%zmm30, %%zmm31, %%zmm" #i "\n"
#define KTX_VEX_VNNI(i) "%{vex%} vpdpbusd %%ymm13, %%ymm14, %%ymm" #i "\n"
#define KTX_EVEX_VNNI(i) "%{evex%} vpdpbusd %%ymm13, %%ymm14, %%ymm" #i "\n"
#define KTX_MADDUBS(i) \
  "vpmaddubsw %%ymm12, %%ymm13, %%ymm15\nvpmaddwd %%ymm14, %%ymm15, %%ymm15\nvpaddd %%ymm15, %%ymm" #i ", %%ymm" #i "\n"
#define KTX_BF16(i) "vdpbf16ps %%zmm30, %%zmm31, %%zmm" #i "\n"
#define KTX_FMA512(i) "vfmadd231ps %%zmm30, %%zmm31, %%zmm" #i "\n"
#define KTX_FMA256(i) "vfmadd231ps %%ymm13, %%ymm14, %%ymm" #i "\n"
#define KTX_LOOP(body, ...) \
  for (int i = 0; i < ROUNDS; ++i) __asm__ volatile(body::: __VA_ARGS__)
#define KTX_LOW "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10", "xmm11"

namespace {
#pragma GCC push_options
#pragma GCC target("avx512f,avx512vnni,avx512bf16")
// Each function runs ROUNDS times CHAINS independent instructions of the kind that it is named for (see Loop).
void vnni_rounds() { KTX_LOOP(KTX_CHAIN12(KTX_VNNI), KTX_LOW, "xmm30", "xmm31"); }
void bf16_rounds() { KTX_LOOP(KTX_CHAIN12(KTX_BF16), KTX_LOW, "xmm30", "xmm31"); }
// Fused multiply-adds of sixteen floats. Registers are cleared first: leftovers may be denormal, which is a hundred
// times slower.
void fma512_rounds() {
  __asm__ volatile("vzeroall\nvpxord %%zmm30, %%zmm30, %%zmm30\nvpxord %%zmm31, %%zmm31, %%zmm31"
      :
      :
      : KTX_LOW, "xmm12", "xmm13", "xmm14", "xmm15", "xmm30", "xmm31");
  KTX_LOOP(KTX_CHAIN12(KTX_FMA512), KTX_LOW, "xmm30", "xmm31");
}
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("amx-tile,amx-int8,amx-bf16")
// Four accumulator tiles, three rounds: as many instructions as the chains of the other loops.
#define KTX_TILES_OF(op)                                                                          \
  op " %%tmm6, %%tmm4, %%tmm0\n" op " %%tmm7, %%tmm4, %%tmm1\n" op " %%tmm6, %%tmm5, %%tmm2\n" op \
     " %%tmm7, %%tmm5, %%tmm3\n"
#define KTX_TILE_ROUNDS(op)                                                              \
  alignas(64) uint8_t config[64] = {1};                                                  \
  for (int i = 0; i < 8; ++i) config[16 + 2 * i] = 64, config[48 + i] = 16;              \
  __asm__ volatile("ldtilecfg %0" : : "m"(config));                                      \
  for (int i = 0; i < ROUNDS; ++i)                                                       \
    __asm__ volatile(KTX_TILES_OF(op) KTX_TILES_OF(op) KTX_TILES_OF(op) : : : "memory"); \
  __asm__ volatile("tilerelease")
void tile_rounds() { KTX_TILE_ROUNDS("tdpbssd"); }
void bf16_tile_rounds() { KTX_TILE_ROUNDS("tdpbf16ps"); }
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx2,fma")
void maddubs_rounds() { KTX_LOOP(KTX_CHAIN12(KTX_MADDUBS), KTX_LOW, "xmm12", "xmm13", "xmm14", "xmm15"); }
void vex_vnni_rounds() { KTX_LOOP(KTX_CHAIN12(KTX_VEX_VNNI), KTX_LOW, "xmm13", "xmm14"); }
void evex_vnni_rounds() { KTX_LOOP(KTX_CHAIN12(KTX_EVEX_VNNI), KTX_LOW, "xmm13", "xmm14"); }
void fma256_rounds() {
  __asm__ volatile("vzeroall" : : : KTX_LOW, "xmm12", "xmm13", "xmm14", "xmm15");
  KTX_LOOP(KTX_CHAIN12(KTX_FMA256), KTX_LOW, "xmm13", "xmm14");
}
#pragma GCC pop_options

volatile int32_t sink;  // takes results, so that the compiler cannot drop the loops
void scalar_int_rounds() {
  int32_t sum[CHAINS] = {};
  for (int i = 0; i < ROUNDS; ++i)
    for (int c = 0; c < CHAINS; ++c) sum[c] += int8_t(i) * int8_t(i + c);
  for (int c = 0; c < CHAINS; ++c) sink = sum[c];
}
volatile float float_sink;
void scalar_float_rounds() {
  float sum[CHAINS] = {};
  for (int i = 0; i < ROUNDS; ++i)
    for (int c = 0; c < CHAINS; ++c) sum[c] += float(i) * 0.5f;
  for (int c = 0; c < CHAINS; ++c) float_sink = sum[c];
}

struct Loop {
  void (*run_rounds)();  // ROUNDS instructions of each of CHAINS chains
  double operations;     // of one instruction; a multiply-add is two
};

// Returns the Gops/s of a loop on `threads` threads, which run for `seconds` each: the rate that the arithmetic units
// reach without memory, of which ktx prints the share that its kernels reach.
double measure_rate(int threads, double seconds, Loop loop) {
  constexpr int CALLS_PER_CLOCK_READ = 16;
  if (threads < 1 || threads > 1024) throw std::runtime_error("threads must be 1 to 1024");
  std::vector<int64_t> calls(threads);
  // Thread t calls the loop until its time is over, and counts the calls.
  const double elapsed_s = time_threads(threads, [&](int t) {
    const double end = now_s() + seconds;
    int64_t count = 0;
    do {
      for (int i = 0; i < CALLS_PER_CLOCK_READ; ++i) loop.run_rounds();
      count += CALLS_PER_CLOCK_READ;
    } while (now_s() < end);
    calls[t] = count;
  });
  double total = 0;
  for (int64_t count : calls) total += double(count);
  return total * ROUNDS * CHAINS * loop.operations / elapsed_s / 1e9;
}
}  // namespace

namespace {
// Memory that was never written, so that the system has no pages for it yet.
struct FreshMemory {
  size_t bytes, bytes_per_thread;  // the latter a multiple of a cache line
  uint8_t* data;
  // Reserves address space only, in huge pages where the system allows it; each thread gets an equal range.
  FreshMemory(int threads, int mebibytes) {
    if (threads < 1 || threads > 1024 || mebibytes < 1)
      throw std::runtime_error("threads and mebibytes must be positive");
    bytes = size_t(mebibytes) << 20, bytes_per_thread = bytes / threads / 64 * 64;
    void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) throw std::runtime_error("no memory for the bandwidth probe");
    madvise(memory, bytes, MADV_HUGEPAGE);
    data = static_cast<uint8_t*>(memory);
  }
  ~FreshMemory() { munmap(data, bytes); }
};
}  // namespace

// Measures first writes, each thread its own range: the system zeroes and maps a page at the first write to it.
double probe_fresh(int threads, int mebibytes) {
  FreshMemory memory(threads, mebibytes);
  const double elapsed_s = time_threads(threads,
      [&](int t) { std::memset(memory.data + t * memory.bytes_per_thread, 1, memory.bytes_per_thread); });
  return double(memory.bytes_per_thread) * threads / elapsed_s / 1e9;
}

// Measures sequential reads, each thread its own range, which was written before, so that its pages exist. The best of
// three, because other work on the machine only makes a repeat slower.
double probe_read(int threads, int mebibytes) {
  FreshMemory memory(threads, mebibytes);
  const size_t bytes_per_thread = memory.bytes_per_thread;
  time_threads(threads, [&](int t) { std::memset(memory.data + t * bytes_per_thread, 1, bytes_per_thread); });
  std::vector<uint64_t> sums(threads);
  double best = 0;
  for (int repeat = 0; repeat < 3; ++repeat) {
    const double elapsed_s = time_threads(threads, [&](int t) {
      sums[t] += read_words(reinterpret_cast<const uint64_t*>(memory.data + t * bytes_per_thread),
          bytes_per_thread / 8);
    });
    best = std::max(best, double(bytes_per_thread) * threads / elapsed_s / 1e9);
  }
  sink = int32_t(sums[0]);
  return best;
}

// Measures the instruction that the kernels of the picked instruction set multiply int8 with; the table is in the order
// of Isa.
double probe_int8(int threads, double seconds) {
  static const Loop int_loops[] = {{scalar_int_rounds, 2}, {scalar_int_rounds, 2}, {maddubs_rounds, 64},
      {has_vex_vnni() ? vex_vnni_rounds : evex_vnni_rounds, 64}, {vnni_rounds, 128}, {vnni_rounds, 128},
      {vnni_rounds, 128}, {tile_rounds, 2 * 16 * 16 * 64}};
  static_assert(std::size(int_loops) == ISA_COUNT);
  return measure_rate(threads, seconds, int_loops[picked_isa()]);
}

namespace {
constexpr Loop FLOAT_LOOPS[] = {{scalar_float_rounds, 2}, {scalar_float_rounds, 2}, {fma256_rounds, 16},
    {fma256_rounds, 16}, {fma512_rounds, 32}, {fma512_rounds, 32}, {fma512_rounds, 32}, {fma512_rounds, 32}};
static_assert(std::size(FLOAT_LOOPS) == ISA_COUNT);
}  // namespace

double probe_fma(int threads, double seconds) { return measure_rate(threads, seconds, FLOAT_LOOPS[picked_isa()]); }

double probe_bf16(int threads, double seconds) {
  const Isa isa = picked_isa();
  return measure_rate(threads, seconds,
      isa == AMX              ? Loop{bf16_tile_rounds, 2 * 16 * 16 * 32}
          : isa == AVX512BF16 ? Loop{bf16_rounds, 64}
                              : FLOAT_LOOPS[isa]);
}
}  // namespace ktx
