// out [rows, columns] = left [rows, depth] right [depth, columns] of packed operands, in fp32.
//
// Depth is counted in units: the 32 bits that a lane multiplies in one step, an fp32, or two bf16 where the processor
// adds up pairs. A packed left operand has one row of units after another. A packed right one is panels of kPanel columns,
// the last narrower: a panel is [units][columns, rounded up to whole vectors], and zero where the matrix ends.
// Every part of the depth is summed in ascending order, whatever the shape of the tile, and added to those before.
#pragma once

namespace {

constexpr int kRoom = 16;  // rows: of a left operand, and of a result, there is memory for a multiple
constexpr int kPanel = kTileVectors * kLanes;
template <class T>
constexpr int kPerUnit = Dot<T>::kStep / kLanes;

template <class T>
inline int64_t units_of(int64_t depth) { return ceiling(depth, kPerUnit<T>); }
inline int64_t with_room(int64_t rows) { return ceiling(rows, kRoom) * kRoom; }
inline int64_t whole_vectors(int64_t columns) { return ceiling(columns, kLanes) * kLanes; }

// The unit of elements that lie `stride` apart, of which `left` are left.
template <class T>
inline float unit(const T* from, int64_t stride, int64_t left) {
  if constexpr (kPerUnit<T> == 1) {
    return widen(*from);
  } else {
    return bit_cast<float>(uint32_t(from->bits) | (left > 1 ? uint32_t(from[stride].bits) << 16 : 0));
  }
}

// Widens or narrows, where To and From differ.
template <class To, class From>
inline void copy_row(To* to, const From* from, int64_t count) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) store(to + i, load(from + i));
  if (i < count) store_part(to + i, load_part(from + i, count - i), count - i);
}

template <class T>
inline void add_row(float* to, const T* from, int64_t count) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) store(to + i, add(load(to + i), load(from + i)));
  if (i < count) store_part(to + i, add(load_part(to + i, count - i), load_part(from + i, count - i)), count - i);
}

// left [rows, depth] as it lies.
template <class T>
inline void pack_left(const T* from, int64_t stride, int64_t rows, int64_t depth, float* to, int64_t to_stride) {
  for (int64_t m = 0; m < rows; ++m, from += stride, to += to_stride) {
    const int64_t units = depth / kPerUnit<T>;
    if constexpr (kPerUnit<T> == 1) {
      copy_row(to, from, depth);
    } else {
      copy_row(to, reinterpret_cast<const float*>(from), units);
      if (depth % kPerUnit<T>) to[units] = unit(from + depth - 1, 1, 1);
    }
  }
}

// left [rows, depth] from [depth, rows].
template <class T>
inline void pack_left_of_transposed(const T* from, int64_t stride, int64_t rows, int64_t depth, float* to,
                                    int64_t to_stride) {
  for (int64_t u = 0, at = 0; at < depth; ++u, at += kPerUnit<T>)
    for (int64_t m = 0; m < rows; ++m) to[m * to_stride + u] = unit(from + at * stride + m, stride, depth - at);
}

// right [depth, columns] as it lies.
template <class T>
inline void pack_right(const T* from, int64_t stride, int64_t depth, int64_t columns, float* to) {
  for (int64_t first = 0; first < columns; first += kPanel) {
    const int64_t count = smaller(kPanel, columns - first), width = whole_vectors(count);
    for (int64_t at = 0; at < depth; at += kPerUnit<T>, to += width) {
      const T* row = from + at * stride + first;
      if constexpr (kPerUnit<T> == 1) {
        int64_t i = 0;
        for (; i + kLanes <= count; i += kLanes) store(to + i, load(row + i));
        if (i < count) store(to + i, load_part(row + i, count - i));
      } else if (depth - at > 1) {
#pragma omp simd
        for (int64_t i = 0; i < count; ++i) to[i] = unit(row + i, stride, 2);
        for (int64_t i = count; i < width; ++i) to[i] = 0;
      } else {
        for (int64_t i = 0; i < width; ++i) to[i] = i < count ? unit(row + i, stride, 1) : 0;
      }
    }
  }
}

// right [depth, columns] from [columns, depth].
template <class T>
inline void pack_right_of_transposed(const T* from, int64_t stride, int64_t depth, int64_t columns, float* to) {
  for (int64_t first = 0; first < columns; first += kPanel) {
    const int64_t count = smaller(kPanel, columns - first), width = whole_vectors(count);
    for (int64_t i = 0; i < width; ++i) {
      const T* column = from + (first + i) * stride;
      for (int64_t u = 0, at = 0; at < depth; ++u, at += kPerUnit<T>) {
        to[u * width + i] = i < count ? unit(column + at, 1, depth - at) : 0;
      }
    }
    to += units_of<T>(depth) * width;
  }
}

