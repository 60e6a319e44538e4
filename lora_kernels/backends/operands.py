"""How tensors become kernel operands: layouts, alignment, TMA descriptors, block sizes."""

import functools
import importlib
import importlib.util
from typing import Any, NamedTuple

import torch

from lora_kernels.formats import QuantizedWeight


def stored(w):
    """A matrix `w [K,N]` as it lies in memory, row-major, and whether that is `[K,N]` rather than `[N,K]`."""
    return (w.mT, False) if w.stride(0) == 1 else (row_major(w), True)


def row_major(x):
    """`x`, or a copy of it where its columns do not lie side by side."""
    return x if x.stride(-1) == 1 else x.contiguous()


def cast(tensor, like):
    """`tensor` in the dtype of `like`; a `to` that has nothing to do takes a microsecond."""
    return tensor if tensor.dtype is like.dtype else tensor.to(like.dtype)


def with_clean_rows(x):
    """`x [M,K]`, or a copy of it with zeros between its rows, where PyTorch's products would let in what lies there.

    With AMX, oneDNN 3.12 reads each row of a 16-bit operand on the left up to the next 32 elements, into the row below or
    the gap, and multiplies the rest by zero: a NaN there is one in y, and one tenant's NaN another's.
    """
    if not x.is_cpu or x.element_size() != 2 or not x.shape[1] % 32 or x.shape[0] == 0:
        return x
    m, k = x.shape
    return x.new_zeros(m, cdiv(k, 32) * 32)[:, :k].copy_(x)


def on_16_bytes(*matrices) -> bool:
    """Whether TMA can address row-major `matrices`: base and row stride on 16-byte boundaries, no overlapping rows."""
    for t in matrices:
        row = t.stride(0)
        if t.data_ptr() % 16 or row * t.element_size() % 16 or row < t.shape[1]:
            return False
    return True


def operand(matrix, block, tma=True):
    """What a kernel takes for a row-major `matrix` that it reads or writes in tiles of `block`."""
    if not tma:
        return matrix
    descriptor = object.__new__(_descriptor_type())  # __init__ would check again what on_16_bytes has
    descriptor.base, descriptor.shape, descriptor.strides = matrix, list(matrix.shape), [matrix.stride(0), 1]
    descriptor.block_shape, descriptor.padding = list(block), "zero"
    return descriptor


def weight_operand(w, kn, config, tma=True):
    """`operand` for what `stored` returned."""
    block = (config.block_k, config.block_n) if kn else (config.block_n, config.block_k)
    return operand(w, block, tma)


def contraction_first(weight):
    """`weight [N, K]` as `[K, N]`; a quantised one has no order to change."""
    return weight if isinstance(weight, QuantizedWeight) else weight.mT


class Base(NamedTuple):
    """A base weight as the kernels with a LOAD take it: dense, or one that they dequantise in their K loop.

    `matrices` have to lie on 16-byte boundaries for TMA; the codes of a quantised weight do.
    """

    w: Any
    load: Any
    layout: Any
    stride: int | None = None
    quantized: bool = True
    kn: bool = False

    @classmethod
    def of(cls, w, capability) -> "Base":
        """The base of a dense `w [K, N]`, or of a quantised weight that has a tile."""
        if isinstance(w, QuantizedWeight):
            operands, layout = w.tile(capability)
            return cls(operands, loads(w.name), layout)
        w, kn = stored(w)
        return cls(w, loads("dense"), kn, w.stride(0), False, kn)

    @property
    def matrices(self):
        return () if self.quantized else (self.w,)

    def kernel(self, name) -> str:
        """What the rows of the tables call the kernel `name` over this weight."""
        return f"quantized_{name}" if self.quantized else name

    def operand(self, config, tma):
        return self.w if self.quantized else weight_operand(self.w, self.kn, config, tma)

    @property
    def constants(self):
        return dict(LOAD=self.load, LAYOUT=self.layout)


@functools.cache
def loads(name):
    """The function of kernels/weights.py for the format of that name, or for "dense"."""
    from lora_kernels.kernels import weights

    return getattr(weights, name)


@functools.cache
def _descriptor_type():
    return importlib.import_module("triton.tools.tensor_descriptor").TensorDescriptor


@functools.cache
def has_host_descriptors() -> bool:
    """Whether this Triton, if any, takes TMA descriptors made on the host."""
    return (
        importlib.util.find_spec("triton") is not None
        and importlib.util.find_spec("triton.tools.tensor_descriptor") is not None
    )


def rank_block(r, cap=64):
    """The rank as an MMA takes it: a power of two from 16 to `cap`; longer ranks take several."""
    return max(16, 1 << (min(r, cap) - 1).bit_length())


def accumulator(x):
    """The dtype in which kernels add up x's products."""
    return torch.promote_types(x.dtype, torch.float32)


def cdiv(a, b):
    return -(-a // b)
