// How threads share out work.
#pragma once
#include <omp.h>
#include "scalar.h"

namespace {

struct Share { int64_t begin, end; };

// The part of `count` for this thread, in multiples of `of`.
inline Share share(int64_t count, int64_t of) {
  const int64_t parts = ceiling(count, of), thread = omp_get_thread_num(), threads = omp_get_num_threads();
  return {parts * thread / threads * of, smaller(count, parts * (thread + 1) / threads * of)};
}

// Calls visit(first, count) for blocks of `step` in a share.
template <class Visit>
inline void each_block(Share share, int64_t step, Visit visit) {
  for (int64_t i = share.begin; i < share.end; i += step) visit(i, smaller(step, share.end - i));
}

}  // namespace
