"""`h = scaling drop(x) Aᵀ`, the narrow product of the forward pass, and `g = scaling dy B`, that of the backward pass.

Both stream a wide matrix once and are bound by memory. Also here: the fixed-order sum of split partials, and the dropout
mask applied in place (for strategies whose GEMM is not ours).
"""

import triton
import triton.language as tl

from lora_kernels.kernels.tile import drop, load_strided, load_tile, store_rows


@triton.jit
def shrink_kernel(
    x, a, h, seed, scaling, threshold, keep_scale, M, K, R, stride_xm, stride_ar, stride_ak,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, SPLIT: tl.constexpr,
    DROPOUT: tl.constexpr, SCALING_ON_DEVICE: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """`h [M,R]`, or with SPLIT > 1 the partial sums `h [SPLIT,M,R]`, unscaled, of interleaved K blocks."""
    m = tl.program_id(0) * BLOCK_M
    r = tl.program_id(1) * BLOCK_R
    part = tl.program_id(2)
    if DROPOUT:
        key = tl.load(seed)  # here, or the pipeliner copies it in every iteration (sm_100)
    acc = tl.zeros((BLOCK_M, BLOCK_R), ACC)
    for i in range(tl.maximum(tl.cdiv(K, BLOCK_K * SPLIT), 1)):  # a zero-trip loop would serialise the MMAs
        k = (i * SPLIT + part) * BLOCK_K
        x_tile = load_tile(x, m, k, M, K, stride_xm, BLOCK_M, BLOCK_K, TMA)
        if DROPOUT:
            x_tile = drop(x_tile, key, m, k, threshold, BLOCK_M, BLOCK_K)
        a_tile = load_strided(a, k, r, K, R, stride_ak, stride_ar, BLOCK_K, BLOCK_R)
        acc = tl.dot(x_tile, a_tile, acc, input_precision=PRECISION, out_dtype=ACC)
    if DROPOUT:
        acc *= keep_scale
    if SPLIT == 1:
        acc *= tl.load(scaling).to(ACC) if SCALING_ON_DEVICE else scaling
    store_rows(h + part.to(tl.int64) * M * R, acc, m, r, M, R, BLOCK_M, BLOCK_R)


@triton.jit
def sum_planes_kernel(
    planes, out, scaling, SIZE, PLANES, BLOCK: tl.constexpr, SCALING_ON_DEVICE: tl.constexpr, ACC: tl.constexpr
):
    """`out [SIZE] = scaling Σ planes [PLANES, SIZE]`, added in the order of the planes: the same bits every time."""
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    acc = tl.zeros((BLOCK,), ACC)
    for _ in range(PLANES):
        acc += tl.load(planes + offs, mask=offs < SIZE, other=0.0)
        planes += SIZE
    acc *= tl.load(scaling).to(ACC) if SCALING_ON_DEVICE else scaling
    tl.store(out + offs, acc.to(out.dtype.element_ty), mask=offs < SIZE)


@triton.jit
def drop_kernel(
    x, seed, threshold, keep_scale, M, K, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, ACC: tl.constexpr
):  # fmt: skip
    """Apply dropout to a contiguous `x [M,K]` in place."""
    m, k = tl.program_id(0) * BLOCK_M, tl.program_id(1) * BLOCK_K
    x_tile = load_tile(x, m, k, M, K, K, BLOCK_M, BLOCK_K, TMA=False)
    x_tile = drop(x_tile, tl.load(seed), m, k, threshold, BLOCK_M, BLOCK_K).to(ACC) * keep_scale
    store_rows(x, x_tile, m, k, M, K, BLOCK_M, BLOCK_K)
