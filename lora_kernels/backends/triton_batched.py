"""Launches of the batched kernels: every row its own adapter. Operands as in `backends/triton.py`."""

from lora_kernels import configs
from lora_kernels.backends import triton as backend
from lora_kernels.backends.launcher import counters, launch
from lora_kernels.backends.operands import (
    accumulator,
    cdiv,
    on_16_bytes,
    operand,
    rank_block,
    row_major,
    stored,
    weight_operand,
)
from lora_kernels.backends.triton import reasons_unsupported  # noqa: F401

STRATEGIES = ("extended", "one_launch")
SHRINK_M = 16  # the narrowest MMA: rows of one adapter are rarely more
SHRINK_BYTES = 128  # of a row of x, a step
DECODE_ROWS = 256  # up to here K is split the same way whatever the batch, so that a row's sums are too


def strategy_reasons_unsupported(strategy: str, problem) -> list[str]:
    """Why `strategy` cannot run `problem`, which the backend itself can; empty if it can."""
    rows = configs.candidates(f"batched_{strategy}", problem.capability, problem.dtype.itemsize, problem.m, problem.r)
    return [] if rows else [f"no tile for {problem.m} rows, {problem.dtype}, on capability {problem.capability}"]


def forward(x, weight, bias, adapters, plan, strategy):
    """`y [M,N]`: `x W' + bias`, and each row's own adapter."""
    m, k = x.shape
    n, r_max = weight.shape[0], adapters.max_rank
    y = x.new_empty(m, n)
    if m == 0:
        return y
    x, bias = row_major(x), None if bias is None else bias.contiguous()
    w, kn = stored(weight.mT)
    goal = backend.target(x.device)
    aligned = on_16_bytes(x, w, y)
    tma = goal.tma and aligned
    config = backend._config(f"batched_{strategy}", x, n, r_max, aligned=aligned)
    block_r = rank_block(r_max, cap=32)
    row_tiles = cdiv(m, SHRINK_M)
    shrink_k = SHRINK_BYTES // x.element_size()
    split = min(cdiv(k, shrink_k), 8) if m <= DECODE_ROWS else 1
    planes = x.new_empty(split, m, r_max, dtype=accumulator(x))
    arithmetic = backend._arithmetic(x)
    shrink = dict(SHRINK_M=SHRINK_M, SHRINK_K=shrink_k)
    tiles = cdiv(m, config.block_m) * cdiv(n, config.block_n)
    operands = (operand(x, (config.block_m, config.block_k), tma), weight_operand(w, kn, config, tma))
    out = operand(y, (config.block_m, config.block_n), tma)
    table = (adapters.first_row, adapters.ranks)
    num_slots = adapters.ranks.shape[0]
    strides_b = adapters.strides_b
    tile = dict(BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_K=config.block_k, BLOCK_R=block_r)
    flags = dict(SPLIT=split, DTYPE=_triton_dtype(x.dtype), KN=kn, HAS_BIAS=bias is not None, TMA=tma, **arithmetic)
    with backend._on(x.device):
        if strategy == "one_launch":
            spill = x.new_empty(m, n, dtype=planes.dtype)
            zeros = counters(x.device, tiles + 1)
            args = (x, operands[1], adapters.a, adapters.b, bias, out, plan.slots, plan.order, *table, adapters.scalings,
                    planes, spill, zeros, zeros[1:], m, n, k, r_max, num_slots, row_tiles * split,
                    x.stride(0), w.stride(0), *strides_b)  # fmt: skip
            grid = (row_tiles * split + tiles, 1, 1)
            launch(_kernels().batched_one_launch_kernel, grid, args, tile | shrink | flags, config)
            return y
        args = (x, adapters.a, plan.slots, plan.order, *table, planes, m, k, r_max, num_slots, x.stride(0))
        constants = shrink | dict(BLOCK_R=block_r, SPLIT=split, **arithmetic)
        shrink_config = configs.Config(SHRINK_M, block_k=shrink_k, num_warps=4, num_stages=4 if shrink_k >= 64 else 2)
        launch(_kernels().batched_shrink_kernel, (row_tiles * split, 1, 1), args, constants, shrink_config)
        args = (*operands, adapters.b, bias, out, plan.slots, *table, adapters.scalings, planes, m, n, k, r_max, num_slots,
                x.stride(0), w.stride(0), *strides_b)  # fmt: skip
        constants = tile | dict(GROUP_M=config.group_m) | flags
        launch(_kernels().batched_extended_kernel, (min(tiles, goal.num_sms), 1, 1), args, constants, config)
    return y


def _kernels():
    from lora_kernels.kernels import batched

    return batched


def _triton_dtype(dtype):
    import triton.language as tl

    return getattr(tl, str(dtype).removeprefix("torch."))
