// Blocks of threads on a CPU, as unkind as a GPU may be: what csrc/cuda/device.h offers, for g++.
//
// A thread is a fiber that runs until it waits. Several blocks are under way at once; who goes on is drawn, and in every other
// launch one warp gets as far ahead of the others as it can. Warps meet at their instructions, blocks at barriers; whoever is
// missing makes a deadlock, which is reported. Shared memory begins as NaN. An asynchronous copy happens at once or when it
// is waited for, as drawn. What is published is seen by other blocks only after a barrier and an arrival, or at the end.
// Operands are read only where emulator_allow says that there is something.
#pragma once
#include <setjmp.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>

#include <string>
#include <vector>

#define DEVICE inline
#define CONSTANT static const
#define __global__ static
#define __grid_constant__
#define __launch_bounds__(...)

struct float2 {
  float x, y;
};

namespace emulator {

struct Copy {
  void* to;
  const void* from;
  size_t bytes;
  bool live;
  void run() const { live ? memcpy(to, from, bytes) : memset(to, 0, bytes); }
};

struct Store {
  float* to;
  float value;
};

enum class State { fresh, ready, at_barrier, at_warp, done };

struct Block;

struct Fiber {
  ucontext_t entry;
  jmp_buf place;  // swapcontext would ask the system at each switch
  char* stack;
  Block* block;
  int thread;
  State state;
  const char* instruction;                // at which the lanes of its warp shall meet
  void* operands;
  std::vector<std::vector<Copy>> copies;  // in groups; the last one is open
  std::vector<Store> stores;              // that nobody else sees yet
};

struct Block {
  int index;
  char* shared;
  std::vector<Fiber> fibers;
  std::vector<Store> stores;  // of all its threads, before the last barrier
  int leader;                 // the warp that goes first
};

struct Range {
  const char *begin, *end;
};

inline uint64_t seed;
inline jmp_buf scheduler;
inline Fiber* self;
inline std::string fault;
inline std::vector<Range> allowed;
inline bool leads;
inline void (*body)(const void*);
inline const void* arguments;
inline int shared_bytes;  // of the latest launch
inline constexpr size_t kStack = 1 << 16, kCanary = 64;

inline uint64_t draw() {  // splitmix64
  uint64_t z = seed += 0x9e3779b97f4a7c15;
  z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9;
  z = (z ^ z >> 27) * 0x94d049bb133111eb;
  return z ^ z >> 31;
}

inline void leave() {
  if (!_setjmp(self->place)) _longjmp(scheduler, 1);
}

inline void enter(Fiber& fiber) {
  self = &fiber;
  if (_setjmp(scheduler)) return;
  if (fiber.state != State::fresh) _longjmp(fiber.place, 1);
  fiber.state = State::ready;
  setcontext(&fiber.entry);
}

[[noreturn]] inline void fail(const std::string& what) {
  fault = "block " + std::to_string(self->block->index) + ", thread " + std::to_string(self->thread) + ": " + what;
  leave();
  __builtin_unreachable();
}

inline void aligned(const void* address, size_t size, const char* what) {
  if (reinterpret_cast<uintptr_t>(address) % size) fail(std::string(what) + " is not on its boundary");
}

inline void within(const void* address, size_t size) {
  const char* begin = static_cast<const char*>(address);
  for (const Range& range : allowed)
    if (range.begin <= begin && begin + size <= range.end) return;
  fail("a read outside of the operands");
}

inline void flush(std::vector<Store>& stores) {
  for (const Store& store : stores) *store.to = store.value;
  stores.clear();
}

// All lanes of a warp come to the same instruction; the last one carries it out for all, on what each brought.
template <class Operands, class Action>
void meet(const char* instruction, Operands& operands, Action action) {
  Fiber* const first = &self->block->fibers[self->thread / 32 * 32];
  self->state = State::at_warp;
  self->instruction = instruction;
  self->operands = &operands;
  for (Fiber* lane = first; lane < first + 32; ++lane)
    if (lane->state != State::at_warp) return leave();
  Operands* all[32];
  for (int i = 0; i < 32; ++i) {
    if (strcmp(first[i].instruction, instruction)) fail("lanes of a warp meet at different instructions");
    all[i] = static_cast<Operands*>(first[i].operands);
    first[i].state = State::ready;
  }
  action(all);
}

inline void start() {
  body(arguments);
  self->state = State::done;
  leave();
}

inline void begin(Block& block, int index, int threads, int shared_bytes, std::vector<char*>& stacks) {
  block.index = index;
  block.shared = static_cast<char*>(aligned_alloc(128, (shared_bytes + kCanary + 127) / 128 * 128));
  memset(block.shared, 0xff, shared_bytes + kCanary);
  block.fibers.resize(threads);
  for (int i = 0; i < threads; ++i) {
    Fiber& fiber = block.fibers[i];
    if (stacks.empty()) stacks.push_back(static_cast<char*>(malloc(kStack)));
    fiber.stack = stacks.back();
    stacks.pop_back();
    fiber.block = &block;
    fiber.thread = i;
    fiber.state = State::fresh;
    fiber.copies.assign(1, {});
    getcontext(&fiber.entry);
    fiber.entry.uc_stack.ss_sp = fiber.stack;
    fiber.entry.uc_stack.ss_size = kStack;
    makecontext(&fiber.entry, start, 0);
  }
}

// One thread goes on until it waits; false where all of the block are done.
inline bool step(Block& block) {
  std::vector<Fiber*> ready;
  size_t done = 0;
  for (Fiber& fiber : block.fibers) {
    if (fiber.state <= State::ready) ready.push_back(&fiber);
    done += fiber.state == State::done;
  }
  if (done == block.fibers.size()) return false;
  if (ready.empty()) {
    for (Fiber& fiber : block.fibers)
      if (fiber.state == State::at_barrier) ready.push_back(&fiber);
    if (ready.size() + done < block.fibers.size() || done) {
      fault = "block " + std::to_string(block.index) + ": deadlock, some threads are at a barrier or a warp's instruction";
      return false;
    }
    for (Fiber& fiber : block.fibers) {
      block.stores.insert(block.stores.end(), fiber.stores.begin(), fiber.stores.end());
      fiber.stores.clear();
      fiber.state = State::ready;
    }
  }
  if (done == 0 && ready.size() == block.fibers.size()) block.leader = draw() % (block.fibers.size() / 32);
  const size_t any = draw() % ready.size();
  Fiber* next = ready[any];
  for (size_t i = 0; leads && i < ready.size(); ++i) {
    Fiber* other = ready[(any + i) % ready.size()];
    if (other->thread / 32 == block.leader) {
      next = other;
      break;
    }
  }
  enter(*next);
  return true;
}

inline void run(int blocks, int threads, int shared_bytes) {
  std::vector<int> order(blocks);
  for (int i = 0; i < blocks; ++i) order[i] = i;
  for (int i = blocks - 1; i > 0; --i) std::swap(order[i], order[draw() % (i + 1)]);
  static std::vector<char*> stacks;
  std::vector<Store> late;
  std::vector<Block*> resident;
  const size_t most = 1 + draw() % 4;
  for (int next = 0; fault.empty() && (next < blocks || !resident.empty());) {
    if (next < blocks && resident.size() < most) {
      resident.push_back(new Block);
      begin(*resident.back(), order[next++], threads, shared_bytes, stacks);
    }
    const size_t i = draw() % resident.size();
    Block& block = *resident[i];
    if (step(block) || !fault.empty()) continue;
    for (Fiber& fiber : block.fibers) {
      block.stores.insert(block.stores.end(), fiber.stores.begin(), fiber.stores.end());
      stacks.push_back(fiber.stack);
    }
    late.insert(late.end(), block.stores.begin(), block.stores.end());
    for (size_t c = 0; c < kCanary; ++c)
      if (block.shared[shared_bytes + c] != char(0xff)) fault = "a store past the end of shared memory";
    free(block.shared);
    delete &block;
    resident.erase(resident.begin() + i);
  }
  flush(late);
}

}  // namespace emulator

