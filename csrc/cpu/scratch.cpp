#include "scratch.h"
#include <stdlib.h>

namespace {

constexpr int kBlocks = 8;  // that a call takes at once

// In the order in which they are taken, so that like calls find what they need.
struct Blocks {
  float* at[kBlocks] = {};
  int64_t floats[kBlocks] = {};
  int taken = 0;
  ~Blocks() {
    for (float* block : at) free(block);
  }
};

thread_local Blocks blocks;

#ifdef __SANITIZE_ADDRESS__
constexpr bool kExact = true;  // the end of a block is then where it was asked to be
#else
constexpr bool kExact = false;
#endif

}  // namespace

namespace scratch {

float* take(int64_t floats) {
  const int i = blocks.taken++;
  if (i >= kBlocks) __builtin_trap();
  if (!blocks.at[i] || kExact || blocks.floats[i] < floats) {
    free(blocks.at[i]);
    blocks.at[i] = static_cast<float*>(aligned_alloc(64, (floats + 16) / 16 * 64));  // never of no bytes
    blocks.floats[i] = floats;
  }
  return blocks.at[i];
}

void give_back() { --blocks.taken; }

}  // namespace scratch
