"""The CPU's compiled kernels: every row its own adapters, with the base layer or added to PyTorch's. csrc/cpu/batched.h."""

import torch

from lora_kernels.backends import cpu_library
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
    _run(x, weight, bias, y, adapters, plan)
    return y


def add(x, y, adapters, plan):
    """`y [M,N]` plus each row's own adapters, in place."""
    if x.shape[0] > 0:
        _run(row_major(x), None, None, y, adapters, plan)


def _run(x, weight, bias, y, adapters, plan):
    run, isa = cpu_library.operator("batched")
    slices, num_slots = _slices(adapters), adapters[0].ranks.shape[0]
    run(x, weight, bias, y, plan.slots, plan.order, plan.weights, slices, num_slots, torch.get_num_threads(), isa)


def _slices(adapters):
    """The adapters' addresses and sizes, as the library packs them: they stay the same as long as the adapters do."""
    memory = adapters[0].memory
    known, slices = memory.get("cpu", (None, None))
    if known != adapters:
        pack, _ = cpu_library.operator("slices")
        slices = pack(*zip(*(one.fields for one in adapters), strict=True))
        memory["cpu"] = adapters, slices
    return slices
