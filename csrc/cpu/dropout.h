// The dropout mask of lora_kernels/reference.py: Philox-4x32-7, one counter for eight neighbouring columns of a row.
namespace {

constexpr int kCounters = kLanes / 2;  // of a vector of 64-bit words

// keep [columns, rounded up to whole vectors of counters] of one row, `column` a multiple of eight: all bits set where an
// element stays.
inline void keep_row(const LoraLinear& p, int64_t row, int64_t column, int64_t columns, uint16_t* keep) {
  const int64_t counters = ceiling(columns, 8), first = column / 8;
  const uint32_t key0 = *p.seed, key1 = uint64_t(*p.seed) >> 32;
  Wide next;  // in the order in which evens() and odds() make one row of them
  for (int i = 0; i < kCounters; ++i) next[i] = first + i / 2 + i % 2 * (kCounters / 2);
  for (int64_t i = 0; i < counters; i += kCounters, next += kCounters) {
    Wide c0 = Wide() + row, c1 = next, c2 = Wide(), c3 = Wide();  // the high halves are ignored
#pragma GCC unroll 7
    for (uint32_t round = 0; round < 7; ++round) {
      const Wide p0 = low_product(c0, 0xD2511F53u), p1 = low_product(c2, 0xCD9E8D57u);
      c0 = p1 >> 32 ^ c1 ^ uint64_t(key0 + round * 0x9E3779B9u);
      c2 = p0 >> 32 ^ c3 ^ uint64_t(key1 + round * 0xBB67AE85u);
      c1 = p1, c3 = p0;
    }
    c0 = (c0 & 0xffffffffu) | c1 << 32, c2 = (c2 & 0xffffffffu) | c3 << 32;
    const Wide words[] = {evens(c0, c2), odds(c0, c2)};
    memcpy(keep + 8 * i, words, sizeof words);
  }
  const uint16_t last = p.keep_threshold - 1, any = p.keep_threshold ? 0xffff : 0;
#pragma omp simd
  for (int64_t i = 0; i < columns; ++i) keep[i] = keep[i] <= last ? any : 0;
}

// An element where its mask is set, and zero, of NaN too, where it is not.
template <class T>
inline T kept(T value, uint16_t keep) { return T{uint16_t(value.bits & keep)}; }
inline float kept(float value, uint16_t keep) {
  return bit_cast<float>(bit_cast<uint32_t>(value) & uint32_t(int16_t(keep)));
}

}  // namespace
