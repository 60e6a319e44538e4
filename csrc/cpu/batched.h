// y += the adapters of each row, from the vectors of one instruction set; or y = x W' + bias and the adapters.
//
// Every element of h and every element of y is summed in one order, whatever the number of threads, of rows and of rows
// with the same adapter: threads and tiles only share out elements.
#include "base.h"

namespace {

constexpr int kRanks = 4;             // of a tile of h
constexpr int kVectors = 4;           // of a row of a tile of y
constexpr int kBlock = kVectors * kLanes;
constexpr int kShare = 32;            // columns of y that are never shared between threads
constexpr int64_t kChunk = 1024;      // columns that all rows visit before the next: B stays in the cache
constexpr int kRun = 16;              // rows of one adapter for which B is read once

inline int64_t rank_of(const LoraBatch& p, const LoraSlice& s, int32_t slot) {
  return slot < 0 || slot >= p.num_slots ? 0 : larger(0, smaller(s.ranks[slot], s.max_rank));
}

inline float* h_of(const LoraBatch& p, const LoraSlice& s, int64_t entry) {
  return p.h + p.rows * p.adapters_per_row * s.first_rank + entry * s.max_rank;
}

// out [ROWS][RANKS] = the dot products of ROWS rows of x with RANKS rows of A.
template <int ROWS, int RANKS, class T>
__attribute__((noinline)) void dots(const T* const* x, const T* a, int64_t k, float (*out)[kRanks]) {
  using D = Dot<T>;
  constexpr int64_t step = D::kStep;
  Vec sums[2][ROWS][RANKS];
  for (auto& half : sums)
    for (auto& row : half)
      for (auto& total : row) total = broadcast(0);
  const auto add_products = [&](int half, int64_t at, auto load) {
    typename D::Operand rows[ROWS];
#pragma GCC unroll 4
    for (int m = 0; m < ROWS; ++m) rows[m] = load(x[m] + at);
#pragma GCC unroll 4
    for (int r = 0; r < RANKS; ++r) {
      const auto column = load(a + r * k + at);
#pragma GCC unroll 4
      for (int m = 0; m < ROWS; ++m) sums[half][m][r] = D::accumulate(rows[m], column, sums[half][m][r]);
    }
  };
  const auto load_all = [](const T* from) { return D::load(from); };
  int64_t i = 0;
  for (; i + 2 * step <= k; i += 2 * step) {
    add_products(0, i, load_all);
    add_products(1, i + step, load_all);
  }
  if (i + step <= k) {
    add_products(0, i, load_all);
    i += step;
  }
  if (i < k) add_products(1, i, [&](const T* from) { return D::load_part(from, k - i); });
  for (int m = 0; m < ROWS; ++m)
    for (int r = 0; r < RANKS; ++r) out[m][r] = sum(add(sums[0][m][r], sums[1][m][r]));
}

template <int ROWS, class T>
inline void dots(const T* const* x, const T* a, int64_t k, int64_t ranks, float (*out)[kRanks]) {
  switch (ranks) {
    case 1: return dots<ROWS, 1>(x, a, k, out);
    case 2: return dots<ROWS, 2>(x, a, k, out);
    case 3: return dots<ROWS, 3>(x, a, k, out);
    default: return dots<ROWS, 4>(x, a, k, out);
  }
}

// h of `ROWS` entries and up to kRanks ranks from `rank`: scaled, and rounded once to T.
template <int ROWS, class T>
inline void shrink_tile(const LoraBatch& p, const LoraSlice& s, const int32_t* entries, int32_t slot, int64_t rank) {
  const T* x[ROWS];
  for (int m = 0; m < ROWS; ++m) {
    x[m] = static_cast<const T*>(p.x) + entries[m] / p.adapters_per_row * p.stride_x;
  }
  const int64_t ranks = smaller(kRanks, rank_of(p, s, slot) - rank);
  float h[ROWS][kRanks];
  dots<ROWS>(x, static_cast<const T*>(s.a) + (s.first_row[slot] + rank) * p.k, p.k, ranks, h);
  for (int m = 0; m < ROWS; ++m) {
    const float scaling = s.scalings[slot] * (p.weights ? p.weights[entries[m]] : 1.0f);
    for (int r = 0; r < ranks; ++r) h_of(p, s, entries[m])[rank + r] = rounded<T>(scaling * h[m][r]);
  }
}

// Calls visit(slice, entries, count, slot) for each adapter in use and the entries that use it.
template <class Visit>
inline void each_adapter(const LoraBatch& p, Visit visit) {
  const int64_t entries = p.rows * p.adapters_per_row;
  for (int64_t i = 0; i < p.num_slices; ++i) {
    for (int64_t first = 0, last; first < entries; first = last) {
      const int32_t slot = p.slots[p.order[first]];
      for (last = first + 1; last < entries && p.slots[p.order[last]] == slot;) ++last;
      if (rank_of(p, p.slices[i], slot)) visit(p.slices[i], p.order + first, last - first, slot);
    }
  }
}

// This thread's share of h: tiles are numbered by slice, adapter, ranks and entry.
template <class T>
inline void shrink(const LoraBatch& p, int64_t thread, int64_t threads) {
  int64_t tiles = 0;
  each_adapter(p, [&](const LoraSlice& s, const int32_t*, int64_t count, int32_t slot) {
    tiles += count * ceiling(rank_of(p, s, slot), kRanks);
  });
  const int64_t begin = tiles * thread / threads, end = tiles * (thread + 1) / threads;
  int64_t seen = 0;
  each_adapter(p, [&](const LoraSlice& s, const int32_t* entries, int64_t count, int32_t slot) {
    const int64_t here = count * ceiling(rank_of(p, s, slot), kRanks);
    const int64_t last = smaller(end - seen, here);
    for (int64_t tile = larger(begin - seen, 0); tile < last;) {
      const int64_t entry = tile % count, rank = tile / count * kRanks;
      if (entry + 1 < count && tile + 1 < last) {
        shrink_tile<2, T>(p, s, entries + entry, slot, rank);
        tile += 2;
      } else {
        shrink_tile<1, T>(p, s, entries + entry, slot, rank);
        tile += 1;
      }
    }
    seen += here;
  });
}

// terms [ROWS][kBlock] += h [ROWS][ranks] times b [ranks][columns].
template <int ROWS, class T>
__attribute__((noinline)) void expand_tile(float (*terms)[kBlock], const float* const* h, const T* b, int64_t stride,
                                           int64_t ranks, int64_t columns) {
  Vec sums[ROWS][kVectors];
  for (int m = 0; m < ROWS; ++m)
    for (int v = 0; v < kVectors; ++v) sums[m][v] = load(terms[m] + v * kLanes);
  const auto add_products = [&](auto load_b) {
    for (int64_t r = 0; r < ranks; ++r, b += stride) {
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        const Vec column = load_b(v * kLanes);
#pragma GCC unroll 4
        for (int m = 0; m < ROWS; ++m) sums[m][v] = fma(broadcast(h[m][r]), column, sums[m][v]);
      }
    }
  };
  if (columns == kBlock) {
    add_products([&](int at) { return load(b + at); });
  } else {
    add_products([&](int at) { return load_part(b + at, larger(0, smaller(columns - at, kLanes))); });
  }
  for (int m = 0; m < ROWS; ++m)
    for (int v = 0; v < kVectors; ++v) store(terms[m] + v * kLanes, sums[m][v]);
}

