// One layer of a training step: h and h B', the gradients, and the base layer's products where W is given.
//
// Threads share out rows, then columns; each element is summed in ascending order, in parts that begin at fixed places. So
// its bits depend neither on their number nor on how the work is cut.
#include "base.h"
#include "dropout.h"
#include "scratch.h"

namespace {

constexpr int64_t kRows = 32;              // of a block that a thread works on
constexpr int64_t kDepth = 256;            // units of a block's rows that are packed at once
constexpr int64_t kSweep = 4 * kPanel;     // columns that are swept from the first row to the last
constexpr int64_t kColumns = 16;           // whose multiples threads share out: vectors of all sets, and counters of the mask
constexpr int64_t kStagger = 16;           // floats: rows a power of two apart would compete for the same places in L1

template <class T>
constexpr int64_t kElements = kDepth * kPerUnit<T>;

static_assert(kDepth % (8 * kCounters) == 0 && kSweep % (8 * kCounters) == 0 && kPanel % 8 == 0 && kColumns % 8 == 0,
              "the mask is drawn in whole vectors, from any panel");

inline bool drops(const LoraLinear& p) { return p.seed; }

inline void scale(float* values, float by, int64_t count) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) values[i] *= by;
}

// to [rows, r] = by drop(from [rows, depth]) right, rounded once to T: h of x and A', g of dy and B.
template <class T>
inline void project(const LoraLinear& p, bool drop, const T* from, int64_t stride, int64_t row, int64_t rows,
                    int64_t depth, const float* right, float by, T* to) {
  alignas(64) float left[kRows * (kDepth + kStagger)], sums[kRows * LORA_MAX_RANK];
  alignas(64) uint16_t keep[kElements<T>];
  alignas(64) T kept_row[kElements<T>];
  const int64_t width = whole_vectors(p.r);
  for (int64_t at = 0; at < depth; at += kElements<T>) {
    const int64_t count = smaller(kElements<T>, depth - at), units = units_of<T>(count);
    for (int64_t m = 0; m < rows; ++m) {
      const T* source = from + (row + m) * stride + at;
      if (m + 1 < rows) prefetch(source + stride, count * sizeof(T));
      if (drop) {
        keep_row(p, row + m, at, count, keep);
#pragma omp simd
        for (int64_t i = 0; i < count; ++i) kept_row[i] = kept(source[i], keep[i]);
        source = kept_row;
      }
      pack_left(source, 0, 1, count, left + m * (kDepth + kStagger), 0);
    }
    product<T>({left, kDepth + kStagger}, rows, right, p.r, units, at == 0, sums, width);
    right += units * width;
  }
  for (int64_t m = 0; m < rows; ++m) {
    scale(sums + m * width, by, p.r);
    copy_row(to + (row + m) * p.r, sums + m * width, p.r);
  }
}

// A right operand [depth, r] in blocks of kElements of its depth, this thread's share of them.
template <class T, class Pack>
inline void pack_blocks(const LoraLinear& p, int64_t depth, float* to, Pack pack) {
  each_block(share(depth, kElements<T>), kElements<T>, [&](int64_t at, int64_t count) {
    pack(at, count, to + at / kPerUnit<T> * whole_vectors(p.r));
  });
}

template <class T>
inline int64_t block_floats(const LoraLinear& p, int64_t depth) { return units_of<T>(depth) * whole_vectors(p.r); }

// A right operand [r, columns], this thread's share of its panels.
template <class T, class Pack>
inline void pack_panels(const LoraLinear& p, int64_t columns, float* to, Pack pack) {
  each_block(share(columns, kPanel), kPanel, [&](int64_t at, int64_t count) {
    pack(at, count, to + at * units_of<T>(p.r));
  });
}

template <class T>
inline int64_t panel_floats(const LoraLinear& p, int64_t columns) { return units_of<T>(p.r) * whole_vectors(columns); }

// Calls visit(row, terms) for the rows of left right, which has up to kSweep columns; a few rows at a time stay in L1.
template <class T, class Visit>
inline void expand(const float* left, int64_t units, int64_t rows, const float* right, int64_t columns, Visit visit) {
  alignas(64) float terms[kRoom * kSweep];
  each_block({0, rows}, kRoom, [&](int64_t row, int64_t count) {
    product<T>({left + row * units, units}, count, right, columns, units, true, terms, kSweep);
    for (int64_t m = 0; m < count; ++m) visit(row + m, terms + m * kSweep);
  });
}

