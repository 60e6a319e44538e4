// The dropout mask of lora_kernels/reference.py: Philox-4x32-7, one counter for eight neighbouring columns of a row.
namespace {

// keep [columns, rounded up to eights] of one row, `column` a multiple of eight: all bits set where an element stays.
inline void keep_row(const LoraLinear& p, int64_t row, int64_t column, int64_t columns, uint16_t* keep) {
  typedef uint64_t __attribute__((may_alias)) Words;
  const int64_t counters = ceiling(columns, 8), first = column / 8;
  const uint32_t key0 = p.seed, key1 = uint64_t(p.seed) >> 32;
  Words* words = reinterpret_cast<Words*>(keep);
#pragma omp simd
  for (int64_t i = 0; i < counters; ++i) {
    uint64_t c0 = row, c1 = first + i, c2 = 0, c3 = 0;  // the high halves are ignored
#pragma GCC unroll 7
    for (uint32_t round = 0; round < 7; ++round) {
      const uint64_t p0 = uint64_t(uint32_t(c0)) * 0xD2511F53u, p1 = uint64_t(uint32_t(c2)) * 0xCD9E8D57u;
      c0 = p1 >> 32 ^ c1 ^ (key0 + round * 0x9E3779B9u);
      c2 = p0 >> 32 ^ c3 ^ (key1 + round * 0xBB67AE85u);
      c1 = p1, c3 = p0;
    }
    words[2 * i] = uint32_t(c0) | c1 << 32;
    words[2 * i + 1] = uint32_t(c2) | c3 << 32;
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