DEVICE int thread() { return emulator::self->thread; }
DEVICE int block() { return emulator::self->block->index; }
DEVICE char* shared_memory() { return emulator::self->block->shared; }

DEVICE void barrier() {
  emulator::self->state = emulator::State::at_barrier;
  emulator::leave();
}

DEVICE void warp_barrier() {
  int nothing = 0;
  emulator::meet("warp_barrier", nothing, [](int* const*) {});
}

DEVICE unsigned votes(bool vote) {
  struct Operands {
    bool vote;
    unsigned all;
  } operands{vote, 0};
  emulator::meet("votes", operands, [](Operands* const* lanes) {
    for (int i = 0; i < 32; ++i)
      for (int j = 0; j < 32; ++j) lanes[i]->all |= unsigned{lanes[j]->vote} << j;
  });
  return operands.all;
}

template <class T>
DEVICE void copy_async(T* shared, const void* global, bool live) {
  emulator::aligned(shared, sizeof(T), "the target of a copy");
  if (live) emulator::aligned(global, sizeof(T), "the source of a copy"), emulator::within(global, sizeof(T));
  const emulator::Copy copy{shared, global, sizeof(T), live};
  emulator::draw() % 2 ? copy.run() : emulator::self->copies.back().push_back(copy);
}
template <class T>
DEVICE T read(const T* from) {
  emulator::within(from, sizeof *from);
  return *from;
}
DEVICE void copy_commit() { emulator::self->copies.push_back({}); }
template <int kPending>
DEVICE void copy_wait() {
  auto& copies = emulator::self->copies;
  while (copies.size() > kPending + 1) {
    for (const emulator::Copy& copy : copies.front()) copy.run();
    copies.erase(copies.begin());
  }
}

