// What the kernels use of a GPU, one function an instruction. The same names for g++ are in tests/emulator/emulator.h: what a
// kernel does beside them has to be plain C++.
#pragma once
#include <stdint.h>

struct alignas(16) Chunk {  // what a thread copies at once
  uint32_t word[4];
};
struct bf16 {
  uint16_t bits;
};
struct fp16 {
  uint16_t bits;
};

#ifndef __CUDACC__
#include "emulator.h"
#else

#define DEVICE __device__ __forceinline__
#define CONSTANT __constant__ const

DEVICE int thread() { return threadIdx.x; }
DEVICE int block() { return blockIdx.x; }
DEVICE void barrier() { __syncthreads(); }
DEVICE void warp_barrier() { __syncwarp(); }
DEVICE unsigned votes(bool vote) { return __ballot_sync(~0u, vote); }

DEVICE char* shared_memory() {
  extern __shared__ Chunk shared[];
  return reinterpret_cast<char*>(shared);
}

DEVICE uint32_t shared_address(const void* shared) { return static_cast<uint32_t>(__cvta_generic_to_shared(shared)); }

template <class T>
DEVICE T read(const T* from) {
  return *from;
}

// 16 bytes into shared memory past L1, later; zeros where not `live`. A group is what was begun since the last commit.
DEVICE void copy_async(Chunk* shared, const void* global, bool live) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global),
               "r"(live ? 16 : 0)
               : "memory");
}
DEVICE void copy_async(float* shared, const float* global, bool live) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(shared_address(shared)), "l"(global),
               "r"(live ? 4 : 0)
               : "memory");
}
DEVICE void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Until no more than the latest kPending groups of this thread are under way; other threads see the rest after a barrier.
template <int kPending>
DEVICE void copy_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// Four 8 x 8 matrices of 16 bits; lane l names row l % 8 of matrix l / 8, and gets elements (l / 4, 2 (l % 4)) and the next
// of each, or with kTransposed (2 (l % 4), l / 4) and the one below.
template <bool kTransposed>
DEVICE void load_matrices(uint32_t (&to)[4], const void* row) {
  if (kTransposed)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(shared_address(row))
                 : "memory");
  else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(shared_address(row))
                 : "memory");
}

// c [16, 8] += a [16, 16] b [16, 8] by the tensor cores of a warp, in fp32. Of lane l, with g = l / 4 and t = l % 4:
// a holds (g, 2t), (g + 8, 2t), (g, 2t + 8), (g + 8, 2t + 8), and the column after each; b (2t, g), (2t + 8, g), and the row
// after each; c (g, 2t), (g, 2t + 1), (g + 8, 2t), (g + 8, 2t + 1).
template <class T>
DEVICE void mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);

#define DEFINE_MMA(T, NAME)                                                                              \
  template <>                                                                                            \
  DEVICE void mma<T>(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {                    \
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." NAME "." NAME                                  \
                 ".f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"                            \
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                                        \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));                    \
  }
DEFINE_MMA(bf16, "bf16")
DEFINE_MMA(fp16, "f16")
#undef DEFINE_MMA

DEVICE float widen(bf16 value) { return __uint_as_float(uint32_t{value.bits} << 16); }
DEVICE float widen(fp16 value) {
  float wide;
  asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(value.bits));
  return wide;
}

// Two values rounded to nearest even, `low` in the low half.
template <class T>
DEVICE uint32_t pack(float low, float high);
template <>
DEVICE uint32_t pack<bf16>(float low, float high) {
  uint32_t both;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
  return both;
}
template <>
DEVICE uint32_t pack<fp16>(float low, float high) {
  uint32_t both;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
  return both;
}

// What another block of this launch reads, or has written: past L1.
DEVICE void publish(float* to, float value) { *to = value; }
DEVICE float2 read_published(const float* from) { return __ldcg(reinterpret_cast<const float2*>(from)); }

// Adds to a counter, and returns what it was. What was published before a barrier ahead of this call is there for those who
// find this addition in the counter, and for all threads of theirs after a barrier.
DEVICE int arrive(int* counter, int amount) {
  int before;
  asm volatile("atom.add.acq_rel.gpu.global.s32 %0, [%1], %2;" : "=r"(before) : "l"(counter), "r"(amount) : "memory");
  return before;
}
DEVICE void reset(int* counter) { *counter = 0; }

// Returns the name of CUDA's error, or null.
template <class Args>
const char* launch(void (*kernel)(Args), int blocks, int threads, int shared_bytes, int device, void* stream,
                   const Args& args) {
  cudaError_t error = cudaSetDevice(device);
  if (!error) error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
  if (!error) {
    kernel<<<blocks, threads, shared_bytes, static_cast<cudaStream_t>(stream)>>>(args);
    error = cudaGetLastError();
  }
  return error ? cudaGetErrorName(error) : nullptr;
}

#endif