// h of some rows.
template <class T>
inline void shrink_rows(const LoraLinear& p, int64_t row, int64_t rows, const float* a) {
  const T* x = static_cast<const T*>(p.x);
  project(p, drops(p), x, p.stride_x, row, rows, p.k, a, p.scaling * p.keep_scale, static_cast<T*>(p.h));
}

// h B' + bias of some rows.
template <class T>
inline void expand_rows(const LoraLinear& p, int64_t row, int64_t rows, const float* b) {
  alignas(64) float left[kRows * LORA_MAX_RANK];
  const T* h = static_cast<const T*>(p.h);
  const int64_t units = units_of<T>(p.r);
  pack_left(h + row * p.r, p.r, rows, p.r, left, units);
  each_block({0, p.n}, kSweep, [&](int64_t column, int64_t columns) {
    expand<T>(left, units, rows, b + column * units, columns, [&](int64_t m, float* terms) {
      if (p.bias) add_row(terms, static_cast<const T*>(p.bias) + column, columns);
      copy_row(static_cast<T*>(p.y) + (row + m) * p.n + column, terms, columns);
    });
  });
}

// A thread's share of y, with W; h is there when all threads are.
template <class T>
inline void multiply_base(const LoraLinear& p, const Base& base, float* packed_h) {
  pack_x<T>(base);
#pragma omp barrier
  pack_panels<T>(p, p.m, packed_h, [&](int64_t at, int64_t count, float* to) {
    pack_right_of_transposed(static_cast<const T*>(p.h) + at * p.r, p.r, p.r, count, to);
  });
#pragma omp barrier
  base_columns<T>(base, share(p.n, kRoom));
}

template <class T>
inline bool forward_of(const LoraLinear& p) {
  const Scratch x(p.w ? units_of<T>(p.k) * whole_vectors(p.m) : 0), a(block_floats<T>(p, p.k));
  const Scratch b(p.w ? 0 : panel_floats<T>(p, p.n)), h(p.w ? panel_floats<T>(p, p.m) : 0);
  if (!x || !a || !b || !h) return false;
  const Base base = {p.x, p.w, p.bias, p.y, x, p.m, p.k, p.n, p.stride_x, p.stride_w, p.n, p.b, h, p.r, p.stride_b};
#pragma omp parallel num_threads(p.threads)
  {
    [[maybe_unused]] const Multiplying<T> multiplying;
    pack_blocks<T>(p, p.k, a, [&](int64_t at, int64_t count, float* to) {
      pack_right_of_transposed(static_cast<const T*>(p.a) + at, p.stride_a, count, p.r, to);
    });
    if (!p.w) {
      pack_panels<T>(p, p.n, b, [&](int64_t at, int64_t count, float* to) {
        pack_right_of_transposed(static_cast<const T*>(p.b) + at * p.stride_b, p.stride_b, p.r, count, to);
      });
    }
#pragma omp barrier
    each_block(share(p.m, kRoom), kRows, [&](int64_t row, int64_t rows) {
      shrink_rows<T>(p, row, rows, a);
      if (!p.w) expand_rows<T>(p, row, rows, b);
    });
    if constexpr (kHasBase<T>) {
      if (p.w) multiply_base<T>(p, base, h);
    }
  }
  return true;
}

// Packed operands of the backward pass, shared by all threads, and what each has of its own.
template <class T>
struct Backward {
  const int64_t stride, whole_rows, sums_floats, w_floats;
  const Scratch sums;                  // with w: [m, kSweep] of dx
  const Scratch w;                     // right: [n, kPanel], twice
  const Scratch last_dy;               // left: the rows after whole_rows, for which AMX needs room
  const Scratch a, b;                  // right: [r, k], [n, r]
  const Scratch g;                     // left: [m, r]
  const Scratch g_columns, h_columns;  // left: [r, m], rows `stride` apart

