// One entry point an instruction set; each is compiled with flags of its own (csrc/compilers.py).
#pragma once
#include "../lora.h"
#if defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace generic {
void batched(const LoraBatch&);
bool forward(const LoraLinear&);
bool backward(const LoraLinear&);
void dequantize(const LoraDequantize&);
}
#if defined(__x86_64__)
namespace avx2 {
inline bool supported() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}
void batched(const LoraBatch&);
bool forward(const LoraLinear&);
bool backward(const LoraLinear&);
void dequantize(const LoraDequantize&);
}  // namespace avx2
namespace avx512 {
inline bool supported() {
  return avx2::supported() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}
void batched(const LoraBatch&);
bool forward(const LoraLinear&);
bool backward(const LoraLinear&);
void dequantize(const LoraDequantize&);
}  // namespace avx512
namespace avx512_bf16 {
inline bool supported() { return avx512::supported() && __builtin_cpu_supports("avx512bf16"); }
void batched(const LoraBatch&);
bool forward(const LoraLinear&);
bool backward(const LoraLinear&);
}
namespace amx {
// Linux lends a process tiles where it asks for them: ARCH_REQ_XCOMP_PERM of XTILEDATA, with no harm as often as one likes.
inline bool supported() {
#ifdef SYS_arch_prctl
  unsigned unused, features = 0;
  return avx512_bf16::supported() && __get_cpuid_count(7, 0, &unused, &unused, &unused, &features) &&
         (features >> 22 & features >> 24 & 1) && syscall(SYS_arch_prctl, 0x1023, 18) == 0;
#else
  return false;
#endif
}
void batched(const LoraBatch&);
bool forward(const LoraLinear&);
bool backward(const LoraLinear&);
}  // namespace amx
#endif
