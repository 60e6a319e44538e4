// What the kernels take: plain structs. binding.cpp fills the CPU's, lora_kernels/backends/cuda_library.py has the GPU's too.
#pragma once
#include <stdint.h>

#define LORA_ABI 8  // raise it with any change below, or of an operator: Python refuses a library built from other sources
#define LORA_MAX_RANK 512

enum LoraDtype { LORA_FP32, LORA_BF16, LORA_FP16 };
enum LoraFormat { LORA_NF4, LORA_INT8, LORA_FP8, LORA_INT4 };

// The adapters of one slice of y's columns. Slot s has A [ranks[s], K] at a + first_row[s] K, contiguous, and B at
// b + first_row[s] width, where element (n, r) lies n stride_bn + r stride_br further.
struct LoraSlice {
  const void* a;
  const void* b;
  const int64_t* first_row;
  const int32_t* ranks;
  const float* scalings;
  int64_t width, stride_bn, stride_br;
  int64_t max_rank, first_rank;  // the largest rank, and the sum of those of the slices before
};

// y += the adapters of each row; an entry e of slots [rows, adapters_per_row] belongs to row e / adapters_per_row. With w
// y is x W' + bias and the adapters: for fp32 and, where the instruction set has pairs, bf16; then rows of a bf16
// x are whole pairs, with a zero beside an odd last element, and there are 16 columns or more.
struct LoraBatch {
  const void* x;
  const void* w;     // [columns, k], or null
  const void* bias;  // [columns], or null
  void* y;
  const int32_t* slots;
  const int32_t* order;  // the entries by ascending slot
  const float* weights;  // as slots, or null
  const LoraSlice* slices;
  float* h;         // [sum of max_rank, rows adapters_per_row]: scratch
  float* packed_x;  // [k, rows in whole vectors]: scratch too, with w
  int64_t rows, k, columns, stride_x, stride_w, stride_y, adapters_per_row, num_slots, num_slices;
  int32_t dtype, threads;
};

#define LORA_MAX_SLICES 16

// A decoding step on a GPU: y = x W' + bias + the adapters of each row; csrc/cuda. Here first_rank of a slice counts ranks in
// whole blocks of 16, since that is how they lie in h.
struct LoraDecode {
  const void *x, *w, *bias;
  const float* absmax;  // where W is in 4 bits: the scale of each block of 2^block_shift elements
  void* y;
  const int32_t *slots, *segment, *distinct;  // as in adapters/plan.py
  const float* weights;                       // as slots, or null
  float* planes;                              // [parts, entries, stride_h], scratch
  float* spill;                               // [tiles, parts, 64 columns of y, 8 or 16 rows], scratch
  int32_t* arrived;                           // zeros, and left so: of the shrink, and behind it of each tile
  int64_t rows, k, stride_x, stride_y, stride_wn, stride_wk, stride_h;
  int32_t adapters_per_row, num_slots, num_slices, tiles, parts, shrinks, dtype, device, block_shift;
  LoraSlice slices[LORA_MAX_SLICES];
};

// A weight in one of lora_kernels/formats, and where its dense values go. Rows are those of [N, K]; of nf4, which is flat,
// its blocks. A scale, and a zero point, belongs to block_rows x block_columns elements.
struct LoraDequantize {
  const void* codes;  // contiguous; of int4 words of eight, stride_row and stride_word apart
  const float* scale;
  const uint8_t* zero;         // of int4, else null
  const uint8_t* absmax;       // of nf4 under double quantisation, else null: its scale is
  const float* nested_code;    // [256]: nested_code[absmax[block]] * scale[block / 256] + nested_offset[0]
  const float* nested_offset;
  void* out;  // contiguous
  int64_t elements, columns, block_rows, block_columns, stride_row, stride_word;
  int32_t format, dtype, threads;
};

// One layer of a training step; matrices are row-major, with rows `stride_` elements apart, or contiguous without a stride.
struct LoraLinear {
  const void* x;     // [m, k]
  const void* a;     // [r, k]
  const void* b;     // [n, r]
  const void* bias;  // [n], or null
  void* h;           // [m, r]: scaling drop(x) A'; written by forward, read by backward
  const void* w;     // [n, k] as in LoraBatch, or null; for backward any n and k
  void* y;           // [m, n]: forward writes bias + h B', and with w adds x W'
  const void* dy;    // [m, n]
  void* dx;          // [m, k]: backward writes drop(g A), g = scaling dy B, and with w adds dy W; null if not needed, as da, db
  void* da;          // [r, k]: g' drop(x)
  void* db;          // [n, r]: dy' h
  int64_t m, n, k, r, stride_x, stride_w, stride_a, stride_b, stride_dy;
  const int64_t* seed;     // null without dropout
  int32_t keep_threshold;  // of the 65,536 values of a lane
  float keep_scale, scaling;
  int32_t dtype, gradient_dtype, threads;  // the latter: of da and db
};