  explicit Backward(const LoraLinear& p)
      : stride(ceiling(units_of<T>(p.m), kStagger) * kStagger + kStagger), whole_rows(p.m / kRoom * kRoom),
        sums_floats(p.w ? with_room(p.m) * kSweep : 0), w_floats(p.w ? 2 * units_of<T>(p.n) * kPanel : 0),
        sums(p.threads * sums_floats), w(p.threads * w_floats),
        last_dy(p.w ? kRoom * units_of<T>(p.n) : 0),
        a(panel_floats<T>(p, p.k)), b(block_floats<T>(p, p.n)), g(with_room(p.m) * units_of<T>(p.r)),
        g_columns(with_room(p.r) * stride), h_columns(with_room(p.r) * stride) {}
  float* sums_of_thread() const { return sums + omp_get_thread_num() * sums_floats; }
  float* w_of_thread() const { return w + omp_get_thread_num() * w_floats; }
  bool allocated() const { return sums && w && last_dy && a && b && g && g_columns && h_columns; }
};

template <class T>
inline void backward_rows(const LoraLinear& p, const Backward<T>& s, int64_t row, int64_t rows) {
  if (p.db) {
    const T* h = static_cast<const T*>(p.h) + row * p.r;
    pack_left_of_transposed(h, p.r, p.r, rows, s.h_columns + row / kPerUnit<T>, s.stride);
  }
  if (!p.dx && !p.da) return;
  alignas(64) T g[kRows * LORA_MAX_RANK];
  project(p, false, static_cast<const T*>(p.dy) + row * p.stride_dy, p.stride_dy, 0, rows, p.n, s.b, p.scaling, g);
  const int64_t units = units_of<T>(p.r);
  pack_left(g, p.r, rows, p.r, s.g + row * units, units);
  if (p.da) pack_left_of_transposed(g, p.r, p.r, rows, s.g_columns + row / kPerUnit<T>, s.stride);
}

// to = by from, where it is kept.
template <class T>
inline void copy_kept(T* to, const float* from, float by, const uint16_t* keep, int64_t count) {
  typedef int32_t Bits __attribute__((vector_size(sizeof(Vec))));
  each_block({0, count}, kLanes, [&](int64_t i, int64_t here) {
    const Bits mask = (Bits)load(reinterpret_cast<const bf16*>(keep + i)) >> 16;  // as a bf16 it is the upper half
    const Vec values = (Vec)((Bits)(load(from + i) * broadcast(by)) & mask);
    here == kLanes ? store(to + i, values) : store_part(to + i, values, here);
  });
}

// Some columns of drop(g A) and of g' drop(x).
template <class T>
inline void sweep_x(const LoraLinear& p, const Backward<T>& s, int64_t column, int64_t columns) {
  alignas(64) uint16_t keep[kRows * kSweep];
  alignas(64) T kept_x[kRows * kSweep];
  alignas(64) float packed[kRows * kSweep], sums[LORA_MAX_RANK * kSweep];
  const int64_t units = units_of<T>(p.r);
  float* const sums_of_dx = s.sums_of_thread();
  each_block({0, p.m}, kRows, [&](int64_t row, int64_t rows) {
    const T* x = p.da ? static_cast<const T*>(p.x) + row * p.stride_x + column : nullptr;
    for (int64_t m = 0; m < rows; ++m) {
      if (p.da && row + m + kRows < p.m) prefetch(x + (m + kRows) * p.stride_x, columns * sizeof(T));
      if (drops(p)) keep_row(p, row + m, column, columns, keep + m * kSweep);
    }
    if (p.w) {
      each_block({row, row + rows}, kRoom, [&](int64_t from, int64_t count) {
        float* const to = sums_of_dx + from * kSweep;
        product<T>({s.g + from * units, units}, count, s.a + column * units, columns, units, true, to, kSweep);
        for (int64_t m = 0; drops(p) && m < count; ++m) {
          copy_kept(to + m * kSweep, to + m * kSweep, p.keep_scale, keep + (from - row + m) * kSweep, columns);
        }
      });
    } else if (p.dx) {
      expand<T>(s.g + row * units, units, rows, s.a + column * units, columns, [&](int64_t m, float* terms) {
        T* to = static_cast<T*>(p.dx) + (row + m) * p.k + column;
        drops(p) ? copy_kept(to, terms, p.keep_scale, keep + m * kSweep, columns) : copy_row(to, terms, columns);
      });
    }
    if (p.da) {
      int64_t stride = p.stride_x;
      if (drops(p)) {
        for (int64_t m = 0; m < rows; ++m) {
#pragma omp simd
          for (int64_t i = 0; i < columns; ++i) kept_x[m * kSweep + i] = kept(x[m * stride + i], keep[m * kSweep + i]);
        }
        x = kept_x, stride = kSweep;
      }
      pack_right(x, stride, rows, columns, packed);
      const float* g = s.g_columns + row / kPerUnit<T>;
      product<T>({g, s.stride}, p.r, packed, columns, units_of<T>(rows), row == 0, sums, kSweep);
    }
  });
  for (int64_t r = 0; p.da && r < p.r; ++r) {
    scale(sums + r * kSweep, p.keep_scale, columns);
    const int64_t to = r * p.k + column;
    if (p.gradient_dtype == LORA_FP32) {
      copy_row(static_cast<float*>(p.da) + to, sums + r * kSweep, columns);
    } else {
      copy_row(static_cast<T*>(p.da) + to, sums + r * kSweep, columns);
    }
  }
}

