// AVX-512 F, BW, VL and DQ; tails by masks.
#include <immintrin.h>
#include "scalar.h"

namespace {

constexpr int kLanes = 16;
constexpr int kTileRows = 8, kTileVectors = 3;  // of a product: what the registers hold
using Vec = __m512;

inline Vec broadcast(float value) { return _mm512_set1_ps(value); }
inline Vec add(Vec a, Vec b) { return _mm512_add_ps(a, b); }
inline Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
inline float sum(Vec v) { return _mm512_reduce_add_ps(v); }

inline __mmask16 first(int64_t count) {
  return count >= 16 ? 0xffff : count <= 0 ? 0 : (1u << count) - 1;
}

inline Vec widened(__m256i v, bf16) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(v), 16)); }
inline Vec widened(__m256i v, fp16) { return _mm512_cvtph_ps(v); }

inline Vec load(const float* from) { return _mm512_loadu_ps(from); }
inline __m128i bytes(const void* from) { return _mm_loadu_si128(static_cast<const __m128i*>(from)); }
inline Vec load(const int8_t* from) { return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes(from))); }
inline Vec load(const e4m3* from) {  // as in scalar.h
  const __m256i v = _mm256_cvtepu8_epi16(bytes(from)), rest = _mm256_and_si256(v, _mm256_set1_epi16(0x7f));
  const __m256i sign = _mm256_slli_epi16(_mm256_srli_epi16(v, 7), 15);
  const __m256i nan = _mm256_and_si256(_mm256_cmpeq_epi16(rest, _mm256_set1_epi16(0x7f)), _mm256_set1_epi16(0x4000));
  return widened(_mm256_or_si256(_mm256_or_si256(sign, nan), _mm256_slli_epi16(rest, 7)), fp16()) * broadcast(256);
}
// The values in a table of 16 that nibbles stand for, the high one of a byte first.
inline Vec lookup(const uint8_t* from, const float* table) {
  const __m512i v = _mm512_cvtepu8_epi64(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from)));
  return _mm512_permutexvar_ps(_mm512_or_si512(_mm512_srli_epi64(v, 4), _mm512_slli_epi64(v, 32)), load(table));
}
inline Vec load_part(const float* from, int64_t count) { return _mm512_maskz_loadu_ps(first(count), from); }
template <class T>
inline Vec load(const T* from) { return widened(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)), T()); }
template <class T>
inline Vec load_part(const T* from, int64_t count) {
  return widened(_mm256_maskz_loadu_epi16(first(count), from), T());
}

// Of 64-bit words: the products of their low halves; a0 b0 a2 b2 ..; a1 b1 a3 b3 ..
typedef uint64_t Wide __attribute__((vector_size(64)));
inline Wide low_product(Wide a, uint32_t b) { return (Wide)_mm512_mul_epu32((__m512i)a, _mm512_set1_epi64(b)); }
inline Wide evens(Wide a, Wide b) { return (Wide)_mm512_unpacklo_epi64((__m512i)a, (__m512i)b); }
inline Wide odds(Wide a, Wide b) { return (Wide)_mm512_unpackhi_epi64((__m512i)a, (__m512i)b); }

inline __m256i narrowed(Vec v, bf16) {
#ifdef __AVX512BF16__
  return (__m256i)_mm512_cvtneps_pbh(v);
#else
  const __m512i u = _mm512_castps_si512(v), odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
  const __m512i up = _mm512_srli_epi32(_mm512_add_epi32(u, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))), 16);
  const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
  return _mm512_cvtepi32_epi16(_mm512_mask_mov_epi32(up, nan, _mm512_set1_epi32(0x7fc0)));
#endif
}
inline __m256i narrowed(Vec v, fp16) { return _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT); }

inline void store(float* to, Vec v) { _mm512_storeu_ps(to, v); }
inline void store_part(float* to, Vec v, int64_t count) { _mm512_mask_storeu_ps(to, first(count), v); }
template <class T>
inline void store(T* to, Vec v) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), narrowed(v, T())); }
template <class T>
inline void store_part(T* to, Vec v, int64_t count) { _mm256_mask_storeu_epi16(to, first(count), narrowed(v, T())); }

}  // namespace
