"""The layers whose launches the static gate compiles, for every row of the tile tables."""

import functools
from dataclasses import dataclass

import torch

from lora_kernels import configs, formats


@dataclass(frozen=True)
class Case:
    """A layer whose forward and backward pass are recorded; where `aligned`, all rows lie on 16-byte boundaries.

    In a batched layer the columns come in slices of `widths`, and a row has `per_row` adapters, weighted if several; they lie
    `packed`, as in a pool, or padded. Of a quantised `weight` the forward pass alone is recorded.
    """

    dtype: torch.dtype
    r: int
    m: int = 8192
    n: int = 4096
    k: int = 4096
    aligned: bool = True
    dropout_p: float = 0.0
    bias: bool = False
    tf32: bool = False
    lora_dtype: torch.dtype | None = None
    scaling_on_device: bool = False
    widths: tuple[int, ...] = ()
    per_row: int = 1
    packed: bool = False
    weight: int | None = None  # its place in VARIANTS


VARIANTS = [(name, options) for name, kind in formats.FORMATS.items() if kind.INSTRUCTIONS for options in kind.VARIANTS]
CASES = {  # by itemsize; every switch of every kernel is on in one case and off in another
    2: (
        Case(torch.bfloat16, 16),
        Case(torch.bfloat16, 64, bias=True, lora_dtype=torch.float32, scaling_on_device=True),
        Case(torch.bfloat16, 128),
        Case(torch.bfloat16, 64, dropout_p=0.1),
        Case(torch.bfloat16, 16, m=16),
        Case(torch.bfloat16, 31, m=8191, n=4095, k=4097, aligned=False),
        Case(torch.bfloat16, 100, m=8191, n=4095, k=4097, aligned=False),
        Case(torch.float16, 16),
    ),
    4: (
        Case(torch.float32, 16),
        Case(torch.float32, 128, bias=True),
        Case(torch.float32, 16, dropout_p=0.1),
        Case(torch.float32, 1, m=1001, n=999, k=1003, aligned=False),
        Case(torch.float32, 64, tf32=True),
    ),
}

BATCHED_CASES = {
    2: (
        Case(torch.bfloat16, 16, packed=True),
        Case(torch.bfloat16, 64, bias=True, per_row=2),
        Case(torch.bfloat16, 128, widths=(2048, 1024, 1024), packed=True),
        Case(torch.bfloat16, 31, m=8191, n=4095, k=4097, aligned=False, widths=(4000, 95)),
        Case(torch.bfloat16, 16, m=1),
        Case(torch.float16, 16),
    ),
    4: (
        Case(torch.float32, 16, packed=True),
        Case(torch.float32, 1, m=1001, n=999, k=1003, aligned=False, bias=True),
        Case(torch.float32, 64, tf32=True),
        Case(torch.float32, 16, m=1),
    ),
}


def cases_of(row: configs.Row) -> tuple[Case, ...]:
    """The layers that a row's tile is compiled for."""
    if row.kernel == "dequantize":
        dtype = {2: torch.bfloat16, 4: torch.float32}[row.itemsize]
        return tuple(Case(dtype, 16, n=1024, k=1024, weight=weight) for weight in range(len(VARIANTS)))
    if row.kernel.startswith("quantized_"):
        return tuple(
            Case(torch.bfloat16, 16, m=row.max_m, n=1024, k=1024, weight=weight) for weight in range(len(VARIANTS))
        )
    return (BATCHED_CASES if row.kernel.startswith("batched_") else CASES)[row.itemsize]


@functools.cache
def zeros(case: Case) -> formats.QuantizedWeight:
    """The quantised weight of a case, without data."""
    name, options = VARIANTS[case.weight]
    return formats.quantize(torch.zeros(case.n, case.k), name, **options).to("meta")
