// AVX512-BF16, and AMX for packed operands: a tile holds 16 rows of 16 units, and is multiplied in one instruction.
//
// The instructions are spelled out: compilers' own functions for them do not say that a tile is read from memory.
#define ISA amx
#include "avx512.h"
#include "dot.h"
#include "pairs.h"
#include "product.h"

namespace {

constexpr int kSide = 16;  // rows of a tile, and its units
static_assert(kSide == kRoom && kSide == kLanes, "");

// The tiles: sums; a step's left and right operand; those of the last step, which has fewer units.
constexpr int kLeft = 4, kRight = 5, kLastLeft = 6, kLastRight = 7;

struct alignas(64) Shapes {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {kSide, kSide, kSide, kSide, kSide, kSide, kSide, kSide};
};

// The units of the last tiles, as this thread's tiles are configured; 0: they are not. It takes longer than ten products.
thread_local int64_t last_units;

inline void configure(int64_t units) {
  Shapes shapes;
  shapes.row_bytes[kLastLeft] = units * sizeof(float), shapes.rows[kLastRight] = last_units = units;
  asm volatile("ldtilecfg %0" : : "m"(shapes));
}

template <>
struct Multiplying<bf16> {
  ~Multiplying() {
    if (last_units) asm volatile("tilerelease");
    last_units = 0;
  }
};

template <int TILE>
inline void load_tile(const void* from, int64_t bytes) {
  asm volatile("tileloadd (%1,%2,1), %%tmm%c0" : : "i"(TILE), "r"(from), "r"(bytes) : "memory");
}
template <int TILE>
inline void store_tile(float* to, int64_t bytes) {
  asm volatile("tilestored %%tmm%c0, (%1,%2,1)" : : "i"(TILE), "r"(to), "r"(bytes) : "memory");
}
template <int TILE>
inline void zero_tile() { asm volatile("tilezero %%tmm%c0" : : "i"(TILE)); }
template <int SUM, int LEFT, int RIGHT>
inline void multiply_tiles() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(SUM), "i"(LEFT), "i"(RIGHT));
}

// Shows the address sanitizer the ends of a tile's rows, which it does not see read.
inline void show(const void* from, int64_t bytes, int64_t rows, int64_t units) {
#ifdef __SANITIZE_ADDRESS__
  const volatile char* row = static_cast<const volatile char*>(from);
  for (; rows-- > 0; row += bytes) (void)row[0], (void)row[units * sizeof(float) - 1];
#endif
}

template <int AT>
struct Index { static constexpr int value = AT; };

// Calls visit(Index) of 0 .. COUNT - 1.
template <int COUNT, class Visit>
inline void each(Visit visit) {
  if constexpr (COUNT > 0) {
    each<COUNT - 1>(visit);
    visit(Index<COUNT - 1>());
  }
}

// ROWS by COLUMNS tiles of sums.
template <int ROWS, int COLUMNS>
inline void tiles(Left left, const float* right, int64_t units, bool first, float* out, int64_t out_stride) {
  constexpr int64_t width = COLUMNS * kLanes, row_bytes = width * sizeof(float);
  const int64_t out_bytes = out_stride * sizeof(float);
  const auto each_sum = [&](auto visit) {
    each<ROWS>([&](auto m) {
      each<COLUMNS>([&](auto v) {
        visit(Index<m.value * COLUMNS + v.value>(), out + m.value * kSide * out_stride + v.value * kLanes);
      });
    });
  };
  const auto step = [&](auto l, auto r, int64_t count) {
    each<ROWS>([&](auto m) {
      const Left rows = left.from(m.value * kSide);
      show(rows.at, rows.bytes, kSide, count);
      load_tile<l.value>(rows.at, rows.bytes);
      each<COLUMNS>([&](auto i) {  // there and back: the last tile of a row is the first of the next
        constexpr int v = m.value % 2 ? COLUMNS - 1 - i.value : i.value;
        if (m.value == 0 || i.value > 0) {
          show(right + v * kLanes, row_bytes, count, kLanes);
          load_tile<r.value>(right + v * kLanes, row_bytes);
        }
        multiply_tiles<m.value * COLUMNS + v, l.value, r.value>();
      });
    });
    left.at += count * sizeof(float), right += count * width;
  };
  each_sum([&](auto sum, float* at) {
    show(at, out_bytes, kSide, kLanes);
    first ? zero_tile<sum.value>() : load_tile<sum.value>(at, out_bytes);
  });
  for (; units >= kSide; units -= kSide) step(Index<kLeft>(), Index<kRight>(), kSide);
  if (units) step(Index<kLastLeft>(), Index<kLastRight>(), units);
  each_sum([&](auto sum, float* at) { store_tile<sum.value>(at, out_bytes); });
}

// Every 16 units are summed by themselves, in ascending order, and added to those before: all parts of a depth but the last
// are of whole tiles, so its cuts change no bit.
// Nothing is asked for ahead: nobody has timed that with AMX.
template <>
inline void product<bf16>(Left left, int64_t rows, const float* right, int64_t columns, int64_t units, bool first,
                          float* out, int64_t out_stride, Ahead*) {
  const int64_t last = units % kSide;
  if (!last_units || (last && last != last_units)) configure(last ? last : kSide);
  for (int64_t at = 0; at < columns; at += kPanel, right += units * kPanel, out += kPanel) {
    const int64_t vectors = ceiling(smaller(kPanel, columns - at), kLanes);
    for (int64_t m = 0; m < rows;) {
      const bool two = vectors < 3 && rows - m > kSide;  // a lone sum waits for itself
      const auto run = two ? (vectors == 1 ? tiles<2, 1> : tiles<2, 2>)
                           : vectors == 1 ? tiles<1, 1> : vectors == 2 ? tiles<1, 2> : tiles<1, 3>;
      run(left.from(m), right, units, first, out + m * out_stride, out_stride);
      m += two ? 2 * kSide : kSide;
    }
  }
}

}  // namespace

#include "batched.h"
#include "linear.h"
