"""The adapter's gradients, `da = gᵀ drop(x)` and `db = dyᵀ h`: sums over M, in chunks that are added in fixed order.

No atomics: every partial has its own place, and `shrink.sum_planes_kernel` adds them in order.
"""

import triton
import triton.language as tl

from lora_kernels.kernels.tile import drop, load_rows, load_strided, load_tile, store_rows


@triton.jit
def wgrad_kernel(
    wide, narrow, out, seed, threshold, keep_scale, M, C, R, CHUNK, stride_wide, stride_oc, stride_or,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr, DROPOUT: tl.constexpr, ACC: tl.constexpr,
    PRECISION: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Planes of `out [C,R] = wideᵀ narrow` over CHUNK rows each, for `wide [M,C]` (x or dy) and `narrow [M,R]` (g or h)."""
    c, r, part = tl.program_id(0) * BLOCK_C, tl.program_id(1) * BLOCK_R, tl.program_id(2)
    if DROPOUT:
        key = tl.load(seed)
    acc = tl.zeros((BLOCK_C, BLOCK_R), ACC)
    for i in range(tl.maximum(tl.cdiv(CHUNK, BLOCK_M), 1)):
        m = part * CHUNK + i * BLOCK_M
        wide_tile = load_tile(wide, m, c, M, C, stride_wide, BLOCK_M, BLOCK_C, TMA)
        if DROPOUT:
            wide_tile = drop(wide_tile, key, m, c, threshold, BLOCK_M, BLOCK_C)
        narrow_tile = load_rows(narrow, m, r, M, R, BLOCK_M, BLOCK_R)
        acc = tl.dot(wide_tile.T, narrow_tile, acc, input_precision=PRECISION, out_dtype=ACC)
    if DROPOUT:
        acc *= keep_scale
    offs_c = c + tl.arange(0, BLOCK_C)
    offs_r = r + tl.arange(0, BLOCK_R)
    mask = (offs_c < C)[:, None] & (offs_r < R)[None, :]
    offs = part.to(tl.int64) * C * R + offs_c[:, None] * stride_oc + offs_r[None, :] * stride_or
    tl.store(out + offs, acc.to(out.dtype.element_ty), mask=mask)


@triton.jit
def dy_pass_kernel(
    dy, b, h, g_planes, db_planes, M, N, R, CHUNK, stride_dym, stride_bn, stride_br,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Both products that read dy, in one pass: planes of `g = dy b` per column block, and of `db = dyᵀ h` per chunk."""
    n, part = tl.program_id(0) * BLOCK_N, tl.program_id(1)
    b_tile = load_strided(b, n, 0, N, R, stride_bn, stride_br, BLOCK_N, BLOCK_R)
    db = tl.zeros((BLOCK_N, BLOCK_R), ACC)
    g_plane = g_planes + tl.program_id(0).to(tl.int64) * M * R
    for i in range(tl.maximum(tl.cdiv(CHUNK, BLOCK_M), 1)):
        m = part * CHUNK + i * BLOCK_M
        dy_tile = load_tile(dy, m, n, M, N, stride_dym, BLOCK_M, BLOCK_N, TMA)
        h_tile = load_rows(h, m, 0, M, R, BLOCK_M, BLOCK_R)
        db = tl.dot(dy_tile.T, h_tile, db, input_precision=PRECISION, out_dtype=ACC)
        g = tl.dot(dy_tile, b_tile, input_precision=PRECISION, out_dtype=ACC)
        store_rows(g_plane, g, m, 0, M, R, BLOCK_M, BLOCK_R)
    store_rows(db_planes + part.to(tl.int64) * N * R, db, n, 0, N, R, BLOCK_N, BLOCK_R)
