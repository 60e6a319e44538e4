// Every row its own adapters, in one launch, for the few rows of a decoding step: W is read once, nothing waits for anything.
//
// A tile is 64 columns of y and all rows. The first blocks, `shrinks`, make h = x A'; each of the others makes a part of a
// tile's sum over K and spills it. Whoever comes second to a tile, the last of its parts or the last of the shrink, adds up
// the parts in their order, and the adapters' terms in the order of their slots. So a row's bits depend on the row, its own
// adapters, the shapes and the number of parts alone: not on the order of the blocks, nor on the row's company.
//
// How W lies and is multiplied is a template parameter, `Weights`; see Dense in decode.cu. There x and W go from global memory
// to the tensor cores without ever meeting another thread: mma takes any order of K that both operands share, so a lane's
// fragments of two instructions are 8 neighbours in memory. A thread's ring in shared memory is its own, and the main loop
// has no barrier.
#pragma once
#include "../lora.h"
#include "device.h"

namespace {

constexpr int kWarps = 4, kThreads = 32 * kWarps;
constexpr int kColumns = 64;  // of y in a tile: a quarter a warp when adapters are added, 4 fragments before
constexpr int kRanks = 16;    // of h that a block of the shrink makes, and that are added at once
constexpr int kStep = 32 * kWarps;  // of K, which the warps share out
constexpr int kGemmStages = 4, kShrinkStages = 10, kExpandStages = 6;
constexpr int kMaxParts = 8;

struct Adapter {
  int64_t first_row;
  int32_t slot, rank;
  float scaling;
};

// kHalves: how many times 8 rows of x there can be.
template <int kHalves>
struct Shared {
  static constexpr int kRows = 8 * kHalves;
  static constexpr int kPlane = kRows * kRanks;                                     // of h, in floats
  static constexpr int kMaxStage = kColumns * kRanks * 2 + kMaxParts * kPlane * 4;  // an adapter's b and h, in bytes

  union {
    Chunk ring[kGemmStages * (kColumns / 8 + kHalves) * kThreads];
    float sums[kWarps * kColumns * kRows];
    struct {
      Adapter adapters[kThreads];
      char stages[kExpandStages * kMaxStage];
    };
  };
  int32_t mine[kThreads];

