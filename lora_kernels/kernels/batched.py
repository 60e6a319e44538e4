"""Every row its own adapter: `y[i] = x[i] Wᵀ + h[i] b[slot[i]]ᵀ` with `h[i] = scaling x[i] a[slot[i]]ᵀ`.

Row i of `slots [M, ADAPTERS]` names the adapters of row i of x, -1 for none: each of these entries has its own h. Columns
of y come in slices (q, k and v; gate and up), each with its own adapters and width: `a`, `b`, `first_row`, `ranks`,
`scalings`, `widths`, `stride_bn` and `stride_br` are tuples, one item a slice.
A row takes its own adapters' terms and no others: they are selected after the product, since 0 · NaN is NaN. Ranks are
read on the device; the loops follow them, and what lies past a rank is never used.
`a` and `b` are addressed by rank row: row `first_row[slot] + r` of `a [rows, K]`, and element
`(first_row[slot] N + n stride_bn + r stride_br)` of b, which covers `[slots, N, R_max]` as well as `[rows, N]`.
"""

import triton
import triton.language as tl

from lora_kernels.kernels.tile import grouped_tile, load_tile, store_tile

NO_SLOT = tl.constexpr(2**31 - 1)


@triton.jit
def pick(values, i):
    """`values[i]` of a tuple, where only the device knows `i`: a number, or a block of them."""
    chosen = values[0]
    for s in tl.static_range(1, len(values)):
        chosen = tl.where(i == s, values[s], chosen)
    return chosen


@triton.jit
def valid(slot, num_slots):
    """The slot, or -1 for one that is not there."""
    return tl.where(slot < num_slots, slot, -1)


@triton.jit
def next_slot(slots, above):
    """The smallest of `slots [BLOCK]` that is greater than `above`, or NO_SLOT."""
    return tl.min(tl.where(slots > above, slots, NO_SLOT), axis=0)


@triton.jit
def count_column_tiles(widths, BLOCK_N: tl.constexpr):
    """The tiles in a row of y: none straddles two slices."""
    tiles = tl.cdiv(widths[0], BLOCK_N)
    for s in tl.static_range(1, len(widths)):
        tiles += tl.cdiv(widths[s], BLOCK_N)
    return tiles


@triton.jit
def locate_columns(tile, widths, BLOCK_N: tl.constexpr):
    """Of a column tile: its slice, where the slice begins in y, and where the tile begins in the slice."""
    slice = 0
    start = 0
    for s in tl.static_range(len(widths) - 1):
        tiles = tl.cdiv(widths[s], BLOCK_N)
        beyond = (slice == s) & (tile >= tiles)
        tile = tl.where(beyond, tile - tiles, tile)
        start = tl.where(beyond, start + widths[s], start)
        slice = tl.where(beyond, slice + 1, slice)
    return slice, start, tile * BLOCK_N


