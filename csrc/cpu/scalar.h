// Sizes, and 16-bit floats, one at a time. Anonymous, as all that is compiled once an instruction set: were two copies of
// a function merged by the linker, the AVX-512 one could run where there is no AVX-512.
#pragma once
#include <stdint.h>
#include <string.h>

namespace {

struct bf16 { uint16_t bits; };
struct fp16 { uint16_t bits; };
struct e4m3 { uint8_t bits; };

alignas(64) const float kNF4[16] = {  // lora_kernels/formats/nf4.py
    -1.0f, -0.6961928009986877f, -0.5250730514526367f, -0.39491748809814453f, -0.28444138169288635f, -0.18477343022823334f,
    -0.09105003625154495f, 0.0f, 0.07958029955625534f, 0.16093020141124725f, 0.24611230194568634f, 0.33791524171829224f,
    0.44070982933044434f, 0.5626170039176941f, 0.7229568362236023f, 1.0f};

template <class To, class From>
inline To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "");
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
inline int64_t ceiling(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline float widen(float value) { return value; }
inline float widen(bf16 value) { return bit_cast<float>(uint32_t(value.bits) << 16); }
inline float widen(fp16 value) {
  const uint32_t sign = uint32_t(value.bits & 0x8000) << 16, rest = value.bits & 0x7fff;
  if (rest >= 0x7c00) return bit_cast<float>(sign | 0x7f800000 | rest << 13);  // Inf and NaN
  const float scaled = bit_cast<float>(rest << 13) * 0x1p112f;                 // subnormal ones too
  return bit_cast<float>(sign | bit_cast<uint32_t>(scaled));
}

inline float widen(e4m3 value) {  // as fp16 its exponent is 8 less; the one NaN there is must become one
  const uint32_t rest = value.bits & 0x7f;
  return widen(fp16{uint16_t((value.bits & 0x80) << 8 | rest << 7 | (rest == 0x7f ? 0x4000 : 0))}) * 256;
}

inline void narrow(float value, float& to) { to = value; }
inline void narrow(float value, bf16& to) {
  const uint32_t bits = bit_cast<uint32_t>(value);
  to.bits = value != value ? 0x7fc0 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}
inline void narrow(float value, fp16& to) {
  const uint32_t bits = bit_cast<uint32_t>(value), sign = bits >> 16 & 0x8000, rest = bits & 0x7fffffff;
  if (rest > 0x7f800000) {
    to.bits = 0x7e00;
  } else if (rest >= 0x477ff000) {  // 65520, which rounds to Inf
    to.bits = sign | 0x7c00;
  } else if (rest < 0x38800000) {  // subnormal: let the adder round, in units of 2^-24
    to.bits = sign | (bit_cast<uint32_t>(bit_cast<float>(rest) + 0.5f) - bit_cast<uint32_t>(0.5f));
  } else {
    to.bits = sign | (rest - 0x38000000 + 0xfff + (rest >> 13 & 1)) >> 13;
  }
}

template <class T>
inline float rounded(float value) {
  T to;
  narrow(value, to);
  return widen(to);
}

}  // namespace
