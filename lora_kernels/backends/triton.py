"""The Triton backend: operands, grids and configs for the kernels, and the only place that launches them.

Forward and backward share every launch. A wide operand comes as `w [K,N]`, contraction first: `weight.mT` for y, `weight`
for dx. The narrow ones come as `a [K,R]` and `b [R,N]`: `(lora_a.mT, lora_b.mT)` for y, `(lora_b, lora_a)` for dx.
"""

import contextlib
import functools
import importlib.util
import os
from types import SimpleNamespace
from typing import NamedTuple

import torch
from torch import Tensor

from lora_kernels import configs
from lora_kernels.backends.launcher import counters, launch
from lora_kernels.backends.operands import (
    Base,
    accumulator,
    cdiv,
    contraction_first,
    has_host_descriptors,
    on_16_bytes,
    operand,
    rank_block,
    row_major,
    stored,
    weight_operand,
    with_clean_rows,
)
from lora_kernels.configs import legality, tuned
from lora_kernels.formats import QuantizedWeight
from lora_kernels.reference import keep_threshold

STRATEGIES = configs.STRATEGIES["lora_linear"]
DY_PASS_MAX_RANK = legality.MAX_RANK["dy_pass"]  # above, the partial planes of g cost more than a second read of dy


class Target(NamedTuple):
    """The device as the launches see it; capability 0 is the interpreter, `name` what a tuned table goes by."""

    capability: int
    num_sms: int
    tma: bool
    name: str = ""


@functools.lru_cache(maxsize=64)
def target(device: torch.device) -> Target:
    """The target for tensors on `device`."""
    if device.type != "cuda":
        return Target(configs.INTERPRETER, num_sms=3, tma=True)
    major, minor = torch.cuda.get_device_capability(device)
    num_sms = torch.cuda.get_device_properties(device).multi_processor_count
    name = torch.cuda.get_device_name(device)
    return Target(10 * major + minor, num_sms, major >= 9 and has_host_descriptors(), name)


def reasons_unsupported(problem) -> list[str]:
    """Why this backend cannot run `problem`; empty if it can."""
    if importlib.util.find_spec("triton") is None:
        return ["triton is not installed (pip install triton)"]
    if problem.device == "cpu":
        if os.environ.get("TRITON_INTERPRET") != "1":
            return ["x is on the CPU, and Triton compiles for GPUs (TRITON_INTERPRET=1 interprets the kernels)"]
        if torch.bfloat16 in (problem.dtype, problem.lora_dtype) and not _interpreter_is_mended():
            return ["Triton's interpreter miscomputes bfloat16 (call lora_kernels.testing.mend_interpreter() first)"]
        return []
    if problem.device != "cuda":
        return [f"x is on {problem.device}, expected cuda"]
    if problem.capability < 80:
        return [f"compute capability {problem.capability / 10}, expected 8.0 or newer"]
    if problem.dtype == torch.float64:
        return ["float64 has no Triton kernel on a GPU"]
    return []


def strategy_reasons_unsupported(strategy: str, problem) -> list[str]:
    """Why `strategy` cannot run `problem`, which the backend itself can; empty if it can."""
    reasons = []
    if strategy in ("single_pass", "one_launch"):
        if problem.dropout:
            reasons.append("dropout > 0: the adapter would need a second, masked copy of every x tile")
        if problem.r > (most := legality.MAX_RANK[strategy]):
            reasons.append(f"rank {problem.r} > {most}: h does not fit beside the accumulator")
    if strategy == "one_launch":
        if problem.dtype == torch.float32 and problem.device == "cuda":
            reasons.append("float32: the table has no tile that leaves room for h")
        if not problem.tma:
            reasons.append(
                "needs TMA: sm_90 or newer, and rows of x, weight, lora_a, lora_b and y on 16-byte boundaries"
            )
    return reasons


