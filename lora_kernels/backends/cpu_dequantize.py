"""The CPU's compiled dequantisation: the bits of `QuantizedWeight.dequantize`. csrc/cpu/dequantize.h."""

import torch
from torch import Tensor

from lora_kernels.backends import cpu_library
from lora_kernels.backends.cpu_library import DTYPES
from lora_kernels.formats import QuantizedWeight


def _nf4(weight):
    block = {"columns": weight.blocksize, "block_rows": 1, "block_columns": weight.blocksize}
    if weight.nested_code is None:
        return block | {"scale": weight.absmax}
    nested = {"nested_code": weight.nested_code, "nested_offset": weight.nested_offset}
    return block | nested | {"absmax": weight.absmax, "scale": weight.nested_absmax}


def _int8(weight):
    return {"columns": weight.shape[1], "block_rows": 1, "block_columns": weight.shape[1], "scale": weight.scale}


def _fp8(weight):
    rows, columns = weight.block
    return {"columns": weight.shape[1], "block_rows": rows, "block_columns": columns, "scale": weight.scale}


def _int4(weight):
    block = {"columns": weight.shape[1], "block_rows": 1, "block_columns": weight.group_size}
    return block | {"scale": weight.scale.float(), "zero": weight.zero}


OPERANDS = {"nf4": _nf4, "int8": _int8, "fp8": _fp8, "int4": _int4}  # in the order of csrc/lora.h


def dequantize(weight: QuantizedWeight, out: Tensor) -> bool:
    """Write the dense values to a contiguous `out [N, K]`; False where no compiled kernel can, and nothing was done."""
    codes = weight.state()[0]
    known = weight.name in OPERANDS and (codes.is_contiguous() or weight.name == "int4")
    if not known or out.dtype not in DTYPES or isinstance(cpu_library.library(), str):
        return False
    run, isa = cpu_library.operator("dequantize")
    operands = OPERANDS[weight.name](weight)
    operands |= {name: value.contiguous() for name, value in operands.items() if isinstance(value, Tensor)}
    number, threads = list(OPERANDS).index(weight.name), torch.get_num_threads()
    run(codes=codes, out=out, format=number, threads=threads, isa=isa, **operands)
    return True
