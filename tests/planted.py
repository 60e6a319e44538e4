"""GEMM kernels for the static gate: two that are right, and the same with one planted defect each.

All compute `y [M,N] = x [M,K] w [N,K]ᵀ`. They are compiled, never run.
"""

import triton
import triton.language as tl


@triton.jit
def descriptor_gemm(x, w, y, K, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    m0, n0 = tl.program_id(0) * BLOCK_M, tl.program_id(1) * BLOCK_N
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(tl.maximum(tl.cdiv(K, BLOCK_K), 1)):
        acc = tl.dot(x.load([m0, k * BLOCK_K]), w.load([n0, k * BLOCK_K]).T, acc)
    y.store([m0, n0], acc.to(y.dtype))


@triton.jit
def pointer_gemm(
    x,
    w,
    y,
    K,
    stride_xm,
    stride_wn,
    stride_ym,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    _pointer_gemm(x, w, y, K, stride_xm, stride_wn, stride_ym, BLOCK_M, BLOCK_N, BLOCK_K)


@triton.jit
def _pointer_gemm(x, w, y, K, stride_xm, stride_wn, stride_ym, BLOCK_M, BLOCK_N, BLOCK_K):
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for i in range(tl.maximum(tl.cdiv(K, BLOCK_K), 1)):
        k = i * BLOCK_K + offs_k
        x_tile = tl.load(x + offs_m * stride_xm + k[None, :], mask=k[None, :] < K, other=0.0)
        w_tile = tl.load(w + offs_n[None, :] * stride_wn + k[:, None], mask=k[:, None] < K, other=0.0)
        acc = tl.dot(x_tile, w_tile, acc)
    tl.store(y + offs_m * stride_ym + offs_n[None, :], acc.to(y.dtype.element_ty))


@triton.jit(do_not_specialize_on_alignment=["K", "stride_xm", "stride_wn", "stride_ym"])
def unknown_alignment(
    x,
    w,
    y,
    K,
    stride_xm,
    stride_wn,
    stride_ym,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The compiler may not assume that a row starts at a multiple of 16 bytes."""
    _pointer_gemm(x, w, y, K, stride_xm, stride_wn, stride_ym, BLOCK_M, BLOCK_N, BLOCK_K)


@triton.jit
def zero_trip_loop(x, w, y, K, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """K may be 0 as far as the compiler knows, so the accumulator is written inside the wgmma stage."""
    m0, n0 = tl.program_id(0) * BLOCK_M, tl.program_id(1) * BLOCK_N
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(tl.cdiv(K, BLOCK_K)):
        acc = tl.dot(x.load([m0, k * BLOCK_K]), w.load([n0, k * BLOCK_K]).T, acc)
    y.store([m0, n0], acc.to(y.dtype))


@triton.jit
def chosen_descriptor(x, w, h, b, y, K, R, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """The K loop goes on over h [M,R] and b [N,R], behind an if/else that the pipeliner does not see through."""
    m0, n0 = tl.program_id(0) * BLOCK_M, tl.program_id(1) * BLOCK_N
    k_tiles = tl.maximum(tl.cdiv(K, BLOCK_K), 1)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(k_tiles + tl.cdiv(R, BLOCK_K)):
        if k < k_tiles:
            x_tile, w_tile = x.load([m0, k * BLOCK_K]), w.load([n0, k * BLOCK_K])
        else:
            x_tile, w_tile = h.load([m0, (k - k_tiles) * BLOCK_K]), b.load([n0, (k - k_tiles) * BLOCK_K])
        acc = tl.dot(x_tile, w_tile.T, acc)
    y.store([m0, n0], acc.to(y.dtype))


@triton.jit
def warp_specialised(x, w, y, M, N, K, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """With host descriptors the box stays BLOCK_M rows high while each consumer's buffer gets half of them."""
    n_tiles = tl.cdiv(N, BLOCK_N)
    for tile in tl.range(tl.program_id(0), tl.cdiv(M, BLOCK_M) * n_tiles, tl.num_programs(0), warp_specialize=True):
        m0, n0 = tile // n_tiles * BLOCK_M, tile % n_tiles * BLOCK_N
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for k in range(tl.maximum(tl.cdiv(K, BLOCK_K), 1)):
            acc = tl.dot(x.load([m0, k * BLOCK_K]), w.load([n0, k * BLOCK_K]).T, acc)
        offs_m, offs_n = m0 + tl.arange(0, BLOCK_M), n0 + tl.arange(0, BLOCK_N)
        tl.store(y + offs_m[:, None] * N + offs_n[None, :], acc.to(y.dtype.element_ty))


@triton.jit
def double_precision(x, w, y, K, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """An epilogue in fp64, as an unannotated float64 scalar would cause."""
    m0, n0 = tl.program_id(0) * BLOCK_M, tl.program_id(1) * BLOCK_N
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(tl.maximum(tl.cdiv(K, BLOCK_K), 1)):
        acc = tl.dot(x.load([m0, k * BLOCK_K]), w.load([n0, k * BLOCK_K]).T, acc)
    y.store([m0, n0], (acc.to(tl.float64) * 0.5).to(y.dtype))