def tma_applies(x, weight, *lora) -> bool:
    """Whether every operand of the problem can be addressed by TMA; what is copied on the way in always can."""
    if (x.is_cpu and os.environ.get("TRITON_INTERPRET") != "1") or not target(x.device).tma:
        return False
    itemsize, (n, k) = x.element_size(), weight.shape
    if n * itemsize % 16 or k * itemsize % 16 or (lora and lora[0].shape[0] * itemsize % 16):
        return False
    used_as_is = [t for t in (x, stored(weight)[0], *lora) if t.stride(-1) == 1 and t.dtype == x.dtype]
    return on_16_bytes(*used_as_is)


def forward(x, weight, bias, lora_a, lora_b, scaling, dropout_p, seed, strategy):
    """`y [M,N]` and `h [M,R] = scaling drop(x) Aᵀ`, both in x's dtype."""
    m, n, r = x.shape[0], weight.shape[0], lora_a.shape[0]
    if m == 0:
        return x.new_empty(0, n), x.new_empty(0, r)
    x, w, a, b = prepared(x, weight), contraction_first(weight), lora_a.to(x.dtype).mT, lora_b.to(x.dtype).mT
    bias = None if bias is None else bias.contiguous()
    with device_guard(x.device):
        if strategy == "single_pass":
            return _single_pass(x, w, a, b, bias, scaling)
        if strategy == "one_launch":
            return _one_launch(x, w, a, b, bias, scaling)
        h = _shrink(x, a, scaling, dropout_p, seed)
        if strategy == "extended":
            return _extended(x, w, h, b, bias), h
        y = torch.nn.functional.linear(with_clean_rows(h), b.mT, bias)
        return y.addmm_(with_clean_rows(x), w), h


def backward(dy, x, h, weight, lora_a, lora_b, scaling, dropout_p, seed, needs, strategy):
    """`(dx [M,K], da [R,K], db [N,R])`, None where `needs` says so; da and db in lora_a's dtype."""
    needs_x, needs_a, needs_b = needs
    m, k = dy.shape[0], weight.shape[1]
    if m == 0:
        zeros = (dy.new_empty(0, k), torch.zeros_like(lora_a), torch.zeros_like(lora_b))
        return tuple(grad if need else None for grad, need in zip(zeros, needs, strict=True))
    dy, a, b = row_major(dy), lora_b.to(dy.dtype), lora_a.to(dy.dtype)
    dx = da = db = g = None
    with device_guard(dy.device):
        if needs_x and strategy == "one_launch":
            dx, g = _one_launch(dy if on_16_bytes(dy) else dy.clone(), weight, a, b, None, scaling)
        elif needs_b and (needs_x or needs_a) and lora_a.shape[0] <= DY_PASS_MAX_RANK:
            g, db = _dy_pass(dy, a, h, scaling, lora_b.dtype)
        elif needs_x or needs_a:
            g = _shrink(dy, a, scaling)
        if needs_b and db is None:
            db = _wgrad(dy, h, torch.empty_like(lora_b, memory_format=torch.contiguous_format))
        if needs_x and dx is None:
            if strategy == "chained":
                dx = _drop_in_place(with_clean_rows(g).mm(b), dropout_p, seed).addmm_(with_clean_rows(dy), weight)
            else:
                dx = _extended(dy, weight, g, b, None, dropout_p, seed)
        if needs_a:
            da = torch.empty_like(lora_a, memory_format=torch.contiguous_format)
            _wgrad(row_major(x), g, da.mT, dropout_p, seed)
    return dx, da, db


