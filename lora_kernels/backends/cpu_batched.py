"""The CPU's compiled kernels under PyTorch's base layer: every row its own adapters, in place. csrc/cpu/batched.h."""

import ctypes

import torch

from lora_kernels.backends import cpu_library
from lora_kernels.backends.cpu_library import DTYPES, Batch, Slice, batched
from lora_kernels.backends.operands import row_major, with_clean_rows

STRATEGIES = ("chained",)
reasons_unsupported = cpu_library.reasons_unsupported
strategy_reasons_unsupported = cpu_library.strategy_reasons_unsupported


def forward(x, weight, bias, adapters, plan, strategy):
    """`y [M,N]`: `x W' + bias`, and each row's own adapters; `adapters` is a tuple, one a slice of y's columns."""
    x = row_major(x)
    y = torch.nn.functional.linear(with_clean_rows(x), weight, bias)
    m, k = x.shape
    if m == 0:
        return y
    slices = _slices(adapters)
    batch = Batch(
        x.data_ptr(), y.data_ptr(), plan.slots.data_ptr(), plan.order.data_ptr(),
        None if plan.weights is None else plan.weights.data_ptr(), ctypes.addressof(slices), None, m, k, x.stride(0),
        y.stride(0), plan.adapters_per_row, adapters[0].ranks.shape[0], len(slices), DTYPES[x.dtype],
        torch.get_num_threads(),
    )  # fmt: skip
    run, isa = batched()
    if not run(batch, isa):
        ranks = sum(s.max_rank for s in adapters)
        raise MemoryError(f"lora_linear_batched: no memory for {plan.slots.numel()} x {ranks} elements of h")
    return y


def _slices(adapters):
    memory = adapters[0].memory
    known, slices = memory.get("cpu", (None, None))
    if known != adapters:
        fields, first_rank = [], 0
        for s in adapters:
            fields.append((
                s.a.data_ptr(), s.b.data_ptr(), s.first_row.data_ptr(), s.ranks.data_ptr(), s.scalings.data_ptr(),
                s.b.shape[1], *s.strides_b, s.max_rank, first_rank,
            ))  # fmt: skip
            first_rank += s.max_rank
        memory["cpu"] = adapters, slices = adapters, (Slice * len(fields))(*fields)
    return slices
