"""Launches of the batched kernels: every row its own adapters. Operands as in `backends/triton.py`.

`adapters` is a tuple, one `LayerAdapters` a slice of y's columns; `plan` a `BatchPlan`.
"""

import functools
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lora_kernels import configs
from lora_kernels.backends import triton as backend
from lora_kernels.backends.launcher import counters, launch
from lora_kernels.backends.operands import (
    Base,
    accumulator,
    cdiv,
    contraction_first,
    on_16_bytes,
    operand,
    rank_block,
    row_major,
    with_clean_rows,
)
from lora_kernels.backends.triton import reasons_unsupported  # noqa: F401

STRATEGIES = configs.STRATEGIES["lora_linear_batched"]
GROUP = 4  # adapters whose b is loaded at once while decoding
DECODE_ROWS = 256  # up to here K is split the same way whatever the batch, so that a row's sums are too


def strategy_reasons_unsupported(strategy: str, problem) -> list[str]:
    """Why `strategy` cannot run `problem`, which the backend itself can; empty if it can."""
    rows = configs.candidates(f"batched_{strategy}", problem.capability, problem.dtype.itemsize, problem.m, problem.r)
    return [] if rows else [f"no tile for {problem.m} rows, {problem.dtype}, on capability {problem.capability}"]


def forward(x, weight, bias, adapters, plan, strategy):
    """`y [M,N]`: `x W' + bias`, and each row's own adapters."""
    m, n = x.shape[0], weight.shape[0]
    if m == 0:
        return x.new_empty(m, n)
    x, bias = backend.prepared(x, weight), None if bias is None else bias.contiguous()
    tables, h = _Tables.of(adapters), _H.of(x, adapters, plan)
    with backend.device_guard(x.device):
        if strategy == "one_launch":
            return _one_launch(x, weight, bias, tables, plan, h)
        if strategy == "chained":
            return _chained(x, weight, bias, tables, plan, h)
        _shrink(x, tables, plan, h)
        return _extended(x, weight, bias, tables, plan, h)


def add(x, y, adapters, plan):
    """`y [M,N]` plus each row's own adapters, in place."""
    if y.numel():
        x = row_major(x)
        tables, h = _Tables.of(adapters), _H.of(x, adapters, plan)
        with backend.device_guard(x.device):
            _shrink(x, tables, plan, h)
            _extended(x, None, None, tables, plan, h, y)


class _Tables(NamedTuple):
    """What the kernels read of the adapters: a tuple each, one item a slice."""

    a: tuple
    b: tuple
    first_row: tuple
    ranks: tuple
    scalings: tuple
    widths: tuple
    stride_bn: tuple
    stride_br: tuple

    @classmethod
    def of(cls, adapters):
        slices = ((s.a, s.b, s.first_row, s.ranks, s.scalings, s.b.shape[1], *s.strides_b) for s in adapters)
        return cls(*zip(*slices, strict=True))

    @property
    def num_slots(self):
        return len(self.ranks[0])


class _H(NamedTuple):
    """Where the shrink leaves h, `planes [SPLIT, entries, slices r_max]`, and how it is launched.

    `constants` are those of any kernel that reads h; `wide` ranks of b lie on a 16-byte boundary.
    """

    planes: Tensor
    r_max: int
    programs: int
    config: configs.Config
    constants: dict[str, Any]
    wide: int

    @classmethod
    def of(cls, x, adapters, plan):
        (m, k), entries = x.shape, plan.slots.numel()
        r_max = max(s.max_rank for s in adapters)
        aligned = on_16_bytes(x, *(s.a.flatten(0, -2) for s in adapters))
        config = backend.config_for("batched_shrink", x, r_max, r_max, aligned=aligned)
        split = min(cdiv(k, config.block_k), 8) if m <= DECODE_ROWS else 1
        planes = x.new_empty(split, entries, len(adapters) * r_max, dtype=accumulator(x))
        block_r = rank_block(r_max, cap=32)
        constants = dict(ADAPTERS=plan.adapters_per_row, BLOCK_R=block_r, SPLIT=split, **backend.arithmetic(x))
        wide = 16 // x.element_size()
        together = all(s.b.dim() == 3 and s.max_rank % wide == 0 for s in adapters)
        return cls(planes, r_max, cdiv(entries, config.block_m) * split, config, constants, wide if together else 1)

    @property
    def shrink_constants(self):
        return dict(SHRINK_M=self.config.block_m, SHRINK_K=self.config.block_k, COLUMNS=self.config.block_n)


def _shrink(x, tables, plan, h):
    args = (x, tables.a, plan.order, plan.segment, plan.distinct, tables.first_row, tables.ranks, h.planes, *x.shape,
            h.r_max, tables.num_slots, x.stride(0))  # fmt: skip
    launch(_kernels().shrink, (h.programs, 1, 1), args, h.shrink_constants | h.constants, h.config)