// The rows of a left operand, `stride` elements apart. They may begin at any element, in the middle of a unit too.
struct Left {
  const char* at;
  int64_t bytes;  // from a row to the next

  template <class Element>
  Left(const Element* at, int64_t stride) : at(reinterpret_cast<const char*>(at)), bytes(stride * sizeof *at) {}
  Left(const char* at, int64_t bytes) : at(at), bytes(bytes) {}
  Left from(int64_t row) const { return {at + row * bytes, bytes}; }
  float unit(int64_t row, int64_t u) const {
    float value;
    memcpy(&value, at + row * bytes + u * sizeof value, sizeof value);
    return value;
  }
};

// Rows that will be needed next, asked for a line at a time while something is multiplied.
class Ahead {
 public:
  static constexpr int kUnits = 8;  // of a product's depth, from a step to the next

  Ahead(const void* rows, int64_t bytes, int64_t stride, int64_t count, const Ahead* then = nullptr)
      : line_(static_cast<const char*>(rows)), lines_(ceiling(bytes + intptr_t(rows) % 64, 64)), left_(lines_), stride_(stride),
        rows_(bytes ? count : 0), then_(then) {}

  void step() {
    if (!rows_ && then_) *this = *then_;
    if (!rows_) return;
    __builtin_prefetch(line_, 0, 2);  // into L2
    line_ += 64;
    if (--left_) return;
    line_ += stride_ - lines_ * 64, left_ = lines_, --rows_;
  }

 private:
  const char* line_;
  int64_t lines_, left_, stride_, rows_;
  const Ahead* then_;
};

// A tile, added to what is there unless it is the `first` part of the depth: a sum in parts has the rounding of its parts.
template <int ROWS, int VECTORS, class T>
__attribute__((noinline)) void product_tile(Left left, const float* right, int64_t units, bool first, float* out,
                                            int64_t out_stride, Ahead* ahead) {
  using Operand = typename Dot<T>::Operand;
  Vec sums[ROWS][VECTORS];
#pragma GCC unroll 8
  for (int m = 0; m < ROWS; ++m) {
#pragma GCC unroll 8
    for (int v = 0; v < VECTORS; ++v) sums[m][v] = broadcast(0);
  }
  for (int64_t u = 0; u < units; ++u, right += VECTORS * kLanes) {
    if (ahead && u % Ahead::kUnits == 0) ahead->step();
    Operand columns[VECTORS];
#pragma GCC unroll 8
    for (int v = 0; v < VECTORS; ++v) columns[v] = (Operand)load(right + v * kLanes);
#pragma GCC unroll 8
    for (int m = 0; m < ROWS; ++m) {
      const Operand row = (Operand)broadcast(left.unit(m, u));
#pragma GCC unroll 8
      for (int v = 0; v < VECTORS; ++v) sums[m][v] = Dot<T>::accumulate(row, columns[v], sums[m][v]);
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < ROWS; ++m) {
#pragma GCC unroll 8
    for (int v = 0; v < VECTORS; ++v) {
      float* to = out + m * out_stride + v * kLanes;
      store(to, first ? sums[m][v] : add(load(to), sums[m][v]));
    }
  }
}

// Tiles of up to ROWS rows, which is a power of two; out's rows have room for whole vectors.
template <int ROWS, int VECTORS, class T>
inline void product_panel(Left left, int64_t rows, const float* right, int64_t units, bool first, float* out,
                          int64_t out_stride, Ahead* ahead) {
  for (; rows >= ROWS; rows -= ROWS, left = left.from(ROWS), out += ROWS * out_stride) {
    product_tile<ROWS, VECTORS, T>(left, right, units, first, out, out_stride, ahead);
  }
  if constexpr (ROWS > 1) {
    if (rows) product_panel<ROWS / 2, VECTORS, T>(left, rows, right, units, first, out, out_stride, ahead);
  }
}

// A thread has one as long as it multiplies: AMX tidies up behind it.
template <class T>
struct Multiplying {};

template <class T>
inline void product(Left left, int64_t rows, const float* right, int64_t columns, int64_t units, bool first, float* out,
                    int64_t out_stride, Ahead* ahead = nullptr) {
  for (int64_t at = 0; at < columns; at += kPanel, right += units * kPanel, out += kPanel) {
    const auto panel = [&](auto tile) { tile(left, rows, right, units, first, out, out_stride, ahead); };
    switch (ceiling(smaller(kPanel, columns - at), kLanes)) {
      case 1: panel(product_panel<kTileRows, 1, T>); break;
      case 2: panel(product_panel<kTileRows, 2, T>); break;
      default: panel(product_panel<kTileRows, kTileVectors, T>);
    }
  }
}

}  // namespace
