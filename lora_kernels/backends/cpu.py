"""The CPU's compiled kernels: one adapter, forward and backward. csrc/cpu/linear.h.

The strategy is `chained`: the adapter's term is written first and PyTorch's base GEMM accumulates onto it (beta = 1). Where
our own beat it, a pass is one call: in forward the term is the last part of the base layer's sums, in backward the first.
"""

import torch

from lora_kernels.backends import cpu_library
from lora_kernels.backends.cpu_library import DTYPES, LINEAR, linear
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
    m, (n, r) = x.shape[0], lora_b.shape
    y, h = x.new_empty(m, n), x.new_empty(m, r)
    if m == 0:
        return y, h
    x, a, b = row_major(x), _operand(lora_a, x), _operand(lora_b, x)
    bias = None if bias is None else bias.contiguous()
    run, _, isa = linear()
    if multiplies_base := cpu_library.multiplies_base(x, weight, measured.BASE_ROWS):
        x = cpu_library.in_pairs(x)
    call = _call(x, a, b, h, scaling, dropout_p, seed, bias, y, weight if multiplies_base else None)
    _check(run(call, isa), m, n, r)
    return y if multiplies_base else y.addmm_(with_clean_rows(x), weight.mT), h


def backward(dy, x, h, weight, lora_a, lora_b, scaling, dropout_p, seed, needs, strategy):
    """`(dx [M,K], da [R,K], db [N,R])`, None where `needs` says so; da and db in lora_a's dtype."""
    needs_x, needs_a, needs_b = needs
    m, k = dy.shape[0], weight.shape[1]
    dx = dy.new_empty(m, k) if needs_x else None
    make = torch.empty_like if m else torch.zeros_like
    da = make(lora_a, memory_format=torch.contiguous_format) if needs_a else None
    db = make(lora_b, memory_format=torch.contiguous_format) if needs_b else None
    if m and any(needs):
        dy, a, b = row_major(dy), _operand(lora_a, dy), _operand(lora_b, dy)
        x, h = row_major(x) if needs_a else dy, h.contiguous() if needs_b else None
        _, run, isa = linear()
        multiplies_base = needs_x and cpu_library.multiplies_base(dy, weight, measured.DX_ROWS)
        w = weight if multiplies_base else None
        call = _call(x, a, b, h, scaling, dropout_p, seed, None, None, w, dy, dx, da, db, lora_a.dtype)
        _check(run(call, isa), m, *lora_b.shape)
        if needs_x and not multiplies_base:
            dx.addmm_(with_clean_rows(dy), weight)
    return dx, da, db


def _operand(adapter, x):
    return row_major(cast(adapter, x))


def _pointer(tensor):
    return 0 if tensor is None else tensor.data_ptr()


def _call(x, a, b, h, scaling, dropout_p, seed, bias=None, y=None, w=None, dy=None, dx=None, da=None, db=None, to=None):
    """`to`: the dtype of da and db."""
    if dropout_p > 0.0 and seed.dtype is not torch.int64:  # whose memory is read
        raise TypeError(f"seed: got {seed.dtype}, expected torch.int64")
    drop, stride_w, stride_dy = dropout_p > 0.0, 0 if w is None else w.stride(0), 0 if dy is None else dy.stride(0)
    return LINEAR.pack(
        x.data_ptr(), a.data_ptr(), b.data_ptr(), _pointer(bias), _pointer(h), _pointer(w), _pointer(y), _pointer(dy),
        _pointer(dx), _pointer(da), _pointer(db), x.shape[0], b.shape[0], *a.shape[::-1],
        x.stride(0), stride_w, a.stride(0), b.stride(0), stride_dy,
        _pointer(seed) if drop else 0, keep_threshold(dropout_p) if drop else 0, 1.0 / (1.0 - dropout_p) if drop else 1.0,
        scaling, DTYPES[x.dtype], 0 if to is None else DTYPES[to], torch.get_num_threads(),
    )  # fmt: skip


def _check(done, m, n, r):
    if not done:
        raise MemoryError(f"lora_linear: no memory for packed operands: m = {m}, n = {n}, r = {r}")