template <class T>
inline void add_to_row(T* y, const float* terms, int64_t columns) {
  for (int64_t at = 0; at < columns; at += kLanes) {
    if (columns - at >= kLanes) {
      store(y + at, add(load(y + at), load(terms + at)));
    } else {
      store_part(y + at, add(load_part(y + at, columns - at), load(terms + at)), columns - at);
    }
  }
}

// b [ranks][kBlock] of columns that lie `stride` apart, with their ranks side by side.
template <class T>
inline void transpose(const T* from, int64_t stride, int64_t ranks, int64_t columns, T* b) {
  constexpr int64_t kSide = 16 / sizeof(T);
  const int64_t whole_ranks = ranks - ranks % kSide, whole_columns = columns - columns % kSide;
  for (int64_t n = 0; n < whole_columns; n += kSide)
    for (int64_t r = 0; r < whole_ranks; r += kSide) transpose_tile(from + n * stride + r, stride, b + r * kBlock + n, kBlock);
  for (int64_t n = 0; n < columns; ++n)
    for (int64_t r = n < whole_columns ? whole_ranks : 0; r < ranks; ++r) b[r * kBlock + n] = from[n * stride + r];
}

// y's `columns` from `column` of its slice, for `count` rows which all use the same adapters.
template <class T>
inline void expand_block(const LoraBatch& p, const LoraSlice& s, const int64_t* rows, int count, T* y, int64_t column,
                         int64_t columns) {
  T transposed[LORA_MAX_RANK * kBlock];
  float terms[kRun][kBlock];
  memset(terms, 0, count * sizeof *terms);
  for (int64_t j = 0; j < p.adapters_per_row; ++j) {
    const int32_t slot = p.slots[rows[0] * p.adapters_per_row + j];
    const int64_t ranks = rank_of(p, s, slot);
    if (!ranks) continue;
    const T* b = static_cast<const T*>(s.b) + s.first_row[slot] * s.width + column * s.stride_bn;
    int64_t stride = s.stride_br;
    if (s.stride_bn != 1) {
      transpose(b, s.stride_bn, ranks, columns, transposed);
      b = transposed, stride = kBlock;
    }
    const float* h[kRun];
    for (int m = 0; m < count; ++m) h[m] = h_of(p, s, rows[m] * p.adapters_per_row + j);
    int m = 0;
    for (; m + 2 <= count; m += 2) expand_tile<2>(terms + m, h + m, b, stride, ranks, columns);
    if (m < count) expand_tile<1>(terms + m, h + m, b, stride, ranks, columns);
  }
  for (int m = 0; m < count; ++m) add_to_row(y + rows[m] * p.stride_y + column, terms[m], columns);
}

