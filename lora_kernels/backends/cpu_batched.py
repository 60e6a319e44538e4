"""The CPU's compiled kernels: every row its own adapters, with the base layer or added to PyTorch's. csrc/cpu/batched.h."""

import ctypes

import torch

from lora_kernels.backends import cpu_library
from lora_kernels.backends.cpu_library import DTYPES, Batch, Slice, batched
from lora_kernels.backends.operands import row_major, with_clean_rows
from lora_kernels.configs import cpu as configs

STRATEGIES = ("chained",)
reasons_unsupported = cpu_library.reasons_unsupported
strategy_reasons_unsupported = cpu_library.strategy_reasons_unsupported


def forward(x, weight, bias, adapters, plan, strategy):
    """`y [M,N]`: `x W' + bias`, and each row's own adapters; `adapters` is a tuple, one a slice of y's columns."""
    x = row_major(x)
    if not cpu_library.multiplies_base(x, weight, configs.BASE_ROWS):
        y = torch.nn.functional.linear(with_clean_rows(x), weight, bias)
        add(x, y, adapters, plan)
        return y
    x = cpu_library.in_pairs(x)
    bias = None if bias is None else bias.contiguous()
    y = torch.empty(x.shape[0], weight.shape[0], dtype=x.dtype)
    _run(x, y, adapters, plan, weight.data_ptr(), weight.stride(0), None if bias is None else bias.data_ptr())
    return y


def add(x, y, adapters, plan):
    """`y [M,N]` plus each row's own adapters, in place."""
    if x.shape[0] > 0:
        _run(row_major(x), y, adapters, plan, None, 0, None)


def _run(x, y, adapters, plan, w, stride_w, bias):
    memory = adapters[0].memory  # the next step of these adapters has the same plan, as a rule
    known, planned, stride, call, _ = memory.get("cpu", (None,) * 5)
    if known != adapters or planned is not plan or stride != y.stride(0):
        call, slices = _call(x, y, adapters, plan)
        memory["cpu"] = adapters, plan, y.stride(0), call, slices
    run, isa = batched()
    if not run(call, x.data_ptr(), x.stride(0), y.data_ptr(), w, stride_w, bias, torch.get_num_threads(), isa):
        ranks = sum(s.max_rank for s in adapters)
        raise MemoryError(f"lora_linear_batched: no memory for {plan.slots.numel()} x {ranks} elements of h")


def _call(x, y, adapters, plan):
    """What stays the same as long as adapters, plan and y's rows do, and what it points to."""
    fields, first_rank = [], 0
    for s in adapters:
        fields.append((
            s.a.data_ptr(), s.b.data_ptr(), s.first_row.data_ptr(), s.ranks.data_ptr(), s.scalings.data_ptr(),
            s.b.shape[1], *s.strides_b, s.max_rank, first_rank,
        ))  # fmt: skip
        first_rank += s.max_rank
    slices = (Slice * len(fields))(*fields)
    batch = Batch(
        slots=plan.slots.data_ptr(), order=plan.order.data_ptr(), slices=ctypes.addressof(slices),
        weights=None if plan.weights is None else plan.weights.data_ptr(), rows=x.shape[0], k=x.shape[1],
        columns=y.shape[1], stride_y=y.stride(0), adapters_per_row=plan.adapters_per_row,
        num_slots=adapters[0].ranks.shape[0], num_slices=len(fields), dtype=DTYPES[x.dtype],
    )  # fmt: skip
    return ctypes.byref(batch), slices
