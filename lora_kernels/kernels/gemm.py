"""The base GEMM with the LoRA term in its accumulator: the forward pass, and dX with transposed operands.

Written for the forward pass, `y [M,N] = x [M,K] w + h [M,R] b`, with `b` addressed as `[R,N]`. For dX the same kernels
read dy as x, the weight as stored `[contraction, output]` (KN), g as h and A as b.
"""

import triton
import triton.language as tl

from lora_kernels.kernels.tile import (
    drop,
    grouped_tile,
    load_rows,
    load_strided,
    load_tile,
    load_weight,
    lora_term,
    store_rows,
    store_tile,
)


@triton.jit
def extended_kernel(
    x, w, h, b, bias, y, seed, threshold, keep_scale, M, N, K, R, stride_xm, stride_w, stride_br, stride_bn, stride_ym,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, RANK_BLOCKS: tl.constexpr,
    GROUP_M: tl.constexpr, HALVES: tl.constexpr, LOAD: tl.constexpr, LAYOUT: tl.constexpr, DROPOUT: tl.constexpr,
    HAS_BIAS: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """`y = x w + drop(h b) + bias`, persistent; `h` was computed before. DROPOUT masks the LoRA term only, as dX needs."""
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0)):
        tile_m, tile_n = grouped_tile(tile, tiles_m, tiles_n, GROUP_M)
        m, n = tile_m * BLOCK_M, tile_n * BLOCK_N
        acc = tl.zeros((BLOCK_M, BLOCK_N), ACC)
        for i in range(tl.maximum(tl.cdiv(K, BLOCK_K), 1)):  # a zero-trip loop would serialise wgmma (ptxas C7515)
            x_tile = load_tile(x, m, i * BLOCK_K, M, K, stride_xm, BLOCK_M, BLOCK_K, TMA)
            w_tile = LOAD(w, n, i * BLOCK_K, N, K, stride_w, BLOCK_N, BLOCK_K, LAYOUT, TMA).to(x_tile.dtype)
            acc = tl.dot(x_tile, w_tile, acc, input_precision=PRECISION, out_dtype=ACC)
        if DROPOUT:
            zero = tl.zeros((BLOCK_M, BLOCK_N), ACC)
            term = lora_term(
                zero, h, b, m, n, M, N, R, stride_br, stride_bn, BLOCK_M, BLOCK_N, BLOCK_R, RANK_BLOCKS, PRECISION
            )
            acc += drop(term, tl.load(seed), m, n, threshold, BLOCK_M, BLOCK_N) * keep_scale
        else:
            acc = lora_term(
                acc, h, b, m, n, M, N, R, stride_br, stride_bn, BLOCK_M, BLOCK_N, BLOCK_R, RANK_BLOCKS, PRECISION
            )
        store_tile(y, acc, bias, m, n, M, N, stride_ym, BLOCK_M, BLOCK_N, HALVES, HAS_BIAS, TMA)


@triton.jit
def single_pass_kernel(
    x, w, a, b, bias, y, h, scaling, M, N, K, R, stride_xm, stride_w, stride_a, stride_br, stride_bn, stride_ym,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, GROUP_M: tl.constexpr,
    HALVES: tl.constexpr, KN: tl.constexpr, HAS_BIAS: tl.constexpr, SCALING_ON_DEVICE: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """`y = x w + h b + bias` with `h = scaling x aᵀ` from the same x tiles, in every tile; the first column writes h."""
    tile_m, tile_n = grouped_tile(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), GROUP_M)
    m, n = tile_m * BLOCK_M, tile_n * BLOCK_N
    acc = tl.zeros((BLOCK_M, BLOCK_N), ACC)
    h_acc = tl.zeros((BLOCK_M, BLOCK_R), ACC)
    for i in range(tl.maximum(tl.cdiv(K, BLOCK_K), 1)):
        x_tile = load_tile(x, m, i * BLOCK_K, M, K, stride_xm, BLOCK_M, BLOCK_K, TMA)
        w_tile = load_weight(w, n, i * BLOCK_K, N, K, stride_w, BLOCK_N, BLOCK_K, KN, TMA)
        a_tile = load_tile(a, 0, i * BLOCK_K, R, K, stride_a, BLOCK_R, BLOCK_K, TMA)
        acc = tl.dot(x_tile, w_tile, acc, input_precision=PRECISION, out_dtype=ACC)
        h_acc = tl.dot(x_tile, a_tile.T, h_acc, input_precision=PRECISION, out_dtype=ACC)
    h_acc *= tl.load(scaling).to(ACC) if SCALING_ON_DEVICE else scaling
    h_tile = h_acc.to(h.dtype.element_ty)
    if tile_n == 0:
        store_rows(h, h_tile, m, 0, M, R, BLOCK_M, BLOCK_R)
    b_tile = load_strided(b, 0, n, R, N, stride_br, stride_bn, BLOCK_R, BLOCK_N)
    acc = tl.dot(h_tile, b_tile, acc, input_precision=PRECISION, out_dtype=ACC)
    store_tile(y, acc, bias, m, n, M, N, stride_ym, BLOCK_M, BLOCK_N, HALVES, HAS_BIAS, TMA)