@triton.jit
def base_tile(
    x, w, m, n, M, N, K, stride_xm, stride_w, first_k, step_k,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, LOAD: tl.constexpr, LAYOUT: tl.constexpr,
    X_TMA: tl.constexpr, W_TMA: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`x w` for one tile, over the K blocks at `first_k, first_k + step_k, ...`."""
    acc = tl.zeros((BLOCK_M, BLOCK_N), ACC)
    for i in range(tl.maximum(tl.cdiv(K - first_k, step_k), 1)):  # a zero-trip loop would serialise wgmma
        k = first_k + i * step_k
        x_tile = load_tile(x, m, k, M, K, stride_xm, BLOCK_M, BLOCK_K, X_TMA)
        w_tile = LOAD(w, n, k, N, K, stride_w, BLOCK_N, BLOCK_K, LAYOUT, W_TMA).to(x_tile.dtype)
        acc = tl.dot(x_tile, w_tile, acc, input_precision=PRECISION, out_dtype=ACC)
    return acc


@triton.jit
def shrink_tile(
    pid, x, a, order, segment, distinct, first_row, ranks, planes, M, K, R_MAX, num_slots, stride_xm,
    ADAPTERS: tl.constexpr, SHRINK_M: tl.constexpr, SHRINK_K: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_R: tl.constexpr,
    SPLIT: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Partial sums of h, unscaled, for SHRINK_M entries in the order of their slots: `planes [SPLIT, entries, SLICES R_MAX]`.

    One pass over x serves COLUMNS columns of h: BLOCK_R ranks of each of several (adapter, slice) pairs.
    """
    SLICES: tl.constexpr = len(a)
    PAIRS: tl.constexpr = COLUMNS // BLOCK_R
    part = pid % SPLIT
    entries = M * ADAPTERS
    place = pid // SPLIT * SHRINK_M + tl.arange(0, SHRINK_M)
    entry = tl.load(order + place, mask=place < entries, other=0).to(tl.int64)
    own_segment = tl.load(segment + place, mask=place < entries, other=-1)
    first = tl.load(segment + pid // SPLIT * SHRINK_M)
    pairs = (tl.max(own_segment) - first + 1) * SLICES
    own_slot = valid(tl.load(distinct + own_segment, mask=place < entries, other=-1), num_slots)
    longest = tl.zeros((SHRINK_M,), tl.int32)
    for s in tl.static_range(SLICES):
        longest = tl.maximum(longest, tl.load(ranks[s] + own_slot, mask=own_slot >= 0, other=0))
    x_rows = x + (entry // ADAPTERS)[:, None] * stride_xm
    h_rows = planes + (part.to(tl.int64) * entries + entry)[:, None] * SLICES * R_MAX
    column = tl.arange(0, COLUMNS)
    for r in range(0, tl.max(longest), BLOCK_R):
        for first_pair in range(0, pairs, PAIRS):
            pair = first_pair + column // BLOCK_R
            slot = valid(tl.load(distinct + first + pair // SLICES, mask=pair < pairs, other=-1), num_slots)
            slice = pair % SLICES
            rank_row = r + column % BLOCK_R
            live = rank_row < tl.load(pick(ranks, slice) + slot, mask=slot >= 0, other=0)
            a_row = tl.load(pick(first_row, slice) + slot, mask=live, other=0) + rank_row
            a_columns = pick(a, slice) + a_row * K
            acc = tl.zeros((SHRINK_M, COLUMNS), ACC)
            for k in range(part * SHRINK_K, K, SPLIT * SHRINK_K):
                offs_k = k + tl.arange(0, SHRINK_K)
                x_mask = (place < entries)[:, None] & (offs_k < K)[None, :]
                x_tile = tl.load(x_rows + offs_k[None, :], mask=x_mask, other=0.0)
                a_mask = live[None, :] & (offs_k < K)[:, None]
                a_tile = tl.load(a_columns[None, :] + offs_k[:, None], mask=a_mask, other=0.0)
                acc = tl.dot(x_tile, a_tile, acc, input_precision=PRECISION, out_dtype=ACC)
            own = (own_segment[:, None] == (first + pair // SLICES)[None, :]) & live[None, :]
            tl.store(h_rows + (slice * R_MAX + rank_row)[None, :], acc, mask=own)


@triton.jit
def load_h(
    planes, entry, factor, rank, r, entries, R_MAX, stride, PLANES: tl.constexpr, BLOCK_R: tl.constexpr,
    DTYPE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """`h [entry, r : r + BLOCK_R]` up to each entry's rank: the sum of the planes, in their order, times `factor`."""
    offs_r = r + tl.arange(0, BLOCK_R)
    # Not by rank: that would be loads of 4 bytes. Nor through L1, which may hold what was there before.
    mask = (rank > r)[:, None] & (offs_r < R_MAX)[None, :]
    plane = planes + entry.to(tl.int64)[:, None] * stride + offs_r[None, :]
    h = tl.load(plane, mask=mask, other=0.0, cache_modifier=".cg").to(ACC)
    for _ in tl.static_range(PLANES - 1):
        plane += tl.cast(entries, tl.int64) * stride
        h += tl.load(plane, mask=mask, other=0.0, cache_modifier=".cg").to(ACC)
    return tl.where(offs_r[None, :] < rank[:, None], h * factor[:, None], 0.0).to(DTYPE)


@triton.jit
def load_b(
    b, first_row, rank, r, n, width, stride_bn, stride_br, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """`[BLOCK_R, BLOCK_N]` of an adapter's b, zero outside it. WIDE ranks are loaded together or not at all."""
    offs_r = r + tl.arange(0, BLOCK_R)
    offs_n = n + tl.arange(0, BLOCK_N)
    offs = offs_r.to(tl.int64)[:, None] * stride_br + offs_n.to(tl.int64)[None, :] * stride_bn
    mask = (offs_r // WIDE * WIDE < rank)[:, None] & (offs_n < width)[None, :]
    tile = tl.load(b + first_row * width + offs, mask=mask, other=0.0)
    return tl.where((offs_r < rank)[:, None], tile, 0.0)


@triton.jit
def expand_rows(
    acc, b, rows, slots, weights, first_row, ranks, scalings, planes, n, M, width, R_MAX, num_slots, stride_h,
    stride_bn, stride_br,
    ADAPTERS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr, WIDE: tl.constexpr,
    PLANES: tl.constexpr, DTYPE: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`acc` plus each row's own terms in one slice; finds the adapters of its rows by itself, in ascending order."""
    for j in range(ADAPTERS):
        entry = rows * ADAPTERS + j
        own = valid(tl.load(slots + entry, mask=rows < M, other=-1), num_slots)
        slot = next_slot(own, -1)
        while slot != NO_SLOT:
            rank = tl.load(ranks + slot)
            b_row = tl.load(first_row + slot)
            mine = own == slot
            own_rank = tl.where(mine, rank, 0)
            factor = tl.load(scalings + slot).to(ACC) + tl.zeros((BLOCK_M,), ACC)
            if weights is not None:
                factor *= tl.load(weights + entry, mask=rows < M, other=0.0).to(ACC)
            term = tl.zeros((BLOCK_M, BLOCK_N), ACC)
            for r in tl.range(0, rank, BLOCK_R, num_stages=1):  # one stage: the main loop has spent the shared memory
                h = load_h(
                    planes, entry, factor, own_rank, r, M * ADAPTERS, R_MAX, stride_h, PLANES, BLOCK_R, DTYPE, ACC
                )
                b_tile = load_b(b, b_row, rank, r, n, width, stride_bn, stride_br, BLOCK_R, BLOCK_N, WIDE)
                term = tl.dot(h, b_tile, term, input_precision=PRECISION, out_dtype=ACC)
            acc = tl.where(mine[:, None], acc + term, acc)
            slot = next_slot(own, slot)
    return acc


@triton.jit
def batched_shrink_kernel(
    x, a, order, segment, distinct, first_row, ranks, planes, M, K, R_MAX, num_slots, stride_xm,
    SHRINK_M: tl.constexpr, SHRINK_K: tl.constexpr, COLUMNS: tl.constexpr, ADAPTERS: tl.constexpr, BLOCK_R: tl.constexpr,
    SPLIT: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The planes of h that the other kernels add up."""
    shrink_tile(
        tl.program_id(0), x, a, order, segment, distinct, first_row, ranks, planes, M, K, R_MAX, num_slots, stride_xm,
        ADAPTERS, SHRINK_M, SHRINK_K, COLUMNS, BLOCK_R, SPLIT, ACC, PRECISION,
    )  # fmt: skip


@triton.jit
def batched_extended_kernel(
    x, w, b, bias, y, slots, weights, first_row, ranks, scalings, planes, widths, M, N, K, R_MAX, num_slots,
    stride_xm, stride_w, stride_bn, stride_br,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr, WIDE: tl.constexpr,
    DTYPE: tl.constexpr, LOAD: tl.constexpr, LAYOUT: tl.constexpr, HAS_BASE: tl.constexpr, HAS_BIAS: tl.constexpr,
    TMA: tl.constexpr, Y_TMA: tl.constexpr, ADAPTERS: tl.constexpr, BLOCK_R: tl.constexpr, SPLIT: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`y = x w + bias` and each row's own adapters, from the planes of h; persistent.

    Without HAS_BASE y holds `x w + bias` already, its rows N elements apart, and the adapters are added to it.
    """
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), count_column_tiles(widths, BLOCK_N)
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0)):
        tile_m, tile_n = grouped_tile(tile, tiles_m, tiles_n, GROUP_M)
        slice, start, n = locate_columns(tile_n, widths, BLOCK_N)
        m = tile_m * BLOCK_M
        end = start + pick(widths, slice)
        if HAS_BASE:
            acc = base_tile(
                x, w, m, start + n, M, N, K, stride_xm, stride_w, 0, BLOCK_K, BLOCK_M, BLOCK_N, BLOCK_K, LOAD, LAYOUT,
                TMA, TMA, ACC, PRECISION,
            )  # fmt: skip
        else:
            acc = load_tile(y, m, start + n, M, end, N, BLOCK_M, BLOCK_N, False).to(ACC)
        rows = m + tl.arange(0, BLOCK_M)
        acc = expand_rows(
            acc, pick(b, slice), rows, slots, weights, pick(first_row, slice), pick(ranks, slice), pick(scalings, slice),
            planes + slice * R_MAX, n, M, pick(widths, slice), R_MAX, num_slots, len(b) * R_MAX,
            pick(stride_bn, slice), pick(stride_br, slice),
            ADAPTERS, BLOCK_M, BLOCK_N, BLOCK_R, WIDE, SPLIT, DTYPE, ACC, PRECISION,
        )  # fmt: skip
        store_tile(y, acc, bias, m, start + n, M, end, N, BLOCK_M, BLOCK_N, False, HAS_BIAS, Y_TMA)
