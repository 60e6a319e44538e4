// The peaks of this machine's cores and memory, for benchmarks/cpu_roofline.py: AVX-512, with pairs of bf16 and with tiles where there are any.
#include <immintrin.h>
#include <omp.h>
#include <stdint.h>
#include <sys/syscall.h>
#include <unistd.h>

namespace {

constexpr int kChains = 16;  // independent sums: more than the latency of a multiplication hides

__m512 product(__m512 a, __m512 b, __m512 c) { return _mm512_fmadd_ps(a, b, c); }
#ifdef __AVX512BF16__
__m512 pair_product(__m512 a, __m512 b, __m512 c) { return _mm512_dpbf16_ps(c, (__m512bh)a, (__m512bh)b); }
#endif

template <__m512 (*PRODUCT)(__m512, __m512, __m512)>
void multiply(int64_t steps) {
  __m512 sums[kChains], factor = _mm512_setzero_ps();
#pragma GCC unroll 16
  for (auto& sum : sums) sum = _mm512_setzero_ps();
  for (int64_t i = 0; i < steps; ++i) {
#pragma GCC unroll 16
    for (auto& sum : sums) {
      sum = PRODUCT(factor, factor, sum);
      asm volatile("" : "+v"(sum));
    }
  }
}

#ifdef __AMX_BF16__
constexpr int kTileChains = 4;

void multiply_tiles(int64_t steps) {
  struct alignas(64) {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16};
  } shapes;
  asm volatile("ldtilecfg %0" : : "m"(shapes));
  for (int64_t i = 0; i < steps; ++i) {
    asm volatile("tdpbf16ps %tmm5, %tmm4, %tmm0\n tdpbf16ps %tmm5, %tmm4, %tmm1\n"
                 "tdpbf16ps %tmm5, %tmm4, %tmm2\n tdpbf16ps %tmm5, %tmm4, %tmm3");
  }
  asm volatile("tilerelease");
}
#endif

}  // namespace

extern "C" {

// Multiplying instructions of a thread a second, with `threads` of them at once: of fp32, of pairs of bf16, of tiles of bf16, by
// `kind`; 0 where there are none.
double multiplications(int32_t kind, int32_t threads, int64_t steps) {
  const double start = omp_get_wtime();
  if (kind == 0) {
#pragma omp parallel num_threads(threads)
    multiply<product>(steps);
    return kChains * steps / (omp_get_wtime() - start);
  }
#ifdef __AVX512BF16__
  if (kind == 1) {
#pragma omp parallel num_threads(threads)
    multiply<pair_product>(steps);
    return kChains * steps / (omp_get_wtime() - start);
  }
#endif
#ifdef __AMX_BF16__
  if (kind == 2 && syscall(SYS_arch_prctl, 0x1023, 18) == 0) {  // Linux lends tiles where they are asked for
#pragma omp parallel num_threads(threads)
    multiply_tiles(steps);
    return kTileChains * steps / (omp_get_wtime() - start);
  }
#endif
  return 0;
}

// Bytes a thread reads a second, `passes` times over `bytes` of its own; `from` holds threads * bytes.
double reads(const char* from, int64_t bytes, int32_t threads, int64_t passes) {
  const double start = omp_get_wtime();
#pragma omp parallel num_threads(threads)
  {
    const char* mine = from + omp_get_thread_num() * bytes;
    __m512i seen[4] = {};
    for (int64_t pass = 0; pass < passes; ++pass) {
      for (int64_t i = 0; i < bytes; i += 256) {
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) seen[j] = _mm512_xor_si512(seen[j], _mm512_loadu_si512(mine + i + 64 * j));
      }
      asm volatile("" : "+v"(seen[0]), "+v"(seen[1]), "+v"(seen[2]), "+v"(seen[3]) : : "memory");
    }
  }
  return bytes * passes / (omp_get_wtime() - start);
}

// Bytes a thread copies a second, from `from` to `to`, `passes` times; counted once.
double copies(const char* from, char* to, int64_t bytes, int32_t threads, int64_t passes) {
  const double start = omp_get_wtime();
#pragma omp parallel num_threads(threads)
  {
    const int64_t first = omp_get_thread_num() * bytes;
    for (int64_t pass = 0; pass < passes; ++pass) {
      for (int64_t i = first; i < first + bytes; i += 64) _mm512_storeu_si512(to + i, _mm512_loadu_si512(from + i));
      asm volatile("" : : : "memory");
    }
  }
  return bytes * passes / (omp_get_wtime() - start);
}

}
