"""A tile of the base weight in every format: `dense`, and a function each, called as the format is in `lora_kernels/formats`.

All take `(w, n, k, N, K, stride, BLOCK_N, BLOCK_K, LAYOUT, TMA)` and return `w [k : k + BLOCK_K, n : n + BLOCK_N]`, of the
weight as x multiplies it. Kernels have the function as a constexpr, LOAD, and round what it returns to x's dtype. A format's
values are those of its `dequantize`, in fp32 and to the bit; `w` and LAYOUT are what its `tile` returned, and `stride` and
TMA are of the dense weight alone. Past K the values are finite and meet zeros of x; past N they are those of the last row,
since a mask would cost an instruction for every code, and nobody stores the columns.
"""

import triton
import triton.language as tl

from lora_kernels.kernels.tile import load_weight as dense  # noqa: F401


@triton.jit
def rows_of(n, N, BLOCK_N: tl.constexpr):
    return tl.minimum(n + tl.arange(0, BLOCK_N), N - 1).to(tl.int64)


@triton.jit
def load_codes(codes, rows, stride, first, end, COUNT: tl.constexpr):
    """`[rows, COUNT]` bytes from column `first` on, zero from `end` on."""
    offs = first + tl.arange(0, COUNT)
    return tl.load(codes + rows[:, None] * stride + offs[None, :], mask=(offs < end)[None, :], other=0)


@triton.jit
def load_groups(
    source, rows, stride_n, stride_k, k, K, GROUP: tl.constexpr, CHUNK: tl.constexpr, BLOCK_K: tl.constexpr
):
    """What every CHUNK of the columns has for its group of GROUP columns, `[rows, BLOCK_K / CHUNK]`."""
    chunk = k + tl.arange(0, BLOCK_K // CHUNK) * CHUNK
    groups = source + rows[:, None] * stride_n + (chunk // GROUP)[None, :] * stride_k
    return tl.load(groups, mask=(chunk < K)[None, :], other=0.0)


@triton.jit
def spread(groups, COUNT: tl.constexpr):
    """`[rows, g]` as `[rows, g COUNT]`, each number COUNT times."""
    wide = tl.broadcast_to(groups[:, :, None], (groups.shape[0], groups.shape[1], COUNT))
    return tl.reshape(wide, (groups.shape[0], groups.shape[1] * COUNT))


@triton.jit
def look_up(table, SIZE: tl.constexpr, index):
    """`table[index]` out of shared memory. The MMA's layout follows the narrowest load that it sees, none of them past this."""
    values = tl.gather(tl.load(table + tl.arange(0, SIZE)), tl.reshape(index.to(tl.int32), (index.numel,)), 0)
    return tl.reshape(values, index.shape)


@triton.jit
def int8(w, n, k, N, K, stride, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, LAYOUT: tl.constexpr, TMA: tl.constexpr):
    """`w` is (data, scale, data's stride)."""
    rows = rows_of(n, N, BLOCK_N)
    q = load_codes(w[0], rows, w[2], k, K, BLOCK_K)
    return (q.to(tl.float32) * tl.load(w[1] + rows)[:, None]).T


@triton.jit
def fp8(w, n, k, N, K, stride, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, LAYOUT: tl.constexpr, TMA: tl.constexpr):
    """`w` is (data as bytes, scale, table, data's stride, scale's strides); LAYOUT (rows, columns) of a block, 0 being all.

    The table has the value of each byte, where the device has no instruction that converts them, and is None elsewhere.
    """
    rows = rows_of(n, N, BLOCK_N)
    q = load_codes(w[0], rows, w[3], k, K, BLOCK_K)
    if w[2] is None:
        values = q.to(tl.float8e4nv, bitcast=True).to(tl.float32)
    else:
        values = look_up(w[2], 256, q)
    if LAYOUT[1] == 0:
        return (values * tl.load(w[1] + rows // LAYOUT[0] * w[4])[:, None]).T
    elif LAYOUT[1] % BLOCK_K == 0 and BLOCK_N % 128 == 0:
        # a thread's four rows side by side: their scales are one load of 16 bytes
        offs = tl.trans(tl.reshape(rows // LAYOUT[0] * w[4], (4, BLOCK_N // 4)))
        scale = tl.load(w[1] + offs + k.to(tl.uint32) // LAYOUT[1] * w[5])
        return (values * tl.reshape(tl.trans(scale), (BLOCK_N,))[:, None]).T
    else:
        CHUNK: tl.constexpr = LAYOUT[1] & -LAYOUT[1] if (LAYOUT[1] & -LAYOUT[1]) < BLOCK_K else BLOCK_K
        scale = load_groups(w[1], rows // LAYOUT[0], w[4], w[5], k, K, LAYOUT[1], CHUNK, BLOCK_K)
        return (values * spread(scale, CHUNK)).T


@triton.jit
def nf4(w, n, k, N, K, stride, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, LAYOUT: tl.constexpr, TMA: tl.constexpr):
    """`w` is (packed, absmax, table, nested absmax, code and offset, or None); LAYOUT (blocksize, what divides it and K)."""
    CHUNK: tl.constexpr = LAYOUT[1] if LAYOUT[1] < BLOCK_K else BLOCK_K
    PAIRS: tl.constexpr = BLOCK_K // 2
    rows = rows_of(n, N, BLOCK_N)
    q = load_codes(w[0], rows, K // 2, k // 2, K // 2, PAIRS).to(tl.int32)
    chunk = k + tl.arange(0, BLOCK_K // CHUNK) * CHUNK
    live = (chunk < K)[None, :]
    first = rows * K
    within = (first % LAYOUT[0]).to(tl.uint32)[:, None] + chunk.to(tl.uint32)[None, :]
    block = (first // LAYOUT[0]).to(tl.uint32)[:, None] + within // LAYOUT[0]
    absmax = tl.load(w[1] + block, mask=live, other=0)
    if w[3] is not None:
        coded = look_up(w[4], 256, absmax)
        group = tl.load(w[3] + block // 256, mask=live, other=0.0)
        absmax = tl.fma(coded, group, tl.zeros_like(coded)) + tl.load(w[5])  # rounded twice, as it is in PyTorch
    values = look_up(w[2], 16, tl.reshape(tl.join(q >> 4, q & 15), (BLOCK_N, BLOCK_K)))
    return (values * spread(absmax, CHUNK)).T


@triton.jit
def int4(w, n, k, N, K, stride, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, LAYOUT: tl.constexpr, TMA: tl.constexpr):
    """`w` is (packed as bytes, scale, zero, packed's stride, and two each of the others); LAYOUT (group size,)."""
    CHUNK: tl.constexpr = LAYOUT[0] & -LAYOUT[0] if (LAYOUT[0] & -LAYOUT[0]) < BLOCK_K else BLOCK_K
    rows = rows_of(n, N, BLOCK_N)
    q = load_codes(w[0], rows, w[3], k // 2, tl.cdiv(K, 2), BLOCK_K // 2).to(tl.int32)
    scale = load_groups(w[1], rows, w[4], w[5], k, K, LAYOUT[0], CHUNK, BLOCK_K).to(tl.float32)
    zero = load_groups(w[2], rows, w[6], w[7], k, K, LAYOUT[0], CHUNK, BLOCK_K).to(tl.float32)
    scale, zero = spread(scale, CHUNK // 2), spread(zero, CHUNK // 2)
    low = ((q & 15).to(tl.float32) - zero) * scale
    high = ((q >> 4).to(tl.float32) - zero) * scale
    return tl.reshape(tl.join(low, high), (BLOCK_N, BLOCK_K)).T
