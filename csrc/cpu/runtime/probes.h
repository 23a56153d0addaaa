// What this machine can do at most, measured now: the denominators of every share that ktx prints.
#pragma once
namespace ktx {
double probe_read(int threads, int mebibytes);      // GB/s of sequential reads from memory, each thread its own part
double probe_fresh(int threads, int mebibytes);     // GB/s of first writes to new memory: what the system takes to hand it out
double probe_int8(int threads, double seconds);     // GOPS (a multiply and an add count two) of the picked ISA's int8 dot product
double probe_fma(int threads, double seconds);      // GFLOPS of f32 fused multiply-adds
double probe_bf16(int threads, double seconds);     // GFLOPS of the picked ISA's dot product of bf16; of f32 where it has none
}  // namespace ktx
