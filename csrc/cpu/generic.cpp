// Any machine: the vectors that GCC and Clang lower to whatever there is.
#define ISA generic
#include "scalar.h"

namespace {

constexpr int kLanes = 4;
constexpr int kTileRows = 4, kTileVectors = 2;  // of a product: what the registers hold
typedef float Vec __attribute__((vector_size(16)));

inline Vec broadcast(float value) { return Vec{value, value, value, value}; }
inline Vec add(Vec a, Vec b) { return a + b; }
inline Vec fma(Vec a, Vec b, Vec c) { return c + a * b; }
inline float sum(Vec v) { return (v[0] + v[2]) + (v[1] + v[3]); }
// Of 64-bit words: the products of their low halves; a0 b0 a2 b2 ..; a1 b1 a3 b3 ..
typedef uint64_t Wide __attribute__((vector_size(16)));
inline Wide low_product(Wide a, uint32_t b) { return (a & 0xffffffffu) * b; }
inline Wide evens(Wide a, Wide b) { return Wide{a[0], b[0]}; }
inline Wide odds(Wide a, Wide b) { return Wide{a[1], b[1]}; }

template <class T>
inline Vec load(const T* from) { return Vec{widen(from[0]), widen(from[1]), widen(from[2]), widen(from[3])}; }
inline Vec load(const int8_t* from) { return Vec{float(from[0]), float(from[1]), float(from[2]), float(from[3])}; }
inline Vec lookup(const uint8_t* from, const float* table) {
  return Vec{table[from[0] >> 4], table[from[0] & 15], table[from[1] >> 4], table[from[1] & 15]};
}
template <class T>
inline void store(T* to, Vec v) {
  for (int i = 0; i < kLanes; ++i) narrow(v[i], to[i]);
}

}  // namespace

#include "parts.h"
#include "dot.h"
#include "batched.h"
#include "linear.h"
#include "dequantize.h"
