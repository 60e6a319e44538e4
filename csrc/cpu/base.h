// y = x W' + bias of a few rows: W is read once, as it lies, and that is all it costs.
//
// A row of W is a row of a packed left operand as it stands; x, packed, is the right one. So y' is multiplied, and turned
// while it is in the cache. Every element is one sum in ascending order of k, whatever rows and threads there are.
#pragma once
#include "isa.h"
#include "product.h"
#include "share.h"
#include "transpose.h"

namespace {

constexpr int64_t kBaseColumns = 64;  // of y, that are multiplied at once: four tiles of AMX
constexpr int64_t kBaseDepth = 1024;  // units: what x has of them stays in L2
constexpr int kTurned = 4;            // rows of y that are turned at once

// Whether an element, or a pair of them where the processor adds up pairs, is a unit.
template <class T>
constexpr bool kHasBase = kPerUnit<T> * sizeof(T) == sizeof(float);

struct Base {
  const void *x, *w, *bias;
  void* y;
  float* packed_x;
  int64_t rows, k, columns, stride_x, stride_w, stride_y;
  bool adds;  // to what y holds
};

// This thread's share of x as a right operand [k, rows].
template <class T>
inline void pack_x(const Base& p) {
  const int64_t units = units_of<T>(p.k), stride = p.stride_x / kPerUnit<T>;
  const float* x = static_cast<const float*>(p.x);
  each_block({0, p.rows}, kPanel, [&](int64_t first, int64_t rows) {
    const int64_t width = whole_vectors(rows);
    float* to = p.packed_x + first * units;
    each_block(share(units, kTurned), kTurned, [&](int64_t u, int64_t count) {
      int64_t i = 0;
      if (count == kTurned) {
        for (; i + kTurned <= rows; i += kTurned) {
          transpose_tile(x + (first + i) * stride + u, stride, to + u * width + i, width);
        }
      }
      for (; i < width; ++i)
        for (int64_t v = u; v < u + count; ++v) to[v * width + i] = i < rows ? x[(first + i) * stride + v] : 0;
    });
  });
}

// y [rows, columns] from sums' [columns, rows], whose rows are `width` long; rounded once.
template <class T>
inline void turn(const Base& p, const float* sums, int64_t width, int64_t rows, int64_t columns, const T* bias, T* y) {
  alignas(64) float turned[kTurned * kBaseColumns];
  each_block({0, rows}, kTurned, [&](int64_t row, int64_t count) {
    for (int64_t n = 0; n < columns; n += kTurned) {
      transpose_tile(sums + n * width + row, width, turned + n, kBaseColumns);
    }
    for (int64_t m = 0; m < count; ++m) {
      float* sum = turned + m * kBaseColumns;
      T* to = y + (row + m) * p.stride_y;
      if (bias) add_row(sum, bias, columns);
      if (p.adds) add_row(sum, to, columns);
      copy_row(to, sum, columns);
    }
  });
}

// y's columns in a share.
template <class T>
inline void base_columns(const Base& p, Share columns) {
  alignas(64) float sums[(kBaseColumns + kTurned) * kPanel];
  alignas(64) float last[kBaseColumns * kRoom];
  const int64_t units = units_of<T>(p.k);
  // The second half of a last unit is the next row's, or past the end of W: what is left after whole tiles is packed.
  const int64_t in_place = p.k % kPerUnit<T> ? p.k / kPerUnit<T> / kRoom * kRoom : units;
  const T* bias = static_cast<const T*>(p.bias);
  for (int64_t column = columns.begin, count; column < columns.end; column += count) {
    count = smaller(kBaseColumns, columns.end - column);
    // Rows of W are multiplied by 16; those too many are of the next columns, or at the end of W of the columns before.
    if (with_room(count) > p.columns) count = p.columns / kRoom * kRoom;
    const int64_t whole = with_room(count), first = smaller(column, p.columns - whole);
    const T* w = static_cast<const T*>(p.w) + first * p.stride_w;
    const T* w_last = w + in_place * kPerUnit<T>;
    if (in_place < units) pack_left(w_last, p.stride_w, whole, p.k - in_place * kPerUnit<T>, last, kRoom);
    each_block({0, p.rows}, kPanel, [&](int64_t row, int64_t rows) {
      const int64_t width = whole_vectors(rows);
      const float* x = p.packed_x + row * units;
      each_block({0, in_place}, kBaseDepth, [&](int64_t u, int64_t depth) {
        product<T>({w + u * kPerUnit<T>, p.stride_w}, whole, x + u * width, rows, depth, u == 0, sums, width);
      });
      if (in_place < units) {
        product<T>({last, kRoom}, whole, x + in_place * width, rows, units - in_place, in_place == 0, sums, width);
      }
      T* y = static_cast<T*>(p.y) + row * p.stride_y + column;
      turn(p, sums + (column - first) * width, width, rows, count, bias ? bias + column : nullptr, y);
    });
  }
}

}  // namespace
