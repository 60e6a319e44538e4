// Memory for packed operands, which a thread keeps for its next call: pages that the system gives anew take longer to be
// mapped than to be filled.
#pragma once
#include <stdint.h>

namespace scratch {
float* take(int64_t floats);  // at a multiple of 64 bytes; null where there is no memory
void give_back();             // what was taken last
}

namespace {

struct Scratch {
  float* const at;
  explicit Scratch(int64_t floats) : at(scratch::take(floats)) {}
  Scratch(const Scratch&) = delete;
  ~Scratch() { scratch::give_back(); }
  operator float*() const { return at; }
};

}  // namespace
