"""The batched operation in one launch, for the few rows of a decoding step: W is read once, nothing waits for anything.

Of a tile's GEMM and the last shrink program, whoever comes second adds the adapters' terms. Operands as in `batched.py`.
"""

import triton
import triton.language as tl

from lora_kernels.kernels.batched import (
    base_tile,
    count_column_tiles,
    load_b,
    load_h,
    locate_columns,
    pick,
    shrink_tile,
    valid,
)
from lora_kernels.kernels.tile import store_tile


@triton.jit
def load_group(
    b, distinct, first, count, first_row, ranks, r, n, width, num_slots, stride_bn, stride_br,
    GROUP: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """`GROUP` adapters' tiles of b at once, so that their latencies overlap: those of `distinct [first : count]`."""
    tiles = ()
    for g in tl.static_range(GROUP):
        slot = valid(tl.load(distinct + first + g, mask=first + g < count, other=-1), num_slots)
        rank = tl.load(ranks + slot, mask=slot >= 0, other=0)
        b_row = tl.load(first_row + slot, mask=slot >= 0, other=0)
        tiles += (load_b(b, b_row, rank, r, n, width, stride_bn, stride_br, BLOCK_R, BLOCK_N, WIDE),)
    return tiles


@triton.jit
def expand_batch(
    acc, tiles, b, rows, slots, weights, distinct, count, first_row, ranks, scalings, planes, n, M, width, R_MAX, num_slots,
    stride_h, stride_bn, stride_br,
    ADAPTERS: tl.constexpr, GROUP: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr, WIDE: tl.constexpr,
    PLANES: tl.constexpr, DTYPE: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`acc` plus each row's own terms, adapter by adapter of the whole batch; `tiles` is the first group."""
    for j in range(ADAPTERS):
        entry = rows * ADAPTERS + j
        own = valid(tl.load(slots + entry, mask=rows < M, other=-1), num_slots)
        rank = tl.load(ranks + own, mask=own >= 0, other=0)
        factor = tl.load(scalings + own, mask=own >= 0, other=0.0).to(ACC)
        if weights is not None:
            factor *= tl.load(weights + entry, mask=rows < M, other=0.0).to(ACC)
        longest = tl.max(rank)
        for r in tl.range(0, longest, BLOCK_R, num_stages=1):
            h = load_h(planes, entry, factor, rank, r, M * ADAPTERS, R_MAX, stride_h, PLANES, BLOCK_R, DTYPE, ACC)
            for first in tl.range(0, count, GROUP, num_stages=1):  # the loads are one group ahead as it is
                following = first + GROUP < count
                ahead = load_group(
                    b, distinct, tl.where(following, first + GROUP, 0), count, first_row, ranks,
                    tl.where(following, r, tl.where(r + BLOCK_R < longest, r + BLOCK_R, 0)), n, width, num_slots,
                    stride_bn, stride_br, GROUP, BLOCK_N, BLOCK_R, WIDE,
                )  # fmt: skip
                for g in tl.static_range(GROUP):
                    slot = valid(tl.load(distinct + first + g, mask=first + g < count, other=-1), num_slots)
                    if slot >= 0:
                        term = tl.dot(h, tiles[g], input_precision=PRECISION, out_dtype=ACC)
                        acc = tl.where((own == slot)[:, None], acc + term, acc)
                tiles = ahead
    return acc


@triton.jit
def parts_of(spill, tile, part, PARTS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Where one part of a tile's sum over K waits for the others: `spill [tiles, PARTS, BLOCK_M, BLOCK_N]`."""
    within = tl.arange(0, BLOCK_M)[:, None] * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    return spill + (tile * PARTS + part) * (BLOCK_M * BLOCK_N) + within


@triton.jit
def add_parts(spill, tile, PARTS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """The whole sum, in the order of the parts; past L1, which may hold what was there before."""
    acc = tl.load(parts_of(spill, tile, 0, PARTS, BLOCK_M, BLOCK_N), cache_modifier=".cg")
    for part in tl.static_range(1, PARTS):
        acc += tl.load(parts_of(spill, tile, part, PARTS, BLOCK_M, BLOCK_N), cache_modifier=".cg")
    return acc


@triton.jit
def batched_one_launch_kernel(
    x, w, a, b, bias, y, slots, weights, order, segment, distinct, first_row, ranks, scalings, planes, spill,
    arrived, state, widths, M, N, K, R_MAX, num_slots, SHRINKS, stride_xm, stride_w, stride_bn, stride_br,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr, WIDE: tl.constexpr,
    PARTS: tl.constexpr, DTYPE: tl.constexpr, LOAD: tl.constexpr, LAYOUT: tl.constexpr, HAS_BIAS: tl.constexpr,
    TMA: tl.constexpr, Y_TMA: tl.constexpr, SHRINK_M: tl.constexpr, SHRINK_K: tl.constexpr, COLUMNS: tl.constexpr,
    ADAPTERS: tl.constexpr, BLOCK_R: tl.constexpr, SPLIT: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The shrink in the first SHRINKS programs, a PARTS-th of the K blocks of a tile's GEMM in each of the others.

    `state [tiles]` counts 1 for each part that left its sum in `spill`, and PARTS + 1 for "all of h is there"; `arrived [1]`
    counts shrink programs. Whoever makes it 2 PARTS + 1 adds up the parts in their order, adds the adapters' terms, and
    sets it back to 0. Nobody waits, so no order of programs can deadlock. Where PARTS is 1 and h is there already, the sum
    stays in registers.
    """
    pid = tl.program_id(0)
    tiles_m = tl.cdiv(M, BLOCK_M)
    count = tl.load(segment + M * ADAPTERS - 1) + 1
    shrinks = pid < SHRINKS
    tile = tl.where(shrinks, 0, (pid - SHRINKS) // PARTS)
    slice, _, n = locate_columns(tile // tiles_m, widths, BLOCK_N)
    tiles = load_group(  # before the GEMM, so that they are there when it ends
        pick(b, slice), distinct, 0, tl.where(shrinks, 0, count), pick(first_row, slice), pick(ranks, slice), 0, n,
        pick(widths, slice), num_slots, pick(stride_bn, slice), pick(stride_br, slice), GROUP, BLOCK_N, BLOCK_R, WIDE,
    )  # fmt: skip
    acc = tl.zeros((BLOCK_M, BLOCK_N), ACC)
    if shrinks:
        shrink_tile(
            pid, x, a, order, segment, distinct, first_row, ranks, planes, M, K, R_MAX, num_slots, stride_xm,
            ADAPTERS, SHRINK_M, SHRINK_K, COLUMNS, BLOCK_R, SPLIT, ACC, PRECISION,
        )  # fmt: skip
        tl.debug_barrier()  # the release covers one thread's stores only
        last = tl.atomic_add(arrived, 1, sem="acq_rel", scope="gpu") == SHRINKS - 1
        if last:
            tl.atomic_xchg(arrived, 0, sem="relaxed", scope="gpu")
        end = tl.where(last, tiles_m * count_column_tiles(widths, BLOCK_N), 0)
    else:
        part = (pid - SHRINKS) % PARTS
        _, start, _ = locate_columns(tile // tiles_m, widths, BLOCK_N)
        acc = base_tile(
            x, w, tile % tiles_m * BLOCK_M, start + n, M, N, K, stride_xm, stride_w, part * BLOCK_K, PARTS * BLOCK_K,
            BLOCK_M, BLOCK_N, BLOCK_K, LOAD, LAYOUT, False, TMA, ACC, PRECISION,
        )  # fmt: skip
        last = False
        if PARTS == 1:
            last = tl.atomic_add(state + tile, 0, sem="acquire", scope="gpu") == 2
        if not last:
            tl.store(parts_of(spill, tile, part, PARTS, BLOCK_M, BLOCK_N), acc)
            tl.debug_barrier()
            last = tl.atomic_add(state + tile, 1, sem="acq_rel", scope="gpu") == 2 * PARTS
        end = tl.where(last, tile + 1, 0)
    for t in tl.range(tile, end, num_stages=1):
        mine = True
        if shrinks:
            mine = tl.atomic_add(state + t, PARTS + 1, sem="acq_rel", scope="gpu") == PARTS
        if mine:
            slice, start, n = locate_columns(t // tiles_m, widths, BLOCK_N)
            width, b_slice = pick(widths, slice), pick(b, slice)
            first_row_slice, ranks_slice = pick(first_row, slice), pick(ranks, slice)
            bn, br = pick(stride_bn, slice), pick(stride_br, slice)
            if shrinks or PARTS > 1:
                acc = add_parts(spill, t, PARTS, BLOCK_M, BLOCK_N)
            if shrinks:
                tiles = load_group(
                    b_slice, distinct, 0, count, first_row_slice, ranks_slice, 0, n, width, num_slots, bn, br,
                    GROUP, BLOCK_N, BLOCK_R, WIDE,
                )  # fmt: skip
            m = t % tiles_m * BLOCK_M
            y_tile = expand_batch(
                acc, tiles, b_slice, m + tl.arange(0, BLOCK_M), slots, weights, distinct, count, first_row_slice,
                ranks_slice, pick(scalings, slice), planes + slice * R_MAX, n, M, width, R_MAX, num_slots, len(b) * R_MAX,
                bn, br, ADAPTERS, GROUP, BLOCK_N, BLOCK_R, WIDE, SPLIT, DTYPE, ACC, PRECISION,
            )  # fmt: skip
            store_tile(y, y_tile, bias, m, start + n, M, start + width, N, BLOCK_M, BLOCK_N, False, HAS_BIAS, Y_TMA)
            tl.atomic_xchg(state + t, 0, sem="relaxed", scope="gpu")
