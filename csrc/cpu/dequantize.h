// A quantised weight's dense values, from the vectors of one instruction set: the bits of QuantizedWeight.dequantize.
//
// A code becomes an exact fp32 number; that times its scale is rounded to fp32, and then once to the dtype of out.
#include <omp.h>
#include "isa.h"

namespace {

constexpr int64_t kCodes = 512;  // columns that are unpacked at a time, where bytes are not what is stored
constexpr int64_t kNested = 256; // absmax values that share a scale under nf4's double quantisation

// Codes `from` a byte each; kPerByte is how many a byte holds.
struct Int8Codes {
  static constexpr int kPerByte = 1;
  static Vec load(const uint8_t* from) { return ::load(reinterpret_cast<const int8_t*>(from)); }
};
struct FP8Codes {
  static constexpr int kPerByte = 1;
  static Vec load(const uint8_t* from) { return ::load(reinterpret_cast<const e4m3*>(from)); }
};
struct NF4Codes {
  static constexpr int kPerByte = 2;
  static Vec load(const uint8_t* from) { return lookup(from, kNF4); }
};

// out [count] = (codes - zero) scale.
template <class Codes, class T>
inline void dequantize_run(const uint8_t* codes, int64_t count, Vec zero, Vec scale, T* out) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    store(out + i, (Codes::load(codes + i / Codes::kPerByte) - zero) * scale);
  }
  if (i < count) {
    uint8_t last[kLanes] = {};
    memcpy(last, codes + i / Codes::kPerByte, ceiling(count - i, Codes::kPerByte));
    store_part(out + i, (Codes::load(last) - zero) * scale, count - i);
  }
}

// Eight codes, the lowest nibble first, a byte each.
inline void unpack(const int32_t* words, int64_t stride, int64_t count, uint8_t* to) {
  for (int64_t i = 0; i < count; i += 8, words += stride, to += 8) {
    uint64_t bytes = uint32_t(*words);
    bytes = (bytes | bytes << 16) & 0x0000ffff0000ffff;
    bytes = (bytes | bytes << 8) & 0x00ff00ff00ff00ff;
    bytes = (bytes | bytes << 4) & 0x0f0f0f0f0f0f0f0f;
#if __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
    bytes = __builtin_bswap64(bytes);
#endif
    memcpy(to, &bytes, 8);
  }
}

// A row of `columns`, of which each group has a scale.
template <class Codes, class T>
inline void dequantize_row(const LoraDequantize& p, int64_t row, int64_t columns, int64_t groups) {
  const int64_t first_group = (p.block_rows == 1 ? row : row / p.block_rows) * groups;
  const uint8_t* codes = static_cast<const uint8_t*>(p.codes) + row * p.columns / Codes::kPerByte;
  T* out = static_cast<T*>(p.out) + row * p.columns;
  for (int64_t group = first_group, begin = 0; begin < columns; ++group, begin += p.block_columns) {
    const float scale = p.absmax ? p.nested_code[p.absmax[group]] * p.scale[group / kNested] + *p.nested_offset
                                 : p.scale[group];
    const int64_t end = smaller(columns, begin + p.block_columns);
    if (!p.zero) {
      dequantize_run<Codes>(codes + begin / Codes::kPerByte, end - begin, broadcast(0), broadcast(scale), out + begin);
      continue;
    }
    alignas(64) uint8_t unpacked[kCodes];
    const int32_t* words = static_cast<const int32_t*>(p.codes) + row * p.stride_row;
    for (int64_t at = begin; at < end; at += kCodes) {
      const int64_t count = smaller(kCodes, end - at);
      unpack(words + at / 8 * p.stride_word, p.stride_word, count, unpacked);
      dequantize_run<Codes>(unpacked, count, broadcast(p.zero[group]), broadcast(scale), out + at);
    }
  }
}

template <class Codes, class T>
inline void dequantize_rows(const LoraDequantize& p) {
  const int64_t rows = ceiling(p.elements, p.columns), groups = ceiling(p.columns, p.block_columns);
#pragma omp parallel for num_threads(p.threads) schedule(static)
  for (int64_t row = 0; row < rows; ++row) {
    dequantize_row<Codes, T>(p, row, smaller(p.columns, p.elements - row * p.columns), groups);
  }
}

template <class Codes>
inline void dequantize_to(const LoraDequantize& p) {
  switch (p.dtype) {
    case LORA_FP32: return dequantize_rows<Codes, float>(p);
    case LORA_BF16: return dequantize_rows<Codes, bf16>(p);
    case LORA_FP16: return dequantize_rows<Codes, fp16>(p);
  }
}

}  // namespace

namespace ISA {

void dequantize(const LoraDequantize& p) {
  switch (p.format) {
    case LORA_NF4: return dequantize_to<NF4Codes>(p);
    case LORA_FP8: return dequantize_to<FP8Codes>(p);
    default: return dequantize_to<Int8Codes>(p);
  }
}

}  // namespace ISA
