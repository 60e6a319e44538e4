// Transposes blocks of 16-byte rows in registers, with the compiler's own vectors: the same for every instruction set.
#include <stdint.h>
#include <string.h>

namespace {

template <int BYTES>
struct Bits;
template <>
struct Bits<2> {
  typedef uint16_t Row __attribute__((vector_size(16)));
#ifdef __clang__
  static Row low(Row a, Row b) { return __builtin_shufflevector(a, b, 0, 8, 1, 9, 2, 10, 3, 11); }
  static Row high(Row a, Row b) { return __builtin_shufflevector(a, b, 4, 12, 5, 13, 6, 14, 7, 15); }
#else
  static Row low(Row a, Row b) { return __builtin_shuffle(a, b, Row{0, 8, 1, 9, 2, 10, 3, 11}); }
  static Row high(Row a, Row b) { return __builtin_shuffle(a, b, Row{4, 12, 5, 13, 6, 14, 7, 15}); }
#endif
};
template <>
struct Bits<4> {
  typedef uint32_t Row __attribute__((vector_size(16)));
#ifdef __clang__
  static Row low(Row a, Row b) { return __builtin_shufflevector(a, b, 0, 4, 1, 5); }
  static Row high(Row a, Row b) { return __builtin_shufflevector(a, b, 2, 6, 3, 7); }
#else
  static Row low(Row a, Row b) { return __builtin_shuffle(a, b, Row{0, 4, 1, 5}); }
  static Row high(Row a, Row b) { return __builtin_shuffle(a, b, Row{2, 6, 3, 7}); }
#endif
};

// to [j * to_stride + i] = from [i * from_stride + j] for i, j < 16 / sizeof(T): interleaved until the halves have met.
template <class T>
inline void transpose_tile(const T* from, int64_t from_stride, T* to, int64_t to_stride) {
  using B = Bits<sizeof(T)>;
  constexpr int kSide = 16 / sizeof(T);
  typename B::Row rows[kSide], mixed[kSide];
#pragma GCC unroll 8
  for (int i = 0; i < kSide; ++i) memcpy(&rows[i], from + i * from_stride, 16);
#pragma GCC unroll 8
  for (int side = kSide; side > 1; side /= 2) {
#pragma GCC unroll 8
    for (int i = 0; i < kSide / 2; ++i) {
      mixed[2 * i] = B::low(rows[i], rows[i + kSide / 2]);
      mixed[2 * i + 1] = B::high(rows[i], rows[i + kSide / 2]);
    }
#pragma GCC unroll 8
    for (int i = 0; i < kSide; ++i) rows[i] = mixed[i];
  }
#pragma GCC unroll 8
  for (int i = 0; i < kSide; ++i) memcpy(to + i * to_stride, &rows[i], 16);
}

}  // namespace
