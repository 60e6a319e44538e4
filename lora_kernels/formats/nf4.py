"""nf4: 16 values between -1 and 1, four bits each, and an absmax for each block of weights. bitsandbytes' layout.

Dettmers et al. 2023, "QLoRA: Efficient Finetuning of Quantized LLMs", arXiv:2305.14314, section 3 and appendix E.
"""

import functools
import math
import warnings
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lora_kernels.formats.base import QuantizedWeight, cdiv, check_shape, check_tensor

# Quantiles of a normal distribution, scaled to [-1, 1], with an exact zero (arXiv:2305.14314, appendix E).
CODE = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
BLOCKSIZES = (64, 128, 256, 512)
NESTED_BLOCKSIZE = 256  # of absmax values under double quantisation


class Nested(NamedTuple):
    """What turns the uint8 `absmax` of double quantisation into numbers: `code[absmax[i]] * absmax_[i // 256] + offset`.

    absmax `[ceil(blocks / 256)]`, code `[256]`, offset `[]`; all fp32.
    """

    absmax: Tensor
    code: Tensor
    offset: Tensor


class NF4Weight(QuantizedWeight):
    """`w[i] = CODE[q[i]] * absmax[i // blocksize]` with i over the flattened `[N, K]`, multiplied in fp32.

    packed     uint8 `[ceil(N K / 2)]`; byte j holds q[2j] in its high nibble and q[2j + 1] in its low one
    absmax     fp32 `[ceil(N K / blocksize)]`, or uint8 with `nested`
    shape      `[N, K]`
    blocksize  64, 128, 256 or 512 weights
    dtype      of the weight before

    `scales()` are the absmax in fp32, nested or not. Raises TypeError or ValueError, naming the argument, otherwise.

    >>> weight = NF4Weight.quantize(torch.tensor([[-2.0, 0.0, 1.0, 2.0]]))
    >>> weight.packed.tolist(), weight.absmax.tolist()  # q = 0, 7, 12, 15
    ([7, 207], [2.0])
    >>> [round(value, 4) for value in weight.dequantize().flatten().tolist()]
    [-2.0, 0.0, 0.8814, 2.0]
    """

    name = "nf4"
    VARIANTS = ({}, {"blocksize": 256}, {"double_quant": True})
    INSTRUCTIONS = 9
    PARTS = (2, 5)
    LAYOUT = 1

    def __init__(self, packed, absmax, shape, blocksize=64, dtype=torch.bfloat16, nested: Nested | None = None):
        shape = check_shape(shape)
        _check_blocksize(blocksize)
        blocks = cdiv(shape.numel(), blocksize)
        check_tensor("packed", packed, (torch.uint8,), (cdiv(shape.numel(), 2),))
        check_tensor("absmax", absmax, (torch.float32 if nested is None else torch.uint8,), (blocks,))
        if nested is not None:
            groups = cdiv(blocks, NESTED_BLOCKSIZE)
            for name, tensor, size in zip(Nested._fields, nested, ((groups,), (256,), ()), strict=True):
                check_tensor(f"nested.{name}", tensor, (torch.float32,), size)
        parts = nested or Nested(None, None, None)
        super().__init__(
            shape, dtype, packed=packed, absmax=absmax,
            nested_absmax=parts.absmax, nested_code=parts.code, nested_offset=parts.offset,
        )  # fmt: skip
        self.blocksize = blocksize

    @property
    def options(self):
        return {"blocksize": self.blocksize, "double_quant": self.nested_code is not None}

    @property
    def layout(self):
        return (self.blocksize,)

    @classmethod
    def of_parts(cls, state, shape, layout):
        packed, absmax, *nested = state
        return cls(packed, absmax, shape, *layout, nested=Nested(*nested) if nested else None)

    def scales(self, first: int = 0, last: int | None = None) -> Tensor:
        """The fp32 absmax of the blocks from `first` to `last`."""
        absmax = self.absmax[first:last]
        if self.nested_code is None:
            return absmax
        groups = torch.arange(first, first + len(absmax), device=absmax.device) // NESTED_BLOCKSIZE
        return self.nested_code[absmax.int()] * self.nested_absmax[groups] + self.nested_offset

    def _tile(self, capability):
        nested = (self.nested_absmax, self.nested_code, self.nested_offset)
        layout = self.blocksize, math.gcd(self.blocksize, self.shape[1])
        return (self.packed, self.absmax, _code(self.device), *nested), layout

    def _rows(self, start, stop):
        size, k = self.blocksize, self.shape[1]
        first, end = start * k // size, stop * k
        begin = first * size  # where the block begins that the first element is in; even, so at the start of a byte
        packed = self.packed[begin // 2 : cdiv(end, 2)]
        values = _pairs(packed.device).index_select(0, packed.int()).flatten()[: end - begin]
        scales, whole = self.scales(first, cdiv(end, size)), len(values) // size
        values[: whole * size].view(whole, size).mul_(scales[:whole, None])
        values[whole * size :].mul_(scales[whole:])
        return values[start * k - begin :].view(stop - start, k)

    @classmethod
    def _quantize(cls, values, dtype, blocksize=64, double_quant=False):
        _check_blocksize(blocksize)
        shape = values.shape
        scaled, absmax = _scaled_blocks(values, blocksize)
        code = torch.tensor(CODE, device=values.device)
        q = torch.bucketize(scaled, (code[:-1] + code[1:]) / 2, out_int32=True)[: shape.numel()].to(torch.uint8)
        q = nn.functional.pad(q, (0, len(q) % 2), value=CODE.index(0.0))
        packed = q[::2] << 4 | q[1::2]
        if not double_quant:
            return cls(packed, absmax, shape, blocksize, dtype)
        offset, code = absmax.mean(), _dynamic_code(values.device)
        if not offset.isfinite():  # their sum is not, their mean is
            offset = absmax.double().mean().float()
        scaled, nested_absmax = _scaled_blocks(absmax - offset, NESTED_BLOCKSIZE)
        absmax = torch.bucketize(scaled, (code[:-1] + code[1:]) / 2, out_int32=True)[: len(absmax)].to(torch.uint8)
        return cls(packed, absmax, shape, blocksize, dtype, Nested(nested_absmax, code, offset))

    @classmethod
    def from_bitsandbytes(cls, weight) -> "NF4Weight":
        """A `bitsandbytes.nn.Params4bit` of type nf4, sharing its memory.

        On CPUs with bf16 instructions bitsandbytes repacks the weight in place at the first evaluation; that is undone
        here, in a copy of the codes. It has also rounded absmax to bf16 then, which cannot be: there is a warning.
        Raises TypeError for another type, ValueError for a weight not quantised yet or a table that is not nf4's.
        """
        state = getattr(weight, "quant_state", None)
        if state is None:
            raise ValueError("weight: has no quant_state, expected a quantised Params4bit (move its layer to a device)")
        if state.quant_type != "nf4":
            raise TypeError(f"weight: got quant_type {state.quant_type!r}, expected 'nf4'")
        shape, dtype = state.shape, state.dtype
        packed, absmax, nested = weight.data.view(torch.uint8), state.absmax, None
        if getattr(state, "packing_format_for_cpu", False):
            warnings.warn(
                "weight: bitsandbytes has repacked it for the CPU and rounded its absmax to bf16; the codes are unpacked, "
                "the absmax stay rounded. Convert a layer before its first evaluation to keep them",
                stacklevel=2,
            )
            packed, absmax, dtype = _unpacked_for_cpu(packed, shape), absmax.T.flatten().float(), state.original_dtype
        elif not torch.equal(state.code.cpu(), torch.tensor(CODE)):
            raise ValueError("weight: got a quant_state.code that is not nf4's table")
        elif state.nested:
            if state.state2.blocksize != NESTED_BLOCKSIZE:
                raise ValueError(
                    f"weight: got absmax in blocks of {state.state2.blocksize}, expected {NESTED_BLOCKSIZE}"
                )
            nested = Nested(state.state2.absmax, state.state2.code, state.offset)
        return cls(packed.flatten(), absmax, shape, state.blocksize, dtype, nested)

    @classmethod
    def from_linear(cls, linear):
        if hasattr(linear, "quant_state") and hasattr(linear.weight, "quant_type"):  # a Linear4bit
            return cls.from_bitsandbytes(linear.weight)
        return None


def _check_blocksize(blocksize):
    if not isinstance(blocksize, int) or blocksize not in BLOCKSIZES:
        raise ValueError(f"blocksize: got {blocksize!r}, expected one of {', '.join(map(str, BLOCKSIZES))}")


def _scaled_blocks(values, size):
    """`values`, flattened and padded to whole blocks, over the largest magnitude of their block; and these magnitudes."""
    flat = values.flatten()
    blocks = nn.functional.pad(flat, (0, -len(flat) % size)).view(-1, size)
    absmax = blocks.abs().amax(1)
    return (blocks * (1.0 / absmax.clamp(min=1e-38))[:, None]).clamp_(-1.0, 1.0).flatten(), absmax


@functools.cache
def _code(device) -> Tensor:
    with torch.inference_mode(False):
        return torch.tensor(CODE).to(device)


@functools.cache
def _pairs(device) -> Tensor:
    """`[256, 2]`: the two values of each byte, so that one lookup gives both."""
    with torch.inference_mode(False):
        code = _code(device)
        return torch.stack((code.repeat_interleave(16), code.repeat(16)), dim=1)


@functools.cache
def _dynamic_code(device) -> Tensor:
    """The 256 values of bitsandbytes' signed 8-bit dynamic type (Dettmers 2015, arXiv:1511.04561): seven decades.

    Decade i, from 1e-6 to 1, holds the middles of 2^i equal steps between a tenth of it and itself.
    """
    positive = []
    for i in range(7):
        edges = torch.linspace(0.1, 1.0, 2**i + 1, dtype=torch.float32)
        positive += (10 ** (i - 6) * ((edges[:-1] + edges[1:]) / 2.0)).tolist()
    values = sorted([*positive, *(-value for value in positive), 0.0, 1.0])
    with torch.inference_mode(False):
        return torch.tensor(values, dtype=torch.float32, device=device)


def _unpacked_for_cpu(packed, shape):
    """bitsandbytes' layout for CPU kernels, undone.

    There, 32 rows lie beside each other: for each byte column of theirs the 64 nibbles of (row, high before low), of which
    the first 32 are the low nibbles of 32 bytes and the last 32 the high ones.
    """
    n, k = shape
    groups = packed.view(-1, 32)
    nibbles = torch.cat((groups & 15, groups >> 4), dim=1).view(n // 32, k // 2, 32, 2).transpose(1, 2)
    return nibbles[..., 0] << 4 | nibbles[..., 1]