template <bool kTransposed>
DEVICE void load_matrices(uint32_t (&to)[4], const void* row) {
  emulator::aligned(row, 16, "a row of a matrix");
  struct Operands {
    uint32_t* to;
    const uint16_t* row;
  } operands{to, static_cast<const uint16_t*>(row)};
  emulator::meet("load_matrices", operands, [](Operands* const* lanes) {
    for (int i = 0; i < 32; ++i)
      for (int matrix = 0; matrix < 4; ++matrix) {
        const int g = i / 4, t = i % 4 * 2;
        auto element = [&](int r, int c) { return uint32_t{lanes[8 * matrix + r]->row[c]}; };
        lanes[i]->to[matrix] = kTransposed ? element(t, g) | element(t + 1, g) << 16 : element(g, t) | element(g, t + 1) << 16;
      }
  });
}

DEVICE float widen(bf16 value) {
  const uint32_t bits = uint32_t{value.bits} << 16;
  float wide;
  memcpy(&wide, &bits, 4);
  return wide;
}
DEVICE float widen(fp16 value) {
  _Float16 narrow;
  memcpy(&narrow, &value, 2);
  return narrow;
}

DEVICE uint16_t narrow(float value, bf16) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  if (value != value) return 0x7fff;
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
DEVICE uint16_t narrow(float value, fp16) {
  const _Float16 rounded = static_cast<_Float16>(value);
  uint16_t bits;
  memcpy(&bits, &rounded, 2);
  return bits;
}
template <class T>
DEVICE uint32_t pack(float low, float high) {
  return narrow(low, T{}) | uint32_t{narrow(high, T{})} << 16;
}

template <class T>
DEVICE void mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  struct Operands {
    float* c;
    const uint32_t *a, *b;
  } operands{c, a, b};
  emulator::meet("mma", operands, [](Operands* const* lanes) {
    auto value = [](uint32_t pair, int which) { return widen(T{static_cast<uint16_t>(pair >> (16 * which))}); };
    float a[16][16], b[16][8];
    for (int i = 0; i < 32; ++i) {
      const int g = i / 4, t = i % 4 * 2;
      for (int w = 0; w < 2; ++w) {
        for (int j = 0; j < 4; ++j) a[g + j % 2 * 8][t + w + j / 2 * 8] = value(lanes[i]->a[j], w);
        for (int j = 0; j < 2; ++j) b[t + w + j * 8][g] = value(lanes[i]->b[j], w);
      }
    }
    for (int i = 0; i < 32; ++i)
      for (int j = 0; j < 4; ++j) {
        const int row = i / 4 + j / 2 * 8, column = i % 4 * 2 + j % 2;
        for (int k = 0; k < 16; ++k) lanes[i]->c[j] += a[row][k] * b[k][column];
      }
  });
}

DEVICE void publish(float* to, float value) {
  emulator::aligned(to, 4, "what is published");
  emulator::self->stores.push_back({to, value});
}
DEVICE float2 read_published(const float* from) {
  emulator::aligned(from, 8, "what is read");
  return {from[0], from[1]};
}

// Only this: no order with any other access.
DEVICE int add_relaxed(int* counter, int amount) {
  emulator::leave();  // another block may come first
  const int before = *counter;
  *counter += amount;
  return before;
}
DEVICE int arrive(int* counter, int amount) {
  emulator::flush(emulator::self->stores);
  emulator::flush(emulator::self->block->stores);
  return add_relaxed(counter, amount);
}
DEVICE void reset(int* counter) { *counter = 0; }

template <class Args>
const char* launch(void (*kernel)(Args), int blocks, int threads, int shared_bytes, int, void*, const Args& args) {
  static void (*entry)(Args);
  entry = kernel;
  emulator::fault.clear();
  emulator::shared_bytes = shared_bytes;
  emulator::body = [](const void* args) { entry(*static_cast<const Args*>(args)); };
  emulator::arguments = &args;
  emulator::leads = emulator::draw() % 2;
  emulator::run(blocks, threads, shared_bytes);
  emulator::allowed.clear();
  return emulator::fault.empty() ? nullptr : emulator::fault.c_str();
}

#define EMULATOR_EXPORT extern "C" __attribute__((used, visibility("default"))) inline

// The order of everything in the launches from here on.
EMULATOR_EXPORT void emulator_seed(uint64_t seed) { emulator::seed = seed; }

// What the next launch may read as an operand, beside what was allowed before.
EMULATOR_EXPORT void emulator_allow(const void* begin, uint64_t bytes) {
  emulator::allowed.push_back({static_cast<const char*>(begin), static_cast<const char*>(begin) + bytes});
}

// Of shared memory in the latest launch.
EMULATOR_EXPORT int emulator_shared_bytes() { return emulator::shared_bytes; }