  static_assert(kShrinkStages * (kRanks / 8 + kHalves) * kThreads * sizeof(Chunk) <= sizeof(ring), "");
  static_assert(sizeof(ring) + sizeof(mine) <= 164 * 1024 / 2 - 1024, "two blocks on an SM of sm_80");
};

struct Columns {  // of y, in one tile
  int slice, live;
  int64_t in_slice, in_y;
};

DEVICE Columns locate(const LoraDecode& p, int tile) {
  Columns at{0, 0, 0, 0};
  int64_t start = 0;
  for (;; ++at.slice) {
    const int64_t width = p.slices[at.slice].width;
    const int tiles = static_cast<int>((width + kColumns - 1) / kColumns);
    if (tile < tiles) {
      at.in_slice = int64_t{tile} * kColumns;
      at.in_y = start + at.in_slice;
      at.live = static_cast<int>(width - at.in_slice < kColumns ? width - at.in_slice : kColumns);
      return at;
    }
    tile -= tiles;
    start += width;
  }
}

struct Use {  // what a row makes of an adapter: the first of its entries that names it, or -1, and the weights of all
  int entry;
  float weight;
};

DEVICE Use use_of(const LoraDecode& p, int row, int slot) {
  Use use{-1, 0.0f};
  if (row >= p.rows) return use;
  for (int j = p.adapters_per_row - 1; j >= 0; --j) {
    const int entry = row * p.adapters_per_row + j;
    if (p.slots[entry] != slot) continue;
    use.entry = entry;
    use.weight += p.weights ? p.weights[entry] : 1.0f;
  }
  return use;
}

DEVICE Adapter adapter_of(const LoraDecode& p, const LoraSlice& slice, int segment, int count) {
  const int slot = segment < count ? p.distinct[segment] : -1;
  if (slot < 0 || slot >= p.num_slots) return {0, -1, 0, 0.0f};
  return {slice.first_row[slot], slot, slice.ranks[slot], slice.scalings[slot]};
}

// 8 elements into shared memory: the first `live` of them, or all where kAligned; zeros where none is.
template <bool kAligned, class T>
DEVICE void copy(Chunk* to, const T* from, int64_t stride, int live) {
  if (kAligned) return copy_async(to, from, live > 0);
  auto element = [&](int i) { return i < live ? uint32_t{read(from + i * stride).bits} : 0u; };
#pragma unroll 1
  for (int i = 0; i < 4; ++i) to->word[i] = element(2 * i) | element(2 * i + 1) << 16;
}

// `live` rows of a matrix, each 8 a register, that a block multiplies by all rows of x.
template <class T>
struct Matrix {
  const T* rows;
  int64_t stride, column_stride;
  int live;
};

// sums += m x' over part `part` of K. Warp w takes 32 of every kStep; its lane (g, t) the 8 at 8t, of rows g, g + 8, ...
template <bool kAligned, int kStages, class T, int kGroups, int kHalves>
DEVICE void stream(float (&sums)[kGroups][kHalves][4], const LoraDecode& p, Matrix<T> m, int part, Chunk* ring) {
  constexpr int kChunks = 2 * kGroups + kHalves;
  const int lane = thread() % 32, g = lane / 4;
  const int steps = static_cast<int>((p.k + kStep - 1) / kStep), first = steps * part / p.parts;
  const int count = steps * (part + 1) / p.parts - first;
  const int64_t column = kAligned ? 1 : m.column_stride;
  const int64_t k = int64_t{first} * kStep + thread() / 32 * 32 + lane % 4 * 8;
  const T* w = m.rows + g * m.stride + k * column;
  const T* x = static_cast<const T*>(p.x) + g * p.stride_x + k;
  int64_t left = p.k - k;
  ring += thread();

  int filled = 0, slot = 0;
  auto fetch = [&] {
    if (filled++ < count) {
      Chunk* to = ring + slot * kChunks * kThreads;
      const int live = left < 8 ? static_cast<int>(left) : 8;  // none or fewer behind K
      for (int j = 0; j < 2 * kGroups; ++j, to += kThreads)
        copy<kAligned>(to, w + 8 * j * m.stride, column, 8 * j + g < m.live ? live : 0);
      for (int j = 0; j < kHalves; ++j, to += kThreads)
        copy<kAligned>(to, x + 8 * j * p.stride_x, 1, 8 * j + g < p.rows ? live : 0);
      w += kStep * column;
      x += kStep;
      left -= kStep;
      slot = slot + 1 < kStages ? slot + 1 : 0;
    }
    copy_commit();
  };
#pragma unroll 1
  for (int i = 0; i < kStages - 1; ++i) fetch();
#pragma unroll 1
  for (int i = 0, here = 0; i < count; ++i, here = here + 1 < kStages ? here + 1 : 0) {
    fetch();
    copy_wait<kStages - 1>();
    const Chunk* from = ring + here * kChunks * kThreads;
    Chunk rows[kHalves];
    for (int j = 0; j < kHalves; ++j) rows[j] = from[(2 * kGroups + j) * kThreads];
    for (int i = 0; i < kGroups; ++i) {
      const Chunk top = from[2 * i * kThreads], below = from[(2 * i + 1) * kThreads];
      for (int half = 0; half < 2; ++half) {
        const int w = 2 * half;
        const uint32_t a[4] = {top.word[w], below.word[w], top.word[w + 1], below.word[w + 1]};
        for (int j = 0; j < kHalves; ++j) {
          const uint32_t b[2] = {rows[j].word[w], rows[j].word[w + 1]};
          mma<T>(sums[i][j], a, b);
        }
      }
    }
  }
  copy_wait<0>();
}

// Leaves the warps' sums in `shared` [kWarps, 16 kGroups, 8 kHalves].
template <int kGroups, int kHalves>
DEVICE void share(const float (&sums)[kGroups][kHalves][4], float* shared) {
  const int lane = thread() % 32, warp = thread() / 32;
  barrier();  // the rings have been read
  for (int i = 0; i < kGroups; ++i)
    for (int j = 0; j < kHalves; ++j)
      for (int c = 0; c < 4; ++c) {
        const int row = 16 * i + lane / 4 + c / 2 * 8, column = 8 * j + lane % 4 * 2 + c % 2;
        shared[(warp * 16 * kGroups + row) * 8 * kHalves + column] = sums[i][j][c];
      }
  barrier();
}

template <int kSize>
DEVICE float total(const float* shared, int i) {
  float sum = shared[i];
  for (int warp = 1; warp < kWarps; ++warp) sum += shared[warp * kSize + i];
  return sum;
}

// Adds 1 for the whole block to a counter; returns what it was.
DEVICE int arrive_together(int* counter, int* shared) {
  barrier();
  if (thread() == 0) *shared = arrive(counter, 1);
  barrier();
  return *shared;
}

// Of two 16-bit values at ranks r and r + 1, those below `rank`; zeros for the others.
DEVICE uint32_t below(uint32_t pair, int r, int rank) {
  return r + 1 < rank ? pair : r < rank ? pair & 0xffffu : 0u;
}

// sums += the terms of each row's adapters. Warp w has 16 columns of the tile, and its lanes have them as mma leaves them: row
// g of c is column g of the tile, and column 2t of c is row 2t of x.
template <class T, int kHalves>
DEVICE void add_adapters(float (&sums)[kHalves][4], const LoraDecode& p, const Columns& at, Shared<kHalves>& shared) {
  constexpr int kRows = Shared<kHalves>::kRows, kPlane = Shared<kHalves>::kPlane;
  const int lane = thread() % 32, warp = thread() / 32, g = lane / 4, t = lane % 4;
  const int entries = static_cast<int>(p.rows) * p.adapters_per_row;
  const LoraSlice& slice = p.slices[at.slice];
  const T* b = static_cast<const T*>(slice.b);
  const bool rank_major = slice.stride_bn == 1;
  const int64_t pitch = rank_major ? slice.width : slice.stride_bn;
  const bool aligned = pitch % 8 == 0 && reinterpret_cast<uintptr_t>(b) % 16 == 0;
  const int stage_bytes = kColumns * kRanks * 2 + p.parts * kPlane * 4;
  const int count = p.segment[entries - 1] + 1;
  for (int base = 0; base < count; base += kThreads) {
    const int present = count - base < kThreads ? count - base : kThreads;
    barrier();  // what is overwritten now has been read
    shared.adapters[thread()] = adapter_of(p, slice, base + thread(), count);
    barrier();

    struct Place {
      int adapter, r;
    };
    auto settle = [&](Place& at) {  // on the next block of ranks that there is
      for (; at.adapter < present && at.r >= shared.adapters[at.adapter].rank; at.r = 0) ++at.adapter;
    };
    Place ahead{0, 0}, here{0, 0};
    settle(ahead);
    settle(here);
    int filled = 0;
    auto fetch = [&] {
      if (ahead.adapter < present) {
        const Adapter adapter = shared.adapters[ahead.adapter];
        Chunk* to = reinterpret_cast<Chunk*>(shared.stages + filled * stage_bytes) + thread();
        const int n = rank_major ? thread() % 8 * 8 : thread() / 2;
        const int r = ahead.r + (rank_major ? thread() / 8 : thread() % 2 * 8);
        const T* from = b + adapter.first_row * slice.width + (at.in_slice + n) * slice.stride_bn + r * slice.stride_br;
        const int live = n < at.live && r < adapter.rank ? (rank_major ? at.live - n : adapter.rank - r) : 0;
        aligned ? copy<true>(to, from, 1, live) : copy<false>(to, from, 1, live);

        const int row = thread() / 4 % kRows, entry = use_of(p, row, adapter.slot).entry;
        const float* h = p.planes + (entry < 0 ? 0 : entry * p.stride_h + slice.first_rank + ahead.r + thread() % 4 * 4);
        for (int i = thread(); i < p.parts * kPlane / 4; i += kThreads)
          copy_async(to + kThreads + (i - thread()), h + i / (kPlane / 4) * entries * p.stride_h, entry >= 0);
        ahead.r += kRanks;
        settle(ahead);
        filled = filled + 1 < kExpandStages ? filled + 1 : 0;
      }
      copy_commit();
    };
#pragma unroll 1
    for (int i = 0; i < kExpandStages - 1; ++i) fetch();
#pragma unroll 1
    for (int stage = 0; here.adapter < present; stage = stage + 1 < kExpandStages ? stage + 1 : 0) {
      copy_wait<kExpandStages - 2>();
      barrier();  // this stage is there for all, and the one before it has been read
      fetch();
      const Adapter adapter = shared.adapters[here.adapter];
      const bf16* tile_b = reinterpret_cast<const bf16*>(shared.stages + stage * stage_bytes);
      uint32_t left[4];
      if (rank_major)
        load_matrices<true>(left, tile_b + (lane / 16 * 8 + lane % 8) * kColumns + 16 * warp + lane / 8 % 2 * 8);
      else
        load_matrices<false>(left, tile_b + (16 * warp + lane % 16) * kRanks + lane / 16 * 8);
      for (int i = 0; i < 4; ++i) left[i] = below(left[i], here.r + 2 * t + i / 2 * 8, adapter.rank);
      float h[kHalves][4] = {};  // of row 8j + g, at ranks 2t, 2t + 1, 2t + 8 and 2t + 9
      const float* plane = reinterpret_cast<const float*>(tile_b + kColumns * kRanks) + g * kRanks + 2 * t;
      for (int part = 0; part < p.parts; ++part, plane += kPlane)
        for (int j = 0; j < kHalves; ++j)
          for (int i = 0; i < 4; ++i) h[j][i] += plane[8 * j * kRanks + i / 2 * 8 + i % 2];
      for (int j = 0; j < kHalves; ++j) {
        const Use use = use_of(p, 8 * j + g, adapter.slot);
        const unsigned users = votes(use.entry >= 0);
        if (!users) continue;
        const float factor = adapter.scaling * use.weight;
        uint32_t right[2];
        for (int i = 0; i < 2; ++i)
          right[i] = below(pack<T>(h[j][2 * i] * factor, h[j][2 * i + 1] * factor), here.r + 2 * t + 8 * i, adapter.rank);
        float term[4] = {};
        mma<T>(term, left, right);
        for (int c = 0; c < 4; ++c)  // chosen afterwards: another's adapter may hold NaN, and 0 NaN is NaN
          if (users >> (4 * (2 * t + c % 2)) & 1) sums[j][c] += term[c];
      }
      here.r += kRanks;
      settle(here);
    }
    copy_wait<0>();
  }
}

// y of a tile whose parts and whose h are all there.
template <class T, int kHalves>
DEVICE void expand(const LoraDecode& p, int tile, Shared<kHalves>& shared) {
  constexpr int kRows = Shared<kHalves>::kRows;
  const int lane = thread() % 32, warp = thread() / 32, g = lane / 4, t = lane % 4;
  const Columns at = locate(p, tile);
  float sums[kHalves][4] = {};
  for (int part = 0; part < p.parts; ++part) {
    const float* spilled = p.spill + (int64_t{tile} * p.parts + part) * (kColumns * kRows);
    for (int j = 0; j < kHalves; ++j)
      for (int i = 0; i < 2; ++i) {
        const float2 two = read_published(spilled + (16 * warp + g + 8 * i) * kRows + 8 * j + 2 * t);
        sums[j][2 * i] += two.x;
        sums[j][2 * i + 1] += two.y;
      }
  }
  add_adapters<T>(sums, p, at, shared);

  const T* bias = static_cast<const T*>(p.bias);
  T* y = static_cast<T*>(p.y);
  for (int i = 0; i < 2; ++i) {
    const int n = 16 * warp + g + 8 * i;
    if (n >= at.live) continue;
    const float offset = bias ? widen(read(bias + at.in_y + n)) : 0.0f;
    for (int j = 0; j < kHalves; ++j) {
      const uint32_t two = pack<T>(sums[j][2 * i] + offset, sums[j][2 * i + 1] + offset);
      const int row = 8 * j + 2 * t;
      if (row < p.rows) y[row * p.stride_y + at.in_y + n].bits = static_cast<uint16_t>(two);
      if (row + 1 < p.rows) y[(row + 1) * p.stride_y + at.in_y + n].bits = static_cast<uint16_t>(two >> 16);
    }
  }
  if (thread() == 0) reset(p.arrived + 1 + tile);
}

// Spills a part of a tile; whether the tile is now this block's to expand.
template <class Weights, class T, int kHalves>
DEVICE bool gemm(const LoraDecode& p, int tile, int part, typename Weights::template Memory<kHalves>& shared) {
  constexpr int kSize = kColumns * Shared<kHalves>::kRows;
  float sums[kColumns / 16][kHalves][4] = {};
  Weights::template multiply<T>(sums, p, locate(p, tile), part, shared);
  share(sums, shared.sums);
  float* spilled = p.spill + (int64_t{tile} * p.parts + part) * kSize;
  for (int i = thread(); i < kSize; i += kThreads) publish(spilled + i, total<kSize>(shared.sums, i));
  return arrive_together(p.arrived + 1 + tile, shared.mine) == 2 * p.parts;
}

// The planes of h, this block's share; whether all of h is now there, and this block the last.
template <bool kAligned, class T, int kHalves>
DEVICE bool shrink(const LoraDecode& p, Shared<kHalves>& shared) {
  constexpr int kRows = Shared<kHalves>::kRows, kSize = kRanks * kRows;
  const int entries = static_cast<int>(p.rows) * p.adapters_per_row;
  const int count = p.segment[entries - 1] + 1;
  int64_t max_rank = 0;
  for (int s = 0; s < p.num_slices; ++s)
    max_rank = max_rank < p.slices[s].max_rank ? p.slices[s].max_rank : max_rank;
  const int units = static_cast<int>((max_rank + kRanks - 1) / kRanks) * count * p.num_slices * p.parts;
  for (int unit = block(); unit < units; unit += p.shrinks) {
    const int part = unit % p.parts, rest = unit / p.parts;
    const LoraSlice& slice = p.slices[rest % p.num_slices];
    const Adapter adapter = adapter_of(p, slice, rest / p.num_slices % count, count);
    const int r = rest / p.num_slices / count * kRanks, live = adapter.rank - r;
    if (live <= 0) continue;
    float sums[1][kHalves][4] = {};
    const Matrix<T> a{static_cast<const T*>(slice.a) + (adapter.first_row + r) * p.k, p.k, 1, live};
    stream<kAligned, kShrinkStages>(sums, p, a, part, shared.ring);
    share(sums, shared.sums);
    for (int i = thread(); i < kSize; i += kThreads) {
      const int row = i / kRanks, entry = use_of(p, row, adapter.slot).entry;
      if (entry < 0) continue;
      publish(p.planes + (int64_t{part} * entries + entry) * p.stride_h + slice.first_rank + r + i % kRanks,
              total<kSize>(shared.sums, i % kRanks * kRows + row));
    }
    barrier();  // the sums have been read
  }
  const bool last = arrive_together(p.arrived, shared.mine) == p.shrinks - 1;
  if (last && thread() == 0) reset(p.arrived);
  return last;
}

// p.arrived counts the blocks of the shrink; p.arrived[1 + tile] counts 1 for each part that was spilled, and p.parts + 1 for
// "all of h is there". Whoever makes it 2 p.parts + 1 expands the tile, and sets it back to 0.
template <class T, int kHalves, class Weights>
__global__ void __launch_bounds__(kThreads, 2) decode(const __grid_constant__ LoraDecode p) {
  auto& shared = *reinterpret_cast<typename Weights::template Memory<kHalves>*>(shared_memory());
  const int place = block() - p.shrinks, tile = place / p.parts;
  const bool shrinks = place < 0;
  const bool mine = shrinks ? shrink<Weights::kAligned, T>(p, shared)
                            : gemm<Weights, T, kHalves>(p, tile, place % p.parts, shared);
  if (!mine) return;
  const int begin = shrinks ? 0 : tile, end = shrinks ? p.tiles : tile + 1;
  for (int first = begin; first < end; first += kThreads) {
    const int candidate = first + thread();
    barrier();
    shared.mine[thread()] =
        candidate < end && (!shrinks || arrive(p.arrived + 1 + candidate, p.parts + 1) == p.parts);
    barrier();
    for (int i = 0; i < kThreads; ++i)
      if (shared.mine[i]) expand<T>(p, first + i, shared);
  }
}

// Where the rows of x and of the adapters' A allow copies of 16 bytes.
inline bool on_16_bytes(const LoraDecode& p) {
  auto fits = [](const void* base, int64_t stride) {
    return reinterpret_cast<uintptr_t>(base) % 16 == 0 && stride % 8 == 0;
  };
  bool all = fits(p.x, p.stride_x);
  for (int s = 0; s < p.num_slices; ++s) all = all && fits(p.slices[s].a, p.k);
  return all;
}

template <class T, int kHalves, class Weights>
const char* launch_kernel(const LoraDecode& p, void* stream) {
  return launch(decode<T, kHalves, Weights>, p.shrinks + p.tiles * p.parts, kThreads,
                sizeof(typename Weights::template Memory<kHalves>), p.device, stream, p);
}

// Null, or the name of CUDA's error.
template <class Weights>
const char* launch_decode(const LoraDecode& p, void* stream) {
  const bool few = p.rows <= 8;
  if (p.dtype == LORA_BF16)
    return few ? launch_kernel<bf16, 1, Weights>(p, stream) : launch_kernel<bf16, 2, Weights>(p, stream);
  return few ? launch_kernel<fp16, 1, Weights>(p, stream) : launch_kernel<fp16, 2, Weights>(p, stream);
}

}  // namespace

#define EXPORT extern "C" __attribute__((visibility("default")))