// A thread's columns of W as right operands, one panel after another. The next is packed a piece at a time while this one is
// multiplied, and asked for before that: W comes from memory.
template <class T>
class Panels {
 public:
  Panels(const LoraLinear& p, Share columns, float* room)
      : p_(p), columns_(columns), piece_(ceiling(units_of<T>(p.n), ceiling(p.m, kBaseRows)) * kPerUnit<T>), packed_(room),
        packed_next_(room + units_of<T>(p.n) * kPanel), next_(panel(columns.begin)) {
    for (int64_t m = 0; m < p.m; m += kBaseRows) pack(m);
    turn();
  }

  Share columns() const { return now_; }
  const float* packed() const { return packed_; }

  // The piece of the next panel that belongs to the rows of dy from m on.
  void pack(int64_t m) {
    const Share rows = piece(m);
    const int64_t columns = next_.end - next_.begin;
    float* to = packed_next_ + rows.begin / kPerUnit<T> * whole_vectors(columns);
    pack_right(from(rows), p_.stride_w, rows.end - rows.begin, columns, to);
  }
  Ahead ahead(int64_t m, const Ahead& then) const {
    const Share rows = piece(m);
    const int64_t bytes = sizeof(T);
    return {from(rows), (next_.end - next_.begin) * bytes, p_.stride_w * bytes, rows.end - rows.begin, &then};
  }

  // On to the next panel.
  void turn() {
    float* const free = packed_;
    packed_ = packed_next_, packed_next_ = free;
    now_ = next_, next_ = panel(now_.end);
  }

 private:
  // All of a sweep are alike: a narrow one takes longer a column.
  Share panel(int64_t column) const {
    const int64_t sweep = columns_.begin + (column - columns_.begin) / kSweep * kSweep;
    const int64_t end = smaller(sweep + kSweep, columns_.end), panels = larger(ceiling(end - sweep, kPanel), 1);
    return {column, smaller(column + ceiling(end - sweep, panels * kLanes) * kLanes, end)};
  }
  Share piece(int64_t m) const {
    const int64_t begin = smaller(m / kBaseRows * piece_, p_.n);
    return {begin, smaller(begin + piece_, p_.n)};
  }
  const T* from(Share rows) const { return static_cast<const T*>(p_.w) + rows.begin * p_.stride_w + next_.begin; }

  const LoraLinear& p_;
  const Share columns_;
  const int64_t piece_;  // rows
  float *packed_, *packed_next_;
  Share now_, next_;
};

// Some columns of dx: dy W is added to the sums of what the adapter adds.
template <class T>
inline void multiply_dy(const LoraLinear& p, const Backward<T>& s, Panels<T>& w, int64_t column, int64_t columns) {
  const T* dy = static_cast<const T*>(p.dy);
  float* const all_sums = s.sums_of_thread();
  for (; w.columns().begin < column + columns; w.turn()) {
    const int64_t count = w.columns().end - w.columns().begin;
    each_block({0, p.m}, kBaseRows, [&](int64_t m, int64_t rows) {
      const int64_t whole = smaller(rows, s.whole_rows - m);
      float* const sums = all_sums + m * kSweep + w.columns().begin - column;
      const bool last = w.columns().end == column + columns;
      T* const dx = static_cast<T*>(p.dx) + m * p.k + column;
      const int64_t bytes = sizeof(T);
      const Ahead of_dx(dx, columns * bytes, p.k * bytes, last ? rows : 0);
      Ahead ahead = w.ahead(m, of_dx);
      InPlace<T>(dy, p.stride_dy, m, whole, p.n).multiply(w.packed(), count, false, sums, kSweep, &ahead);
      InPlace<T>(s.last_dy.at, rows - whole, p.n).multiply(w.packed(), count, false, sums + whole * kSweep, kSweep, &ahead);
      for (int64_t i = 0; last && i < rows; ++i) copy_row(dx + i * p.k, all_sums + (m + i) * kSweep, columns);
      w.pack(m);
    });
  }
}

