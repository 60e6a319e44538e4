// The product of pairs of bf16, of AVX512-BF16.
namespace {

template <>
struct Dot<bf16> {
  static constexpr int kStep = 32;
  using Operand = __m512bh;
  static Operand load(const bf16* from) { return (__m512bh)_mm512_loadu_si512(from); }
  static Operand load_part(const bf16* from, int64_t count) {
    return (__m512bh)_mm512_maskz_loadu_epi16(count >= 32 ? 0xffffffff : (1u << count) - 1, from);
  }
  static Vec accumulate(Operand a, Operand b, Vec c) { return _mm512_dpbf16_ps(c, a, b); }
};

}  // namespace
