// y = x W' + h B' + bias, W read as it lies; for a few rows that is all it costs.
//
// A row of W, or of B, is a row of a left operand as it stands; x and h, packed, are the right ones. So y' is multiplied, and
// turned while it is in the cache. Every element is summed in ascending order of k, in parts, and then of r, whatever rows
// and threads there are, rounded once.
#pragma once
#include "isa.h"
#include "product.h"
#include "share.h"
#include "transpose.h"

namespace {

constexpr int64_t kBaseRows = 64;     // of W, which are columns of y, or of dy, multiplied at once: four tiles of AMX
template <class T>
constexpr int64_t kBaseDepth = sizeof(T) == 4 ? 256 : 1024;  // units: what x has of them stays in L2; fp32 is not rounded again
constexpr int kTurned = 4;            // rows and columns that are turned at once

// Whether an element, or a pair of them where the processor adds up pairs, is a unit.
template <class T>
constexpr bool kHasBase = kPerUnit<T> * sizeof(T) == sizeof(float);

struct Base {
  const void *x, *w, *bias;
  void* y;
  float* packed_x;
  int64_t rows, k, columns, stride_x, stride_w, stride_y;
  const void* b;          // [columns, r]; r may be 0
  const float* packed_h;  // as x is
  int64_t r, stride_b;
};

// Asks for the first `bytes` of a row that is to be read or written soon; the hardware foresees none that lies in another page.
inline void prefetch(const void* row, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(static_cast<const char*>(row) + i);
}

// This thread's share of x as a right operand [k, rows].
template <class T>
inline void pack_x(const Base& p) {
  const int64_t units = units_of<T>(p.k), stride = p.stride_x / kPerUnit<T>;
  const float* x = static_cast<const float*>(p.x);
  each_block({0, p.rows}, kPanel, [&](int64_t first, int64_t rows) {
    const int64_t width = whole_vectors(rows);
    float* to = p.packed_x + first * units;
    each_block(share(units, kRoom), kRoom, [&](int64_t u, int64_t count) {
      const int64_t whole = count / kTurned * kTurned, turned = rows / kTurned * kTurned;
      for (int64_t i = 0; i < turned; i += kTurned) {
        const float* row = x + (first + i) * stride + u;  // a line of each, whole: rows compete for the same places in L1
        for (int64_t m = 0; m < kTurned; ++m) prefetch(row + m * stride + kRoom, 1);
        for (int64_t v = 0; v < whole; v += kTurned) transpose_tile(row + v, stride, to + (u + v) * width + i, width);
      }
      for (int64_t i = 0; i < width; ++i)
        for (int64_t v = i < turned ? whole : 0; v < count; ++v) {
          to[(u + v) * width + i] = i < rows ? x[(first + i) * stride + u + v] : 0;
        }
    });
  });
}

// y [rows, columns] from sums' [columns, rows], whose rows are `width` long; rounded once.
template <class T>
inline void turn(const Base& p, const float* sums, int64_t width, int64_t rows, int64_t columns, const T* bias, T* y) {
  alignas(64) float turned[kRoom * kBaseRows];  // many rows: what has just been stored by parts is slow to load as one
  each_block({0, rows}, kRoom, [&](int64_t row, int64_t count) {
    for (int64_t m = 0; m < count; m += kTurned)
      for (int64_t n = 0; n < columns; n += kTurned) {
        transpose_tile(sums + n * width + row + m, width, turned + m * kBaseRows + n, kBaseRows);
      }
    for (int64_t m = 0; m < count; ++m) {
      float* sum = turned + m * kBaseRows;
      if (bias) add_row(sum, bias, columns);
      copy_row(y + (row + m) * p.stride_y, sum, columns);
    }
  });
}

// Some columns of W, or of B, which are rows: a left operand as it lies, `stride` elements from one to the next.
template <class T>
class InPlace {
 public:
  InPlace(const void* matrix, int64_t stride, int64_t first, int64_t count, int64_t depth)
      : InPlace(static_cast<const T*>(matrix) + first * stride, stride, count, depth, {packed_, kRoom}) {
    // The second half of an odd row's last unit is the next row's, or past the end: what is left of whole tiles is packed.
    const int64_t at = in_place_ * kPerUnit<T>;
    if (in_place_ < units_) pack_left(from_ + at, stride, count, depth - at, packed_, kRoom);
  }

  // Rows that are packed already, one after another.
  InPlace(const float* packed, int64_t count, int64_t depth)
      : InPlace(reinterpret_cast<const T*>(packed), units_of<T>(depth) * kPerUnit<T>, count, depth,
                {packed + whole_units(depth), units_of<T>(depth)}) {}

  // sums [count, columns] of the products with `right`, a panel; added to what is there unless they are the `first`.
  void multiply(const float* right, int64_t columns, bool first, float* sums, int64_t stride,
                Ahead* ahead = nullptr) const {
    const int64_t width = whole_vectors(columns);
    each_block({0, in_place_}, kBaseDepth<T>, [&](int64_t u, int64_t units) {
      const bool begins = first && u == 0;
      product<T>({from_ + u * kPerUnit<T>, stride_}, count_, right + u * width, columns, units, begins, sums, stride, ahead);
    });
    if (in_place_ < units_) {
      const bool begins = first && in_place_ == 0;
      product<T>(last_, count_, right + in_place_ * width, columns, units_ - in_place_, begins, sums, stride);
    }
  }

 private:
  InPlace(const T* from, int64_t stride, int64_t count, int64_t depth, Left last)
      : from_(from), stride_(stride), count_(count), units_(units_of<T>(depth)), in_place_(whole_units(depth)), last_(last) {}

  // Those of whole tiles where the depth is odd.
  static int64_t whole_units(int64_t depth) {
    return depth % kPerUnit<T> ? depth / kPerUnit<T> / kRoom * kRoom : units_of<T>(depth);
  }

  const T* const from_;
  const int64_t stride_, count_, units_, in_place_;
  const Left last_;
  alignas(64) float packed_[kBaseRows * kRoom];
};

// y's columns in a share.
template <class T>
inline void base_columns(const Base& p, Share columns) {
  alignas(64) float sums[(kBaseRows + kTurned) * kPanel];
  const T* bias = static_cast<const T*>(p.bias);
  for (int64_t column = columns.begin, count; column < columns.end; column += count) {
    count = smaller(kBaseRows, columns.end - column);
    // Rows of W are multiplied by 16; those too many are of the next columns, or at the end of W of the columns before.
    if (with_room(count) > p.columns) count = p.columns / kRoom * kRoom;
    const int64_t whole = with_room(count), first = smaller(column, p.columns - whole);
    const InPlace<T> w(p.w, p.stride_w, first, whole, p.k), b(p.b, p.stride_b, first, whole, p.r);
    each_block({0, p.rows}, kPanel, [&](int64_t row, int64_t rows) {
      T* y = static_cast<T*>(p.y) + row * p.stride_y + column;
      for (int64_t m = 0; m < rows; ++m) prefetch(y + m * p.stride_y, count * sizeof(T));
      const int64_t width = whole_vectors(rows);
      w.multiply(p.packed_x + row * units_of<T>(p.k), rows, true, sums, width);
      b.multiply(p.packed_h + row * units_of<T>(p.r), rows, false, sums, width);
      turn(p, sums + (column - first) * width, width, rows, count, bias ? bias + column : nullptr, y);
    });
  }
}

}  // namespace
