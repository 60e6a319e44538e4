// AVX2, FMA and F16C.
#define ISA avx2
#include <immintrin.h>
#include "scalar.h"

namespace {

constexpr int kLanes = 8;
constexpr int kTileRows = 4, kTileVectors = 3;  // of a product: what the registers hold
using Vec = __m256;

inline Vec broadcast(float value) { return _mm256_set1_ps(value); }
inline Vec add(Vec a, Vec b) { return _mm256_add_ps(a, b); }
inline Vec fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
inline float sum(Vec v) {
  __m128 four = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

// Of 64-bit words: the products of their low halves; a0 b0 a2 b2 ..; a1 b1 a3 b3 ..
typedef uint64_t Wide __attribute__((vector_size(32)));
inline Wide low_product(Wide a, uint32_t b) { return (Wide)_mm256_mul_epu32((__m256i)a, _mm256_set1_epi64x(b)); }
inline Wide evens(Wide a, Wide b) { return (Wide)_mm256_unpacklo_epi64((__m256i)a, (__m256i)b); }
inline Wide odds(Wide a, Wide b) { return (Wide)_mm256_unpackhi_epi64((__m256i)a, (__m256i)b); }

inline __m128i bits(const void* from) { return _mm_loadu_si128(static_cast<const __m128i*>(from)); }
inline Vec load(const float* from) { return _mm256_loadu_ps(from); }
inline Vec load(const bf16* from) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits(from)), 16));
}
inline Vec load(const fp16* from) { return _mm256_cvtph_ps(bits(from)); }
inline __m128i low_bits(const void* from) { return _mm_loadl_epi64(static_cast<const __m128i*>(from)); }
inline Vec load(const int8_t* from) { return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(low_bits(from))); }
inline Vec load(const e4m3* from) {  // as in scalar.h
  const __m128i v = _mm_cvtepu8_epi16(low_bits(from)), rest = _mm_and_si128(v, _mm_set1_epi16(0x7f));
  const __m128i sign = _mm_slli_epi16(_mm_srli_epi16(v, 7), 15);
  const __m128i nan = _mm_and_si128(_mm_cmpeq_epi16(rest, _mm_set1_epi16(0x7f)), _mm_set1_epi16(0x4000));
  return _mm256_cvtph_ps(_mm_or_si128(_mm_or_si128(sign, nan), _mm_slli_epi16(rest, 7))) * broadcast(256);
}
// The values in a table of 16 that nibbles stand for, the high one of a byte first.
inline Vec lookup(const uint8_t* from, const float* table) {
  int32_t four;
  memcpy(&four, from, 4);
  const __m256i v = _mm256_cvtepu8_epi64(_mm_cvtsi32_si128(four));
  const __m256i at = _mm256_or_si256(_mm256_srli_epi64(v, 4), _mm256_slli_epi64(v, 32));
  const Vec low = _mm256_permutevar8x32_ps(load(table), at), high = _mm256_permutevar8x32_ps(load(table + 8), at);
  return _mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32(at, 28)));
}

inline void store(float* to, Vec v) { _mm256_storeu_ps(to, v); }
inline void store(bf16* to, Vec v) {
  const __m256i u = _mm256_castps_si256(v), odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
  const __m256i up = _mm256_srli_epi32(_mm256_add_epi32(u, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))), 16);
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
  const __m256i wide = _mm256_blendv_epi8(up, _mm256_set1_epi32(0x7fc0), nan);
  const __m128i packed = _mm_packus_epi32(_mm256_castsi256_si128(wide), _mm256_extracti128_si256(wide, 1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), packed);
}
inline void store(fp16* to, Vec v) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
}

}  // namespace

#include "parts.h"
#include "dot.h"
#include "batched.h"
#include "linear.h"
#include "dequantize.h"
