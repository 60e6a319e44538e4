// The C functions that Python calls, and the choice of an instruction set at run time.
#include "cpu/isa.h"
#include "cpu/scratch.h"

namespace {

struct Isa {
  const char* name;
  bool (*supported)();
  void (*batched)(const LoraBatch&);
  bool (*forward)(const LoraLinear&);
  bool (*backward)(const LoraLinear&);
  void (*dequantize)(const LoraDequantize&);  // null: that of the next
};

const Isa kIsas[] = {  // the best first
#if defined(__x86_64__)
    {"amx", amx::supported, amx::batched, amx::forward, amx::backward, nullptr},
    {"avx512_bf16", avx512_bf16::supported, avx512_bf16::batched, avx512_bf16::forward, avx512_bf16::backward,
     nullptr},  // its rounding flushes subnormals
    {"avx512", avx512::supported, avx512::batched, avx512::forward, avx512::backward, avx512::dequantize},
    {"avx2", avx2::supported, avx2::batched, avx2::forward, avx2::backward, avx2::dequantize},
#endif
    {"generic", [] { return true; }, generic::batched, generic::forward, generic::backward,
     generic::dequantize},
};
constexpr int kCount = sizeof kIsas / sizeof *kIsas;

}  // namespace

#define EXPORT __attribute__((visibility("default")))

extern "C" {

EXPORT int32_t lora_abi() { return LORA_ABI; }

EXPORT const char* lora_isa_name(int32_t isa) { return isa < kCount ? kIsas[isa].name : nullptr; }

EXPORT int32_t lora_isa_supported(int32_t isa) { return kIsas[isa].supported(); }

// y of `call`, which stays as it is: many threads may use it. Without w y += the adapters. False where there is no memory.
EXPORT int32_t lora_batched(const LoraBatch* call, const void* x, int64_t stride_x, void* y, const void* w, int64_t stride_w,
                            const void* bias, int32_t threads, int32_t isa) {
  LoraBatch batch = *call;
  const LoraSlice& last = batch.slices[batch.num_slices - 1];
  const int64_t ranks = last.first_rank + last.max_rank;
  batch.x = x, batch.stride_x = stride_x, batch.y = y, batch.threads = threads;
  batch.w = w, batch.stride_w = stride_w, batch.bias = bias;
  const Scratch packed_x(w ? (batch.rows + 15) / 16 * 16 * batch.k : 0), h(ranks * batch.rows * batch.adapters_per_row);
  batch.packed_x = packed_x, batch.h = h;
  if (packed_x && h) kIsas[isa].batched(batch);
  return packed_x && h;
}

// y and h, or the gradients, of `linear`; false where there is no memory for packed operands.
EXPORT int32_t lora_forward(const LoraLinear* linear, int32_t isa) { return kIsas[isa].forward(*linear); }

EXPORT int32_t lora_backward(const LoraLinear* linear, int32_t isa) { return kIsas[isa].backward(*linear); }

// The dense values of `weight`.
EXPORT void lora_dequantize(const LoraDequantize* weight, int32_t isa) {
  while (!kIsas[isa].dequantize) ++isa;
  kIsas[isa].dequantize(*weight);
}

}