def _extended(x, w, h, b, bias, dropout_p=0.0, seed=None):
    m, k = x.shape
    r, n = b.shape
    y = x.new_empty(m, n)
    goal = target(x.device)
    base = Base.of(w, goal.capability)
    aligned = on_16_bytes(x, *base.matrices, y)
    config = config_for(base.kernel("extended"), x, n, r, dropout_p, aligned or base.quantized, base.kn)
    tma = goal.tma and aligned
    block_r = rank_block(r, cap=64)
    operands = (operand(x, (config.block_m, config.block_k), tma), base.operand(config, tma))
    out = operand(y, (config.block_m, config.block_n // (2 if config.halves else 1)), tma)
    threshold, keep_scale = _dropout(dropout_p)
    args = (*operands, h, b, bias, out, seed, threshold, keep_scale, m, n, k, r,
            x.stride(0), base.stride, *b.stride(), y.stride(0))  # fmt: skip
    constants = dict(
        BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_K=config.block_k, BLOCK_R=block_r,
        RANK_BLOCKS=cdiv(r, block_r), GROUP_M=config.group_m, HALVES=config.halves, **base.constants,
        DROPOUT=dropout_p > 0.0, HAS_BIAS=bias is not None, **arithmetic(x), TMA=tma,
    )  # fmt: skip
    tiles = cdiv(m, config.block_m) * cdiv(n, config.block_n)
    launch(_kernels().gemm.extended_kernel, (min(tiles, goal.num_sms), 1, 1), args, constants, config)
    return y


def _single_pass(x, w, a, b, bias, scaling):
    m, k = x.shape
    r, n = b.shape
    y, h = x.new_empty(m, n), x.new_empty(m, r)
    w, kn = stored(w)
    a = row_major(a.mT)
    aligned = on_16_bytes(x, w, y, a)
    config = config_for("single_pass", x, n, r, aligned=aligned, kn=kn)
    tma = target(x.device).tma and aligned
    block_r = rank_block(r)
    scaling, on_device = _scaling(scaling, x)
    args = (
        operand(x, (config.block_m, config.block_k), tma), weight_operand(w, kn, config, tma),
        operand(a, (block_r, config.block_k), tma), b, bias,
        operand(y, (config.block_m, config.block_n // (2 if config.halves else 1)), tma),
        h, scaling, m, n, k, r, x.stride(0), w.stride(0), a.stride(0), *b.stride(), y.stride(0),
    )  # fmt: skip
    constants = dict(
        BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_K=config.block_k, BLOCK_R=block_r, GROUP_M=config.group_m,
        HALVES=config.halves, KN=kn, HAS_BIAS=bias is not None, SCALING_ON_DEVICE=on_device, **arithmetic(x), TMA=tma,
    )  # fmt: skip
    tiles = cdiv(m, config.block_m) * cdiv(n, config.block_n)
    launch(_kernels().gemm.single_pass_kernel, (tiles, 1, 1), args, constants, config)
    return y, h


def _one_launch(x, w, a, b, bias, scaling):
    m, k = x.shape
    r, n = b.shape
    y, h = x.new_empty(m, n), x.new_empty(m, r)
    goal = target(x.device)
    (w, kn), (a, a_kr) = stored(w), stored(a)
    config = config_for("one_launch", x, n, r, kn=kn)
    block_r = rank_block(r)
    scaling, on_device = _scaling(scaling, x)
    tiles_m = cdiv(m, config.block_m)
    tiles = tiles_m * cdiv(n, config.block_n)
    ticket_and_flags = counters(x.device, tiles_m + 1)
    args = (
        operand(x, (config.block_m, config.block_k)), weight_operand(w, kn, config),
        operand(a, (config.block_k, block_r) if a_kr else (block_r, config.block_k)), b, bias,
        operand(y, (config.block_m, config.block_n // (2 if config.halves else 1))),
        h, ticket_and_flags[1:], ticket_and_flags, scaling, m, n, k, r, *b.stride(),
    )  # fmt: skip
    constants = dict(
        BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_K=config.block_k, BLOCK_R=block_r, GROUP_M=config.group_m,
        HALVES=config.halves, KN=kn, A_KR=a_kr, HAS_BIAS=bias is not None, SCALING_ON_DEVICE=on_device, **arithmetic(x),
        STAGES=config.num_stages, SHRINK_STAGES=config.num_stages - 1,
    )  # fmt: skip
    launch(_kernels().gemm.one_launch_kernel, (min(tiles, goal.num_sms), 1, 1), args, constants, config)
    return y, h


def _shrink(x, a, scaling, dropout_p=0.0, seed=None):
    m, k = x.shape
    r = a.shape[1]
    h = x.new_empty(m, r)
    goal, aligned = target(x.device), on_16_bytes(x)
    config = config_for("shrink", x, r, r, dropout_p, aligned)
    block_r = rank_block(r, cap=128)
    programs = cdiv(m, config.block_m) * cdiv(r, block_r)
    split = max(1, min(goal.num_sms // programs, cdiv(k, config.block_k), 16))
    tma = goal.tma and aligned
    scaling, on_device = _scaling(scaling, x)
    threshold, keep_scale = _dropout(dropout_p)
    out = h if split == 1 else x.new_empty(split, m, r, dtype=accumulator(x))
    args = (operand(x, (config.block_m, config.block_k), tma), a, out, seed, scaling, threshold, keep_scale,
            m, k, r, x.stride(0), a.stride(1), a.stride(0))  # fmt: skip
    constants = dict(
        BLOCK_M=config.block_m, BLOCK_K=config.block_k, BLOCK_R=block_r, SPLIT=split, DROPOUT=dropout_p > 0.0,
        SCALING_ON_DEVICE=on_device, **arithmetic(x), TMA=tma,
    )  # fmt: skip
    grid = (cdiv(m, config.block_m), cdiv(r, block_r), split)
    launch(_kernels().shrink.shrink_kernel, grid, args, constants, config)
    return h if split == 1 else _sum_planes(out, h, scaling)


def _dy_pass(dy, b, h, scaling, dtype):
    m, n = dy.shape
    r = b.shape[1]
    goal, aligned = target(dy.device), on_16_bytes(dy)
    config = config_for("dy_pass", dy, n, r, aligned=aligned)
    blocks = cdiv(n, config.block_n)
    chunk, parts = _chunks(m, config.block_m, goal.num_sms // blocks)
    g, db = dy.new_empty(m, r), dy.new_empty(n, r, dtype=dtype)
    g_planes = dy.new_empty(blocks, m, r, dtype=accumulator(dy))
    db_planes = dy.new_empty(parts, n, r, dtype=accumulator(dy))
    tma = goal.tma and aligned
    args = (operand(dy, (config.block_m, config.block_n), tma), b, h, g_planes, db_planes, m, n, r, chunk,
            dy.stride(0), *b.stride())  # fmt: skip
    constants = dict(BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_R=rank_block(r), **arithmetic(dy), TMA=tma)
    launch(_kernels().wgrad.dy_pass_kernel, (blocks, parts, 1), args, constants, config)
    return _sum_planes(g_planes, g, scaling), _sum_planes(db_planes, db)


def _wgrad(wide, narrow, out, dropout_p=0.0, seed=None):
    """`out [C,R] = drop(wide)ᵀ narrow`; out is dense, in either order."""
    m, c = wide.shape
    r = narrow.shape[1]
    goal, aligned = target(wide.device), on_16_bytes(wide)
    config = config_for("wgrad", wide, c, r, dropout_p, aligned)
    block_r = rank_block(r, cap=128)
    blocks = cdiv(c, config.block_n) * cdiv(r, block_r)
    chunk, parts = _chunks(m, config.block_m, 2 * goal.num_sms // blocks)
    planes = out
    if parts > 1:
        planes = torch.empty_strided((parts, c, r), (c * r, *out.stride()), dtype=accumulator(wide), device=wide.device)
    tma = goal.tma and aligned
    threshold, keep_scale = _dropout(dropout_p)
    args = (operand(wide, (config.block_m, config.block_n), tma), narrow, planes, seed, threshold, keep_scale,
            m, c, r, chunk, wide.stride(0), *planes.stride()[-2:])  # fmt: skip
    constants = dict(
        BLOCK_M=config.block_m,
        BLOCK_C=config.block_n,
        BLOCK_R=block_r,
        DROPOUT=dropout_p > 0.0,
        **arithmetic(wide),
        TMA=tma,
    )
    grid = (cdiv(c, config.block_n), cdiv(r, block_r), parts)
    launch(_kernels().wgrad.wgrad_kernel, grid, args, constants, config)
    return out if parts == 1 else _sum_planes(planes, out)


def _sum_planes(planes, out, scaling=1.0):
    """Write `scaling Σ planes [P, ...]` into `out`, whose memory is laid out as each plane's."""
    scaling, on_device = _scaling(scaling, planes)
    constants = dict(BLOCK=1024, SCALING_ON_DEVICE=on_device, ACC=arithmetic(planes)["ACC"])
    args = (planes, out, scaling, out.numel(), planes.shape[0])
    grid = (cdiv(out.numel(), 1024), 1, 1)
    launch(_kernels().shrink.sum_planes_kernel, grid, args, constants, configs.Config(block_m=1024))
    return out


def _drop_in_place(x, dropout_p, seed):
    if dropout_p == 0.0:
        return x
    m, k = x.shape
    constants = dict(BLOCK_M=16, BLOCK_K=256, ACC=arithmetic(x)["ACC"])
    args = (x, seed, *_dropout(dropout_p), m, k)
    launch(_kernels().shrink.drop_kernel, (cdiv(m, 16), cdiv(k, 256), 1), args, constants, configs.Config(block_m=16))
    return x


@functools.cache
def _kernels():
    from lora_kernels.kernels import gemm, shrink, wgrad

    return SimpleNamespace(gemm=gemm, shrink=shrink, wgrad=wgrad)


def _interpreter_is_mended() -> bool:
    from triton.runtime.interpreter import InterpreterBuilder

    return getattr(InterpreterBuilder, "_lora_kernels_mended", False)


def prepared(x, weight):
    """`x`, or a copy of it that a kernel which dequantises `weight` in its K loop can read 16 bytes at a time."""
    x = row_major(x)
    return x.clone() if isinstance(weight, QuantizedWeight) and not on_16_bytes(x) else x


def device_guard(device):
    if device.type != "cuda" or device.index in (None, torch.cuda.current_device()):
        return contextlib.nullcontext()
    return torch.cuda.device(device)


def config_for(kernel, x, n, r, dropout_p=0.0, aligned=True, kn=False):
    m, k = x.shape
    return _lookup(kernel, target(x.device), x.dtype, m, n, k, r, dropout_p > 0.0, aligned, kn)


@functools.lru_cache(maxsize=4096)
def _lookup(kernel, goal, dtype, m, n, k, r, dropout, aligned, kn):
    if choice := tuned_config(kernel, goal.name, dtype, m, n, k, r, dropout, aligned, kn):
        return choice.value
    return configs.lookup(kernel, goal.capability, dtype.itemsize, m, n, r, goal.num_sms, dropout, aligned)


def tuned_config(kernel, device: str, dtype, m, n, k, r, dropout=False, aligned=True, kn=False) -> tuned.Choice | None:
    """What was measured for a kernel's launch on `device`, if anything; nothing is for rows off 16-byte boundaries."""
    if not aligned:
        return None
    name = str(dtype).removeprefix("torch.")
    return tuned.table(device).get(tuned.Key(kernel, tuned.bucket(m), n, k, r, name, dropout, kn))


def tf32_allowed() -> bool:
    """Whether fp32 products may run on tensor cores, as `torch.backends.cuda.matmul` says."""
    matmul = torch.backends.cuda.matmul
    # Reading allow_tf32 raises once fp32_precision has been set, which older versions do not have.
    return matmul.fp32_precision == "tf32" if hasattr(matmul, "fp32_precision") else matmul.allow_tf32


def arithmetic(x):
    return _constants_of(x.dtype, x.dtype == torch.float32 and tf32_allowed())


@functools.cache
def _constants_of(dtype, tf32):
    import triton.language as tl

    acc = tl.float64 if dtype == torch.float64 else tl.float32
    return dict(ACC=acc, PRECISION="tf32" if tf32 else "ieee")


def _dropout(dropout_p):
    return (keep_threshold(dropout_p), 1.0 / (1.0 - dropout_p)) if dropout_p > 0.0 else (0, 1.0)


def _scaling(scaling, x):
    """Scaling as a kernel argument, and whether that is a pointer: a GPU tensor is never read on the host."""
    if isinstance(scaling, Tensor) and scaling.device == x.device:
        return scaling, True
    return float(scaling), False


def _chunks(m, block_m, parts):
    """Rows per partial sum, a multiple of `block_m`, and how many partial sums that makes, at most about `parts`."""
    chunk = block_m * cdiv(cdiv(m, max(parts, 1)), block_m)
    return chunk, cdiv(m, chunk)