def _extended(x, weight, bias, tables, plan, h, y=None):
    """`x W' + bias` and the adapters; where `y` is given, the adapters are added to it instead."""
    (m, k), n, goal = x.shape, sum(tables.widths), backend.target(x.device)
    has_base, y = y is None, x.new_empty(m, n) if y is None else y
    base = Base.of(contraction_first(y if weight is None else weight), goal.capability)  # without a base it is not read
    aligned = on_16_bytes(x, *base.matrices, y)
    kernel = base.kernel("batched_extended") if has_base else "batched_chained"
    config = backend.config_for(kernel, x, n, h.r_max, aligned=aligned or base.quantized, kn=base.kn)
    tma = goal.tma and aligned and has_base
    y_tma = tma and _whole_tiles(tables, config)
    args = (
        operand(x, (config.block_m, config.block_k), tma), base.operand(config, tma), tables.b, bias,
        operand(y, (config.block_m, config.block_n), y_tma), plan.slots, plan.weights, tables.first_row, tables.ranks,
        tables.scalings, h.planes, tables.widths, m, y.stride(0), k, h.r_max, tables.num_slots, x.stride(0), base.stride,
        tables.stride_bn, tables.stride_br,
    )  # fmt: skip
    constants = dict(
        BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_K=config.block_k, GROUP_M=config.group_m, WIDE=h.wide,
        DTYPE=_triton_dtype(x.dtype), **base.constants, HAS_BASE=has_base, HAS_BIAS=bias is not None, TMA=tma, Y_TMA=y_tma,
        **h.constants,
    )  # fmt: skip
    tiles = cdiv(m, config.block_m) * _column_tiles(tables, config)
    launch(_kernels().extended, (min(tiles, goal.num_sms), 1, 1), args, constants, config)
    return y


def _chained(x, weight, bias, tables, plan, h):
    """The base layer by PyTorch, beside it the shrink on a stream of its own, and then the adapters in place."""
    if x.device.type != "cuda":
        _shrink(x, tables, plan, h)
        y = torch.nn.functional.linear(with_clean_rows(x), weight, bias)
    else:
        stream, side = torch.cuda.current_stream(x.device), _side_stream(x.device)
        side.wait_stream(stream)
        with torch.cuda.stream(side):
            _shrink(x, tables, plan, h)
        y = torch.nn.functional.linear(with_clean_rows(x), weight, bias)
        stream.wait_stream(side)  # also before anything that is read here can be freed or overwritten
    return _extended(x, weight, None, tables, plan, h, y)


def _one_launch(x, weight, bias, tables, plan, h):
    (m, k), n = x.shape, weight.shape[0]
    y = x.new_empty(m, n)
    goal = backend.target(x.device)
    base = Base.of(contraction_first(weight), goal.capability)
    aligned = on_16_bytes(x, *base.matrices, y)
    kernel = base.kernel("batched_one_launch")
    config = backend.config_for(kernel, x, n, h.r_max, aligned=aligned or base.quantized, kn=base.kn)
    tma = goal.tma and aligned
    y_tma = tma and _whole_tiles(tables, config)
    columns = _column_tiles(tables, config)
    tiles = cdiv(m, config.block_m) * columns
    parts = max(1, min(goal.num_sms // columns, k // (2 * config.block_k)))
    spill = x.new_empty(tiles, parts, config.block_m, config.block_n, dtype=h.planes.dtype)
    zeros = counters(x.device, tiles + 1)
    args = (
        x, base.operand(config, tma), tables.a, tables.b, bias, operand(y, (config.block_m, config.block_n), y_tma),
        plan.slots, plan.weights, plan.order, plan.segment, plan.distinct, tables.first_row, tables.ranks, tables.scalings,
        h.planes, spill, zeros, zeros[1:], tables.widths, m, n, k, h.r_max, tables.num_slots, h.programs, x.stride(0),
        base.stride, tables.stride_bn, tables.stride_br,
    )  # fmt: skip
    constants = dict(
        BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_K=config.block_k, GROUP=GROUP, WIDE=h.wide, PARTS=parts,
        DTYPE=_triton_dtype(x.dtype), **base.constants, HAS_BIAS=bias is not None, TMA=tma, Y_TMA=y_tma,
        **h.shrink_constants, **h.constants,
    )  # fmt: skip
    launch(_kernels().one_launch, (h.programs + tiles * parts, 1, 1), args, constants, config)
    return y


def _column_tiles(tables, config):
    return sum(cdiv(width, config.block_n) for width in tables.widths)


def _whole_tiles(tables, config):
    """Whether no tile reaches past its slice into the next: TMA would write there."""
    return all(width % config.block_n == 0 for width in tables.widths[:-1])


@functools.cache
def _side_stream(device):
    return torch.cuda.Stream(device)


@functools.cache
def _kernels():
    from lora_kernels.kernels import batched, decode

    return SimpleNamespace(
        shrink=batched.batched_shrink_kernel,
        extended=batched.batched_extended_kernel,
        one_launch=decode.batched_one_launch_kernel,
    )


@functools.cache
def _triton_dtype(dtype):
    import triton.language as tl

    return getattr(tl, str(dtype).removeprefix("torch."))