// Some rows of dB, which are columns of dy.
template <class T>
inline void sweep_dy(const LoraLinear& p, const Backward<T>& s, int64_t column, int64_t columns) {
  alignas(64) float packed[kRows * kSweep], sums[LORA_MAX_RANK * kSweep];
  each_block({0, p.m}, kRows, [&](int64_t row, int64_t rows) {
    const T* dy = static_cast<const T*>(p.dy) + row * p.stride_dy + column;
    for (int64_t m = kRows; m < kRows + rows && row + m < p.m; ++m) prefetch(dy + m * p.stride_dy, columns * sizeof(T));
    pack_right(dy, p.stride_dy, rows, columns, packed);
    const float* h = s.h_columns + row / kPerUnit<T>;
    product<T>({h, s.stride}, p.r, packed, columns, units_of<T>(rows), row == 0, sums, kSweep);
  });
  const auto transpose_to = [&](auto* db) {
    for (int64_t i = 0; i < columns; ++i)
      for (int64_t r = 0; r < p.r; ++r) narrow(sums[r * kSweep + i], db[(column + i) * p.r + r]);
  };
  if (p.gradient_dtype == LORA_FP32) {
    transpose_to(static_cast<float*>(p.db));
  } else {
    transpose_to(static_cast<T*>(p.db));
  }
}

template <class T>
inline bool backward_of(const LoraLinear& p) {
  const Backward<T> s(p);
  if (!s.allocated()) return false;
#pragma omp parallel num_threads(p.threads)
  {
    [[maybe_unused]] const Multiplying<T> multiplying;
    const Share columns = share(p.k, kColumns);
    if (p.w && omp_get_thread_num() == 0) {
      const T* last = static_cast<const T*>(p.dy) + s.whole_rows * p.stride_dy;
      pack_left(last, p.stride_dy, p.m - s.whole_rows, p.n, s.last_dy.at, units_of<T>(p.n));
    }
    if (p.dx) {
      each_block(columns, kPanel, [&](int64_t at, int64_t count) {
        pack_right(static_cast<const T*>(p.a) + at, p.stride_a, p.r, count, s.a + at * units_of<T>(p.r));
      });
    }
    if (p.dx || p.da) {
      pack_blocks<T>(p, p.n, s.b, [&](int64_t at, int64_t count, float* to) {
        pack_right(static_cast<const T*>(p.b) + at * p.stride_b, p.stride_b, count, p.r, to);
      });
    }
#pragma omp barrier
    each_block(share(p.m, kRoom), kRows, [&](int64_t row, int64_t rows) { backward_rows(p, s, row, rows); });
#pragma omp barrier
    if (p.w) {
      if constexpr (kHasBase<T>) {
        Panels<T> w(p, columns, s.w_of_thread());
        each_block(columns, kSweep, [&](int64_t at, int64_t count) {
          sweep_x(p, s, at, count);
          multiply_dy(p, s, w, at, count);
        });
      }
    } else if (p.dx || p.da) {
      each_block(columns, kSweep, [&](int64_t at, int64_t count) { sweep_x(p, s, at, count); });
    }
    if (p.db) {
      each_block(share(p.n, kColumns), kSweep, [&](int64_t at, int64_t count) { sweep_dy(p, s, at, count); });
    }
  }
  return true;
}

}  // namespace

namespace ISA {

bool forward(const LoraLinear& p) {
  switch (p.dtype) {
    case LORA_FP32: return forward_of<float>(p);
    case LORA_BF16: return forward_of<bf16>(p);
    default: return forward_of<fp16>(p);
  }
}

bool backward(const LoraLinear& p) {
  switch (p.dtype) {
    case LORA_FP32: return backward_of<float>(p);
    case LORA_BF16: return backward_of<bf16>(p);
    default: return backward_of<fp16>(p);
  }
}

}  // namespace ISA
