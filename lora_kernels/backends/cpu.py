"""The CPU's compiled kernels: one adapter, forward and backward. csrc/cpu/linear.h.

The strategy is `chained`: the adapter's term is written first and PyTorch's base GEMM accumulates onto it (beta = 1). Where
our own beat it, a pass is one call: in forward the term is the last part of the base layer's sums, in backward the first.
"""

import torch

from lora_kernels.backends import cpu_library
from lora_kernels.backends.operands import cast, row_major, with_clean_rows
from lora_kernels.configs import cpu as measured
from lora_kernels.reference import keep_threshold

STRATEGIES = ("chained",)
reasons_unsupported = cpu_library.reasons_unsupported
strategy_reasons_unsupported = cpu_library.strategy_reasons_unsupported


def reasons_slower(problem) -> list[str]:
    """Why `problem` is better left to PyTorch, where that was measured; empty where it was not."""
    isa = cpu_library.instruction_set()
    rank = measured.EAGER_FROM_RANK.get(isa, problem.r + 1)
    if problem.dropout or problem.r < rank or problem.m < measured.ROWS:
        return []
    if not problem.dtype == problem.lora_dtype == torch.bfloat16:
        return []
    return [f"with {isa} and without dropout PyTorch was faster from rank {rank} on"]


def forward(x, weight, bias, lora_a, lora_b, scaling, dropout_p, seed, strategy):
    """`y [M,N]` and `h [M,R] = scaling drop(x) Aᵀ`, both in x's dtype."""
    if x.shape[0] == 0:
        return x.new_empty(0, lora_b.shape[0]), x.new_empty(0, lora_b.shape[1])
    x, a, b = row_major(x), _operand(lora_a, x), _operand(lora_b, x)
    bias = None if bias is None else bias.contiguous()
    run, isa = cpu_library.operator("forward")
    if multiplies_base := cpu_library.multiplies_base(x, weight, measured.BASE_ROWS):
        x = cpu_library.in_pairs(x)
    w, threads = weight if multiplies_base else None, torch.get_num_threads()
    y, h = run(x, w, bias, a, b, scaling, *_dropout(dropout_p, seed), threads, isa)
    return y if multiplies_base else y.addmm_(with_clean_rows(x), weight.mT), h


def backward(dy, x, h, weight, lora_a, lora_b, scaling, dropout_p, seed, needs, strategy):
    """`(dx [M,K], da [R,K], db [N,R])`, None where `needs` says so; da and db in lora_a's dtype."""
    needs_x, needs_a, needs_b = needs
    if dy.shape[0] == 0:
        dx = dy.new_empty(0, weight.shape[1]) if needs_x else None
        return dx, torch.zeros_like(lora_a) if needs_a else None, torch.zeros_like(lora_b) if needs_b else None
    dy, a, b = row_major(dy), _operand(lora_a, dy), _operand(lora_b, dy)
    x, h = row_major(x) if needs_a else None, h.contiguous() if needs_b else None
    run, isa = cpu_library.operator("backward")
    multiplies_base = needs_x and cpu_library.multiplies_base(dy, weight, measured.DX_ROWS)
    w, dropout, threads = weight if multiplies_base else None, _dropout(dropout_p, seed), torch.get_num_threads()
    dx, da, db = run(dy, x, h, w, a, b, scaling, *dropout, needs_x, lora_a.dtype, threads, isa)
    if needs_x and not multiplies_base:
        dx.addmm_(with_clean_rows(dy), weight)
    return dx, da, db


def _operand(adapter, x):
    return row_major(cast(adapter, x))


def _dropout(dropout_p, seed):
    """The operators' seed, keep_threshold and keep_scale."""
    if dropout_p == 0.0:
        return None, 0, 1.0
    if seed.dtype is not torch.int64:  # whose memory is read
        raise TypeError(f"seed: got {seed.dtype}, expected torch.int64")
    return seed, keep_threshold(dropout_p), 1.0 / (1.0 - dropout_p)
