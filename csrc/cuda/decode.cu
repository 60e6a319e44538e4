// Decoding with W in the dtype of x.
#include "decode.h"

namespace {

// W [N, K] with any strides; where kAligned, rows of it, of x and of the adapters' A are on 16-byte boundaries.
template <bool kAlignedRows>
struct Dense {
  static constexpr bool kAligned = kAlignedRows;
  template <int kHalves>
  using Memory = Shared<kHalves>;

  template <class T, int kHalves>
  static DEVICE void multiply(float (&sums)[kColumns / 16][kHalves][4], const LoraDecode& p, const Columns& at, int part,
                              Shared<kHalves>& shared) {
    const Matrix<T> w{static_cast<const T*>(p.w) + at.in_y * p.stride_wn, p.stride_wn, p.stride_wk, at.live};
    stream<kAligned, kGemmStages>(sums, p, w, part, shared.ring);
  }
};

}  // namespace

EXPORT int32_t lora_cuda_abi() { return LORA_ABI; }

EXPORT const char* lora_cuda_architectures() { return LORA_CUDA_ARCHITECTURES; }

EXPORT const char* lora_cuda_decode(const LoraDecode* p, void* stream) {
  const bool aligned = p->stride_wk == 1 && p->stride_wn % 8 == 0 && reinterpret_cast<uintptr_t>(p->w) % 16 == 0;
  return aligned && on_16_bytes(*p) ? launch_decode<Dense<true>>(*p, stream) : launch_decode<Dense<false>>(*p, stream);
}
