"""The dense values of a quantised weight, for what multiplies by a dense one."""

import triton
import triton.language as tl


@triton.jit
def dequantize_kernel(
    w, out, N, K, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, LOAD: tl.constexpr, LAYOUT: tl.constexpr
):
    """`out [N, K]`, contiguous: computed in fp32, rounded once; BLOCK_M rows at a time."""
    n, k = tl.program_id(0) * BLOCK_M, tl.program_id(1) * BLOCK_K
    tile = LOAD(w, n, k, N, K, None, BLOCK_M, BLOCK_K, LAYOUT, False).T.to(out.dtype.element_ty)
    offs_n, offs_k = n + tl.arange(0, BLOCK_M), k + tl.arange(0, BLOCK_K)
    mask = (offs_n < N)[:, None] & (offs_k < K)[None, :]
    tl.store(out + offs_n.to(tl.int64)[:, None] * K + offs_k[None, :], tile, mask=mask)