@triton.jit
def one_launch_kernel(
    x, w, a, b, bias, y, h, ready, ticket, scaling, M, N, K, R, stride_br, stride_bn,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, GROUP_M: tl.constexpr,
    HALVES: tl.constexpr, KN: tl.constexpr, A_KR: tl.constexpr, HAS_BIAS: tl.constexpr, SCALING_ON_DEVICE: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr, SHRINK_STAGES: tl.constexpr,
):  # fmt: skip
    """`y = x w + h b + bias` with `h = scaling x a` computed once: the first column's tiles carry the shrink in their K loop.

    They publish h behind `ready [tiles_m]`; the other tiles need it only after their own K loop. Tiles are handed out by
    `ticket [1]`, so a producer is always taken before its consumers and never waits: no schedule can deadlock. Tickets
    are ordered, or with a single column a late flag could follow its reset. Counters are zero before and after. TMA only.
    """
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    k_blocks = tl.maximum(tl.cdiv(K, BLOCK_K), 1)
    tile = tl.atomic_add(ticket, 1, sem="acq_rel", scope="gpu")
    while tile < tiles_m * tiles_n:
        tile_m, tile_n = _look_ahead_tile(tile, tiles_m, tiles_n, GROUP_M)
        m, n = tile_m * BLOCK_M, tile_n * BLOCK_N
        acc = tl.zeros((BLOCK_M, BLOCK_N), ACC)
        if tile_n == 0:
            h_acc = tl.zeros((BLOCK_M, BLOCK_R), ACC)
            for i in tl.range(k_blocks, num_stages=SHRINK_STAGES):
                x_tile = x.load([m, i * BLOCK_K])
                w_tile = load_weight(w, n, i * BLOCK_K, N, K, 0, BLOCK_N, BLOCK_K, KN, TMA=True)
                a_tile = load_weight(a, 0, i * BLOCK_K, R, K, 0, BLOCK_R, BLOCK_K, A_KR, TMA=True)
                acc = tl.dot(x_tile, w_tile, acc, input_precision=PRECISION, out_dtype=ACC)
                h_acc = tl.dot(x_tile, a_tile, h_acc, input_precision=PRECISION, out_dtype=ACC)
            h_acc *= tl.load(scaling).to(ACC) if SCALING_ON_DEVICE else scaling
            h_tile = h_acc.to(h.dtype.element_ty)
            store_rows(h, h_tile, m, 0, M, R, BLOCK_M, BLOCK_R)
            tl.debug_barrier()  # the release below covers one thread's stores only
            tl.atomic_xchg(ready + tile_m, 1, sem="release", scope="gpu")
        else:
            for i in tl.range(k_blocks, num_stages=STAGES):
                x_tile = x.load([m, i * BLOCK_K])
                w_tile = load_weight(w, n, i * BLOCK_K, N, K, 0, BLOCK_N, BLOCK_K, KN, TMA=True)
                acc = tl.dot(x_tile, w_tile, acc, input_precision=PRECISION, out_dtype=ACC)
            while tl.atomic_add(ready + tile_m, 0, sem="acquire", scope="gpu") == 0:
                pass
            h_tile = load_rows(h, m, 0, M, R, BLOCK_M, BLOCK_R)
        b_tile = load_strided(b, 0, n, R, N, stride_br, stride_bn, BLOCK_R, BLOCK_N)
        acc = tl.dot(h_tile, b_tile, acc, input_precision=PRECISION, out_dtype=ACC)
        store_tile(y, acc, bias, m, n, M, N, 0, BLOCK_M, BLOCK_N, HALVES, HAS_BIAS, TMA=True)
        tile = tl.atomic_add(ticket, 1, sem="acq_rel", scope="gpu")
    if tile == tiles_m * tiles_n + tl.num_programs(0) - 1:  # the last ticket: every tile is done, nobody reads a flag
        for i in range(tiles_m):
            tl.store(ready + i, 0)
        tl.store(ticket, 0)


@triton.jit
def _look_ahead_tile(t, tiles_m, tiles_n, GROUP_M: tl.constexpr):
    """Tile `t` in the order P0, [P1 C0], [P2 C1], ..., C_last: P a row group's first column, C its other columns.

    A group's h is under way one group before it is wanted, so only the first wave of tiles can wait.
    """
    last = tl.cdiv(tiles_m, GROUP_M) - 1
    last_rows = tiles_m - last * GROUP_M
    t -= min(tiles_m, GROUP_M)
    block = min(max(t, 0) // (GROUP_M * tiles_n), max(last - 1, 0))
    within = t - block * GROUP_M * tiles_n
    producers = tl.where(last == 0, 0, tl.where(block + 1 == last, last_rows, GROUP_M))
    consumer = within - producers
    full = tl.where(last == 0, last_rows, GROUP_M) * (tiles_n - 1)
    in_last = consumer >= full
    group = tl.where(in_last, last, block)
    rows = tl.where(in_last | (last == 0), last_rows, GROUP_M)
    consumer = tl.where(in_last, consumer - full, consumer)
    first = t < 0
    produces = first | (within < producers)
    tile_m = tl.where(
        first, t + min(tiles_m, GROUP_M),
        tl.where(produces, (block + 1) * GROUP_M + within, group * GROUP_M + consumer % rows),
    )  # fmt: skip
    return tile_m, tl.where(produces, 0, 1 + consumer // rows)
