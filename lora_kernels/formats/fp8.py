"""fp8: e4m3 values, and an fp32 scale for the tensor, each row, or each block of 128 x 128."""

import functools

import torch
from torch import Tensor, nn

from lora_kernels.formats.base import QuantizedWeight, cdiv, check_shape, check_tensor, is_extents, safe_scale

E4M3_MAX = 448.0
SCALES = (torch.float32, torch.bfloat16, torch.float16, torch.float8_e8m0fnu)  # fp32 holds all their values
SCALINGS = ("tensor", "row", "block")
NATIVE = 89  # the compute capability from which on there are instructions that convert e4m3


class FP8Weight(QuantizedWeight):
    """`w[n, k] = data[n, k] * scale[n // block[0], k // block[1]]`, multiplied in fp32.

    data   float8_e4m3fn `[N, K]`
    scale  fp32 `[ceil(N / block[0]), ceil(K / block[1])]`
    block  (N, K) is one scale for the tensor, (1, K) one for each row, (128, 128) what published checkpoints have
    dtype  of the weight before

    A scale multiplies; checkpoints call it `weight_scale_inv` all the same.

    >>> weight = FP8Weight.quantize(torch.tensor([[1.0, -3.5], [0.1, 7.0]]), scaling="row")
    >>> weight.scale.flatten().tolist(), weight.data.float().tolist()
    ([0.0078125, 0.015625], [[128.0, -448.0], [6.5, 448.0]])
    """

    name = "fp8"
    VARIANTS = ({"scaling": "tensor"}, {"scaling": "row"}, {"scaling": "block"})
    INSTRUCTIONS = 5
    LAYOUT = 2

    def __init__(self, data, scale, block, dtype=torch.bfloat16):
        check_tensor("data", data, (torch.float8_e4m3fn,), ("N", "K"))
        shape = check_shape(data.shape)
        _check_block("block", block)
        check_tensor("scale", scale, (torch.float32,), tuple(map(cdiv, shape, block)))
        super().__init__(shape, dtype, data=data, scale=scale)
        self.block = tuple(block)

    @property
    def options(self):
        return {"block": self.block}

    @property
    def layout(self):
        return self.block

    @classmethod
    def of_parts(cls, state, shape, layout):
        return cls(*state, tuple(layout))

    def _rows(self, start, stop):
        first = start // self.block[0]
        scale = self.scale[first : cdiv(stop, self.block[0])]
        if self.block[0] > 1:
            offset = start - first * self.block[0]
            scale = scale.repeat_interleave(self.block[0], 0)[offset : offset + stop - start]
        if scale.shape[1] > 1:
            scale = scale.repeat_interleave(self.block[1], 1)[:, : self.shape[1]]
        return self.data[start:stop].float() * scale

    def _tile(self, capability):
        (n, k), (rows, columns) = self.shape, self.block
        scale_n, scale_k = self.scale.stride()
        if rows >= n:
            rows, scale_n = 1, 0
        table = None if capability >= NATIVE else _values(self.device)
        layout = rows, columns if columns < k else 0
        return (self.data.view(torch.uint8), self.scale, table, k, scale_n, scale_k), layout

    @classmethod
    def _quantize(cls, values, dtype, scaling="row", block=None):
        if scaling not in SCALINGS:
            raise ValueError(f"scaling: got {scaling!r}, expected one of {', '.join(SCALINGS)}")
        n, k = values.shape
        block = {"tensor": (n, k), "row": (1, k), "block": (128, 128)}[scaling] if block is None else block
        _check_block("block", block)
        rows, cols = block
        padded = nn.functional.pad(values, (0, -k % cols, 0, -n % rows))
        blocks = padded.view(cdiv(n, rows), rows, cdiv(k, cols), cols)
        scale = safe_scale(blocks.abs().amax((1, 3)) / E4M3_MAX)
        data = (blocks / scale[:, None, :, None]).clamp_(-E4M3_MAX, E4M3_MAX).view(padded.shape)[:n, :k]
        return cls(data.contiguous().to(torch.float8_e4m3fn), scale, (rows, cols), dtype)

    @classmethod
    def from_checkpoint(cls, weight, weight_scale_inv, block_size=(128, 128), dtype=torch.bfloat16) -> "FP8Weight":
        """The `weight [N, K]` and `weight_scale_inv` of an fp8 checkpoint, sharing the codes.

        weight_scale_inv  fp32, bf16, fp16 or e8m0
        block_size        of the scales; None is one scale for the tensor, or one for each row, as their shape says
        """
        check_tensor("weight", weight, (torch.float8_e4m3fn,), ("N", "K"))
        if not isinstance(weight_scale_inv, Tensor) or weight_scale_inv.dtype not in SCALES:
            got = getattr(weight_scale_inv, "dtype", type(weight_scale_inv).__name__)
            raise TypeError(f"weight_scale_inv: got {got}, expected one of {', '.join(map(str, SCALES))}")
        n, k = weight.shape
        scale = weight_scale_inv.detach().float()
        if block_size is None:
            block_size = (n, k) if scale.numel() == 1 else (1, k)
            scale = scale.reshape(1 if scale.numel() == 1 else -1, 1)
        _check_block("block_size", block_size)
        check_tensor("weight_scale_inv", scale, (torch.float32,), tuple(map(cdiv, (n, k), block_size)))
        return cls(weight.detach(), scale, block_size, dtype)

    @classmethod
    def from_torchao(cls, weight) -> "FP8Weight":
        """torchao's float8 tensor, sharing its codes."""
        if not hasattr(weight, "qdata"):
            raise TypeError(f"weight: got {type(weight).__name__}, expected a float8 tensor of torchao")
        scale = weight.scale.float().reshape(tuple(map(cdiv, weight.qdata.shape, weight.block_size)))
        return cls(weight.qdata, scale, tuple(weight.block_size), weight.dtype)

    @classmethod
    def from_linear(cls, linear):
        weight = getattr(linear, "weight", None)
        if hasattr(linear, "weight_scale_inv") and weight.dtype == torch.float8_e4m3fn:
            return cls.from_checkpoint(weight, linear.weight_scale_inv, linear.block_size)
        if getattr(getattr(weight, "qdata", None), "dtype", None) == torch.float8_e4m3fn:
            return cls.from_torchao(weight)
        return None


def _check_block(name, block):
    if not is_extents(block):
        raise ValueError(f"{name}: got {block}, expected two positive ints")


@functools.cache
def _values(device):
    """`[256]`: the value of each byte."""
    with torch.inference_mode(False):
        return torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float().to(device)
