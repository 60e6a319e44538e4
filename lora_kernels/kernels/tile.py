"""Device functions that all kernels share: tile order, tile loads and stores, the LoRA term, the dropout mask."""

import triton
import triton.language as tl


@triton.jit
def grouped_tile(tile, tiles_m, tiles_n, GROUP_M: tl.constexpr):
    """Row and column of a tile in groups of GROUP_M rows, so that neighbours in time share x and w in L2."""
    first_m = tile // (GROUP_M * tiles_n) * GROUP_M
    group_m = min(tiles_m - first_m, GROUP_M)
    within = tile % (GROUP_M * tiles_n)
    return first_m + within % group_m, within // group_m


@triton.jit
def load_tile(src, row, col, rows, cols, stride, BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr, TMA: tl.constexpr):
    """`[BLOCK_ROWS, BLOCK_COLS]` of a row-major matrix (a TMA descriptor or a pointer), zero outside it."""
    if TMA:
        return src.load([row, col])
    else:
        offs_row = row + tl.arange(0, BLOCK_ROWS)
        offs_col = col + tl.arange(0, BLOCK_COLS)
        mask = (offs_row < rows)[:, None] & (offs_col < cols)[None, :]
        return tl.load(src + offs_row.to(tl.int64)[:, None] * stride + offs_col[None, :], mask=mask, other=0.0)


@triton.jit
def load_weight(
    w, n, k, N, K, stride, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, KN: tl.constexpr, TMA: tl.constexpr
):
    """`[BLOCK_K, BLOCK_N]` of a weight stored as `[N, K]`, or as `[K, N]` where KN."""
    if KN:
        return load_tile(w, k, n, K, N, stride, BLOCK_K, BLOCK_N, TMA)
    else:
        return load_tile(w, n, k, N, K, stride, BLOCK_N, BLOCK_K, TMA).T


@triton.jit
def load_strided(src, row, col, rows, cols, stride_row, stride_col, BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr):
    """`[BLOCK_ROWS, BLOCK_COLS]` of a small matrix with any strides, zero outside it."""
    offs_row = row + tl.arange(0, BLOCK_ROWS)
    offs_col = col + tl.arange(0, BLOCK_COLS)
    mask = (offs_row < rows)[:, None] & (offs_col < cols)[None, :]
    offs = offs_row.to(tl.int64)[:, None] * stride_row + offs_col.to(tl.int64)[None, :] * stride_col
    return tl.load(src + offs, mask=mask, other=0.0)


@triton.jit
def load_rows(h, m, r, M, R, BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr):
    """`[BLOCK_M, BLOCK_R]` of a contiguous `h [M, R]`, zero outside it; past L1, which may hold what was there before."""
    offs_m = m + tl.arange(0, BLOCK_M)
    offs_r = r + tl.arange(0, BLOCK_R)
    mask = (offs_m < M)[:, None] & (offs_r < R)[None, :]
    return tl.load(h + offs_m.to(tl.int64)[:, None] * R + offs_r[None, :], mask=mask, other=0.0, cache_modifier=".cg")


@triton.jit
def store_rows(h, tile, m, r, M, R, BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr):
    """Write `tile [BLOCK_M, BLOCK_R]` into a contiguous `h [M, R]`, rounding once to its dtype."""
    offs_m = m + tl.arange(0, BLOCK_M)
    offs_r = r + tl.arange(0, BLOCK_R)
    mask = (offs_m < M)[:, None] & (offs_r < R)[None, :]
    tl.store(h + offs_m.to(tl.int64)[:, None] * R + offs_r[None, :], tile.to(h.dtype.element_ty), mask=mask)


@triton.jit
def lora_term(
    acc, h, b, m, n, M, N, R, stride_br, stride_bn,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr, RANK_BLOCKS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`acc [BLOCK_M, BLOCK_N] + h b`, for `h [M, R]` and `b` addressed as `[R, N]`."""
    for i in tl.range(RANK_BLOCKS, num_stages=1):  # one stage: the main loop has spent the shared memory
        h_tile = load_rows(h, m, i * BLOCK_R, M, R, BLOCK_M, BLOCK_R)
        b_tile = load_strided(b, i * BLOCK_R, n, R, N, stride_br, stride_bn, BLOCK_R, BLOCK_N)
        acc = tl.dot(h_tile, b_tile, acc, input_precision=PRECISION, out_dtype=acc.dtype)
    return acc


@triton.jit
def store_tile(
    y, acc, bias, m, n, M, N, stride_ym,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HALVES: tl.constexpr, HAS_BIAS: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Add the bias and write `acc [BLOCK_M, BLOCK_N]` into a row-major `y [M, N]`, rounding once to its dtype.

    With HALVES the left and the right half go one after the other, which halves the shared memory that staging takes.
    """
    if HALVES:
        HALF_N: tl.constexpr = BLOCK_N // 2
        left, right = tl.split(tl.permute(tl.reshape(acc, (BLOCK_M, 2, HALF_N)), (0, 2, 1)))
        store_tile(y, left, bias, m, n, M, N, stride_ym, BLOCK_M, HALF_N, False, HAS_BIAS, TMA)
        store_tile(y, right, bias, m, n + HALF_N, M, N, stride_ym, BLOCK_M, HALF_N, False, HAS_BIAS, TMA)
    else:
        offs_n = n + tl.arange(0, BLOCK_N)
        if HAS_BIAS:
            acc += tl.load(bias + offs_n, mask=offs_n < N, other=0.0).to(acc.dtype)[None, :]
        if TMA:
            y.store([m, n], acc.to(y.dtype))
        else:
            offs_m = m + tl.arange(0, BLOCK_M)
            mask = (offs_m < M)[:, None] & (offs_n < N)[None, :]
            offs = offs_m.to(tl.int64)[:, None] * stride_ym + offs_n[None, :]
            tl.store(y + offs, acc.to(y.dtype.element_ty), mask=mask)


@triton.jit
def keep_tile(seed, row, col, threshold, BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr):
    """The dropout mask of `reference.dropout_keep` for a tile: one Philox call for eight neighbouring columns."""
    offs_row = row + tl.arange(0, BLOCK_ROWS)
    offs_eight = col // 8 + tl.arange(0, BLOCK_COLS // 8)
    zero = tl.zeros((BLOCK_ROWS, BLOCK_COLS // 8), tl.int32)
    w0, w1, w2, w3 = tl.philox(seed, offs_row[:, None] + zero, offs_eight[None, :] + zero, zero, zero, n_rounds=7)
    words = tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), (BLOCK_ROWS, BLOCK_COLS // 2))
    lanes = tl.reshape(tl.join(words & 0xFFFF, words >> 16), (BLOCK_ROWS, BLOCK_COLS))
    return lanes < threshold


@triton.jit
def drop(tile, seed, row, col, threshold, BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr):
    """The tile with its dropped elements zeroed; `1 / (1 - p)` is applied to the sum instead, in its precision."""
    return tl.where(keep_tile(seed, row, col, threshold, BLOCK_ROWS, BLOCK_COLS), tile, 0.0)
