"""Every row its own adapter: `y[i] = x[i] Wᵀ + h[i] b[slot[i]]ᵀ` with `h[i] = scaling x[i] a[slot[i]]ᵀ`.

A tile finds the adapters of its rows by itself, in ascending order: the smallest slot above the last one. Each row takes
its own adapter's term and no other (a mask after the product, since 0 · NaN is NaN), so no row sees another's adapter.
Ranks are read from the device; the loops follow them, and nothing past a rank is loaded.
`a` and `b` are addressed by rank row: row `first_row[slot] + r` of `a [rows, K]`, and element
`(first_row[slot] N + n stride_bn + r stride_br)` of b, which covers `[slots, N, R_max]` as well as `[rows, N]`.
"""

import triton
import triton.language as tl

from lora_kernels.kernels.tile import grouped_tile, load_rows, load_tile, load_weight, store_rows, store_tile

NO_SLOT = tl.constexpr(2**31 - 1)


@triton.jit
def next_slot(slots, above):
    """The smallest of `slots [BLOCK]` that is greater than `above`, or NO_SLOT."""
    return tl.min(tl.where(slots > above, slots, NO_SLOT), axis=0)


@triton.jit
def base_tile(
    x, w, m, n, M, N, K, stride_xm, stride_w,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, KN: tl.constexpr, X_TMA: tl.constexpr,
    W_TMA: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`x w` for one tile."""
    acc = tl.zeros((BLOCK_M, BLOCK_N), ACC)
    for i in range(tl.maximum(tl.cdiv(K, BLOCK_K), 1)):  # a zero-trip loop would serialise wgmma
        x_tile = load_tile(x, m, i * BLOCK_K, M, K, stride_xm, BLOCK_M, BLOCK_K, X_TMA)
        w_tile = load_weight(w, n, i * BLOCK_K, N, K, stride_w, BLOCK_N, BLOCK_K, KN, W_TMA)
        acc = tl.dot(x_tile, w_tile, acc, input_precision=PRECISION, out_dtype=ACC)
    return acc


@triton.jit
def shrink_rows(
    x, a, rows, slots, first_row, ranks, h, K, R_MAX, stride_xm, first_k, step_k,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`h[rows] = x[rows] a[slot]ᵀ`, unscaled, over the K blocks at `first_k, first_k + step_k, ...`."""
    rr = tl.arange(0, BLOCK_R)
    x_rows = x + rows.to(tl.int64)[:, None] * stride_xm
    slot = next_slot(slots, -1)
    while slot != NO_SLOT:
        rank = tl.load(ranks + slot)
        a_rows = a + tl.load(first_row + slot).to(tl.int64) * K
        mine = slots == slot
        for r in range(0, rank, BLOCK_R):
            acc = tl.zeros((BLOCK_M, BLOCK_R), ACC)
            for k in range(first_k, K, step_k):
                offs_k = k + tl.arange(0, BLOCK_K)
                x_mask = mine[:, None] & (offs_k < K)[None, :]
                x_tile = tl.load(x_rows + offs_k[None, :], mask=x_mask, other=0.0)
                a_mask = (r + rr < rank)[None, :] & (offs_k < K)[:, None]
                a_tile = tl.load(a_rows + (r + rr).to(tl.int64)[None, :] * K + offs_k[:, None], mask=a_mask, other=0.0)
                acc = tl.dot(x_tile, a_tile, acc, input_precision=PRECISION, out_dtype=ACC)
            offs = rows.to(tl.int64)[:, None] * R_MAX + (r + rr)[None, :]
            tl.store(h + offs, acc, mask=mine[:, None] & (r + rr < rank)[None, :])
        slot = next_slot(slots, slot)


@triton.jit
def expand_rows(
    acc, b, rows, slots, first_row, ranks, scalings, planes, n, M, N, R_MAX, PLANES, stride_bn, stride_br,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
    DTYPE: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`acc` plus each row's own `h b[slot]ᵀ`; h is the scaled sum of `planes [PLANES, M, R_MAX]`, in their order."""
    rr = tl.arange(0, BLOCK_R)
    offs_n = n + tl.arange(0, BLOCK_N)
    slot = next_slot(slots, -1)
    while slot != NO_SLOT:
        rank = tl.load(ranks + slot)
        scaling = tl.load(scalings + slot).to(ACC)
        b_slot = b + tl.load(first_row + slot).to(tl.int64) * N
        mine = slots == slot
        term = tl.zeros((BLOCK_M, BLOCK_N), ACC)
        for r in range(0, rank, BLOCK_R):
            live = r + rr < rank
            h = tl.zeros((BLOCK_M, BLOCK_R), ACC)
            plane = planes + rows.to(tl.int64)[:, None] * R_MAX + (r + rr)[None, :]
            for _ in range(PLANES):
                h += tl.load(plane, mask=mine[:, None] & live[None, :], other=0.0, cache_modifier=".cg").to(ACC)
                plane += M.to(tl.int64) * R_MAX
            b_offs = (r + rr).to(tl.int64)[:, None] * stride_br + offs_n.to(tl.int64)[None, :] * stride_bn
            b_tile = tl.load(b_slot + b_offs, mask=live[:, None] & (offs_n < N)[None, :], other=0.0)
            term = tl.dot((h * scaling).to(DTYPE), b_tile.to(DTYPE), term, input_precision=PRECISION, out_dtype=ACC)
        acc = tl.where(mine[:, None], acc + term, acc)
        slot = next_slot(slots, slot)
    return acc


@triton.jit
def _row_slots(slots, rows, M, num_slots):
    """The slots of `rows`, and NO_SLOT's opposite, -1, for rows past M and slots that are not there."""
    slot = tl.load(slots + rows, mask=rows < M, other=-1)
    return tl.where(slot < num_slots, slot, -1)


@triton.jit
def _shrink_program(
    pid, x, a, slots, order, first_row, ranks, planes, M, K, R_MAX, num_slots, stride_xm,
    SHRINK_M: tl.constexpr, SHRINK_K: tl.constexpr, BLOCK_R: tl.constexpr, SPLIT: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    tile, part = pid // SPLIT, pid % SPLIT
    place = tile * SHRINK_M + tl.arange(0, SHRINK_M)
    rows = tl.load(order + place, mask=place < M, other=M)
    h = planes + part.to(tl.int64) * M * R_MAX
    shrink_rows(
        x, a, rows, _row_slots(slots, rows, M, num_slots), first_row, ranks, h, K, R_MAX, stride_xm,
        part * SHRINK_K, SPLIT * SHRINK_K, SHRINK_M, SHRINK_K, BLOCK_R, ACC, PRECISION,
    )  # fmt: skip


@triton.jit
def _finish_tile(
    acc, b, bias, y, slots, first_row, ranks, scalings, planes, m, n, M, N, R_MAX, num_slots, stride_bn, stride_br,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr, SPLIT: tl.constexpr, DTYPE: tl.constexpr,
    HAS_BIAS: tl.constexpr, TMA: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    rows = m + tl.arange(0, BLOCK_M)
    acc = expand_rows(
        acc, b, rows, _row_slots(slots, rows, M, num_slots), first_row, ranks, scalings, planes, n, M, N, R_MAX, SPLIT,
        stride_bn, stride_br, BLOCK_M, BLOCK_N, BLOCK_R, DTYPE, ACC, PRECISION,
    )  # fmt: skip
    store_tile(y, acc, bias, m, n, M, N, N, BLOCK_M, BLOCK_N, False, HAS_BIAS, TMA)


@triton.jit
def batched_shrink_kernel(
    x, a, slots, order, first_row, ranks, planes, M, K, R_MAX, num_slots, stride_xm,
    SHRINK_M: tl.constexpr, SHRINK_K: tl.constexpr, BLOCK_R: tl.constexpr, SPLIT: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Unscaled partial sums of h, `planes [SPLIT, M, R_MAX]`; one program for SHRINK_M rows in the order of their slots."""
    _shrink_program(
        tl.program_id(0), x, a, slots, order, first_row, ranks, planes, M, K, R_MAX, num_slots, stride_xm,
        SHRINK_M, SHRINK_K, BLOCK_R, SPLIT, ACC, PRECISION,
    )  # fmt: skip


@triton.jit
def batched_extended_kernel(
    x, w, b, bias, y, slots, first_row, ranks, scalings, planes, M, N, K, R_MAX, num_slots,
    stride_xm, stride_w, stride_bn, stride_br,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, GROUP_M: tl.constexpr,
    SPLIT: tl.constexpr, DTYPE: tl.constexpr, KN: tl.constexpr, HAS_BIAS: tl.constexpr, TMA: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`y = x w + bias` and each row's own adapter, from the planes that `batched_shrink_kernel` left; persistent."""
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0)):
        tile_m, tile_n = grouped_tile(tile, tiles_m, tiles_n, GROUP_M)
        m, n = tile_m * BLOCK_M, tile_n * BLOCK_N
        acc = base_tile(
            x, w, m, n, M, N, K, stride_xm, stride_w, BLOCK_M, BLOCK_N, BLOCK_K, KN, TMA, TMA, ACC, PRECISION
        )
        _finish_tile(
            acc, b, bias, y, slots, first_row, ranks, scalings, planes, m, n, M, N, R_MAX, num_slots, stride_bn, stride_br,
            BLOCK_M, BLOCK_N, BLOCK_R, SPLIT, DTYPE, HAS_BIAS, TMA, ACC, PRECISION,
        )  # fmt: skip


@triton.jit
def batched_one_launch_kernel(
    x, w, a, b, bias, y, slots, order, first_row, ranks, scalings, planes, spill, arrived, state, M, N, K, R_MAX, num_slots,
    SHRINKS, stride_xm, stride_w, stride_bn, stride_br,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    SHRINK_M: tl.constexpr, SHRINK_K: tl.constexpr, SPLIT: tl.constexpr, DTYPE: tl.constexpr, KN: tl.constexpr,
    HAS_BIAS: tl.constexpr, TMA: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Both in one launch without waiting: of a tile's GEMM and the last shrink program, the second to arrive expands.

    `state [tiles]` counts 1 for a GEMM that left its sum in `spill`, 2 for "all of h is there"; `arrived [1]` counts shrink
    programs. Nobody waits, so no order of programs can deadlock; whoever finishes a tile sets its state back to 0.
    """
    pid = tl.program_id(0)
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    if pid < SHRINKS:
        _shrink_program(
            pid, x, a, slots, order, first_row, ranks, planes, M, K, R_MAX, num_slots, stride_xm,
            SHRINK_M, SHRINK_K, BLOCK_R, SPLIT, ACC, PRECISION,
        )  # fmt: skip
        tl.debug_barrier()  # the release covers one thread's stores only
        if tl.atomic_add(arrived, 1, sem="acq_rel", scope="gpu") == SHRINKS - 1:
            tl.atomic_xchg(arrived, 0, sem="relaxed", scope="gpu")
            for tile in range(tiles_m * tiles_n):
                if tl.atomic_add(state + tile, 2, sem="acq_rel", scope="gpu") == 1:
                    m, n = tile % tiles_m * BLOCK_M, tile // tiles_m * BLOCK_N
                    acc = load_rows(spill, m, n, M, N, BLOCK_M, BLOCK_N)
                    _finish_tile(
                        acc, b, bias, y, slots, first_row, ranks, scalings, planes, m, n, M, N, R_MAX, num_slots,
                        stride_bn, stride_br, BLOCK_M, BLOCK_N, BLOCK_R, SPLIT, DTYPE, HAS_BIAS, TMA, ACC, PRECISION,
                    )  # fmt: skip
                    tl.atomic_xchg(state + tile, 0, sem="relaxed", scope="gpu")
    else:
        tile = pid - SHRINKS
        m, n = tile % tiles_m * BLOCK_M, tile // tiles_m * BLOCK_N
        acc = base_tile(
            x, w, m, n, M, N, K, stride_xm, stride_w, BLOCK_M, BLOCK_N, BLOCK_K, KN, False, TMA, ACC, PRECISION
        )
        ready = tl.atomic_add(state + tile, 0, sem="acquire", scope="gpu") >= 2
        if not ready:
            store_rows(spill, acc, m, n, M, N, BLOCK_M, BLOCK_N)
            tl.debug_barrier()
            ready = tl.atomic_add(state + tile, 1, sem="acq_rel", scope="gpu") >= 2
        if ready:
            _finish_tile(
                acc, b, bias, y, slots, first_row, ranks, scalings, planes, m, n, M, N, R_MAX, num_slots,
                stride_bn, stride_br, BLOCK_M, BLOCK_N, BLOCK_R, SPLIT, DTYPE, HAS_BIAS, TMA, ACC, PRECISION,
            )  # fmt: skip
            tl.atomic_xchg(state + tile, 0, sem="relaxed", scope="gpu")
