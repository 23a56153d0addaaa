// The limits of this machine, measured now: the denominators of every share of the peak that ktx prints.
#pragma once
namespace ktx {
double probe_read(int threads, int mebibytes);   // GB/s of sequential reads from memory, each thread its own range
double probe_fresh(int threads, int mebibytes);  // GB/s of first writes to new memory, page faults included
// GOPS (a multiply and an add are two) of the int8 dot product of the picked ISA
double probe_int8(int threads, double seconds);
double probe_fma(int threads, double seconds);  // GFLOPS of f32 fused multiply-adds
// GFLOPS of the bf16 dot product of the picked ISA; of f32 if it has none
double probe_bf16(int threads, double seconds);
}  // namespace ktx
