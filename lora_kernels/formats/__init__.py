"""Base-weight formats: a frozen weight in 4 or 8 bits, wherever a dense one goes. docs/formats.md has the layouts.

>>> import torch
>>> weight = quantize(torch.randn(32, 64), "nf4")
>>> weight.shape, weight.nbytes
(torch.Size([32, 64]), 1152)
"""

import importlib
import pkgutil

from torch import Tensor, nn

from lora_kernels.formats.base import QuantizedWeight
from lora_kernels.formats.fp8 import FP8Weight
from lora_kernels.formats.int4 import Int4Weight
from lora_kernels.formats.int8 import Int8Weight
from lora_kernels.formats.nf4 import NF4Weight
from lora_kernels.formats.scratch import release_scratch, scratch_bytes

for _file in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_file.name}")

_FIRST = NF4Weight, Int8Weight, FP8Weight, Int4Weight  # the order of errors, and of the static gate's record
FORMATS: dict[str, type[QuantizedWeight]] = {
    kind.name: kind for kind in dict.fromkeys((*_FIRST, *QuantizedWeight.__subclasses__()))
}

__all__ = [
    "FORMATS",
    "FP8Weight",
    "Int4Weight",
    "Int8Weight",
    "NF4Weight",
    "QuantizedWeight",
    "from_linear",
    "named",
    "quantize",
    "release_scratch",
    "scratch_bytes",
]


def named(name: str) -> type[QuantizedWeight]:
    """The format called `name`. Raises TypeError where that is no name, ValueError where no format is called so."""
    if not isinstance(name, str):
        raise TypeError(f"format: got {type(name).__name__}, expected one of {', '.join(FORMATS)}")
    if name not in FORMATS:
        raise ValueError(f"format: got {name!r}, expected one of {', '.join(FORMATS)}")
    return FORMATS[name]


def quantize(weight: Tensor, format: str, **options) -> QuantizedWeight:
    """`weight [N, K]` in the format of that name; `options` are those of its class's `quantize`, as are the errors."""
    return named(format).quantize(weight, **options)


def from_linear(linear: nn.Module) -> QuantizedWeight | None:
    """The weight of a layer that another library has quantised, sharing its memory; None for any other layer.

    Knows `Linear4bit` (nf4) and `Linear8bitLt` of bitsandbytes, `nn.Linear` over torchao's int8 and fp8 tensors, and layers
    with an fp8 weight and a `weight_scale_inv`, such as transformers' FP8Linear.
    Raises TypeError, ValueError or NotImplementedError for what these libraries have and no format here can hold.
    """
    for kind in FORMATS.values():
        if (weight := kind.from_linear(linear)) is not None:
            return weight
    return None