// The rows that follow the `first` one and use the same adapters, itself included; returns how many, at most kRun.
inline int run_of_rows(const LoraBatch& p, int64_t first, int64_t* rows) {
  const int64_t each = p.adapters_per_row;
  int count = 0;
  for (int64_t i = first; i < p.rows && count < kRun; ++i) {
    const int64_t row = each == 1 ? p.order[i] : i;
    if (count && memcmp(p.slots + row * each, p.slots + rows[0] * each, each * sizeof *p.slots)) break;
    rows[count++] = row;
  }
  return count;
}

inline bool has_adapters(const LoraBatch& p, const LoraSlice& s, int64_t row) {
  for (int64_t j = 0; j < p.adapters_per_row; ++j)
    if (rank_of(p, s, p.slots[row * p.adapters_per_row + j])) return true;
  return false;
}

// This thread's share of y's columns.
template <class T>
inline void expand(const LoraBatch& p, const Base& base, int64_t thread, int64_t threads) {
  int64_t shares = 0, seen = 0;
  for (int64_t i = 0; i < p.num_slices; ++i) shares += ceiling(p.slices[i].width, kShare);
  const int64_t begin = shares * thread / threads, end = shares * (thread + 1) / threads;
  int64_t before = 0;
  for (int64_t i = 0; i < p.num_slices; before += p.slices[i++].width) {
    const LoraSlice& s = p.slices[i];
    T* y = static_cast<T*>(p.y) + before;
    const int64_t last = smaller(s.width, (end - seen) * kShare);
    for (int64_t chunk = larger(0, begin - seen) * kShare; chunk < last; chunk += kChunk) {
      const int64_t chunk_end = smaller(last, chunk + kChunk);
      if constexpr (kHasBase<T>) {
        if (p.w) base_columns<T>(base, {before + chunk, before + chunk_end});
      }
      int64_t rows[kRun];
      for (int64_t first = 0, count; first < p.rows; first += count) {
        count = run_of_rows(p, first, rows);
        if (!has_adapters(p, s, rows[0])) continue;
        for (int64_t column = chunk; column < chunk_end; column += kBlock) {
          expand_block(p, s, rows, count, y, column, smaller(kBlock, chunk_end - column));
        }
      }
    }
    seen += ceiling(s.width, kShare);
  }
}

template <class T>
inline void batched_of(const LoraBatch& p) {
  const Base base = {p.x, p.w, p.bias, p.y, p.packed_x, p.rows, p.k, p.columns, p.stride_x, p.stride_w, p.stride_y, {}, {}, 0, 0};
#pragma omp parallel num_threads(p.threads)
  {
    [[maybe_unused]] const Multiplying<T> multiplying;
    const int thread = omp_get_thread_num(), threads = omp_get_num_threads();
    if constexpr (kHasBase<T>) {
      if (p.w) pack_x<T>(base);
    }
    shrink<T>(p, thread, threads);
#pragma omp barrier
    expand<T>(p, base, thread, threads);
  }
}

}  // namespace

namespace ISA {

void batched(const LoraBatch& p) {
  switch (p.dtype) {
    case LORA_FP32: return batched_of<float>(p);
    case LORA_BF16: return batched_of<bf16>(p);
    case LORA_FP16: return batched_of<fp16>(p);
  }
}

}  // namespace ISA
