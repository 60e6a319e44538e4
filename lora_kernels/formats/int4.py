"""int4: four bits for each weight, with a scale and a zero point for each group along K. GPTQ's packing, transposed.

Frantar et al. 2022, arXiv:2210.17323 (GPTQ); Lin et al. 2023, arXiv:2306.00978 (AWQ).
"""

import torch
from torch import Tensor, nn

from lora_kernels.formats.base import QuantizedWeight, cdiv, check_shape, check_tensor, safe_scale

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # nibble i of an AWQ word, from the lowest, holds column 8 j + AWQ_ORDER[i]
SCALES = (torch.float16, torch.bfloat16, torch.float32)
HALF_AND_A_BIT = 1.0 + 2.0**-20  # ties, and what rounding has moved off a tie, go away from zero


class Int4Weight(QuantizedWeight):
    """`w[n, k] = (q[n, k] - zero[n, k // group_size]) * scale[n, k // group_size]`, multiplied in fp32.

    packed      int32 `[N, ceil(K / 8)]`; bits 4i to 4i + 3 of word j hold q[n, 8j + i], from the lowest
    scale       fp16, bf16 or fp32 `[N, ceil(K / group_size)]`
    zero        uint8 `[N, ceil(K / group_size)]`
    shape       `[N, K]`
    group_size  weights of a row that share scale and zero; the last group may be shorter
    dtype       of the weight before

    Any strides: GPTQ's `qweight [K / 8, N]` and `scales` are these, transposed.

    >>> weight = Int4Weight.quantize(torch.tensor([[-1.0, 0.0, 1.0, 2.0]]))
    >>> hex(weight.packed.item()), weight.zero.item(), round(weight.scale.item(), 4)  # q = 0, 5, 10, 15
    ('0xfa50', 5, 0.2)
    """

    name = "int4"
    VARIANTS = ({}, {"group_size": 32})
    INSTRUCTIONS = 11.0
    PARTS = (3,)
    LAYOUT = 1

    def __init__(self, packed, scale, zero, shape, group_size=128, dtype=torch.bfloat16):
        n, k = shape = check_shape(shape)
        _check_group_size(group_size)
        check_tensor("packed", packed, (torch.int32,), (n, cdiv(k, 8)))
        check_tensor("scale", scale, SCALES, (n, cdiv(k, group_size)))
        check_tensor("zero", zero, (torch.uint8,), (n, cdiv(k, group_size)))
        super().__init__(shape, dtype, packed=packed, scale=scale, zero=zero)
        self.group_size = group_size

    @property
    def options(self):
        return {"group_size": self.group_size}

    @property
    def layout(self):
        return (self.group_size,)

    @classmethod
    def of_parts(cls, state, shape, layout):
        return cls(*state, shape, *layout)

    def _rows(self, start, stop):
        k = self.shape[1]
        scale, zero = (
            t[start:stop].float().repeat_interleave(self.group_size, 1)[:, :k] for t in (self.scale, self.zero)
        )
        return unpack(self.packed[start:stop])[:, :k].sub(zero).mul_(scale)

    def _tile(self, capability):
        packed = self.packed.view(torch.uint8)
        operands = (packed, self.scale, self.zero, packed.shape[1], *self.scale.stride(), *self.zero.stride())
        return operands, (self.group_size,)

    @classmethod
    def _quantize(cls, values, dtype, group_size=128):
        _check_group_size(group_size)
        n, k = values.shape
        groups = nn.functional.pad(values, (0, -k % group_size)).view(n, -1, group_size)
        low, high = groups.amin(2).clamp_(max=0.0), groups.amax(2).clamp_(min=0.0)  # zero is always a value
        scale = safe_scale(high / 15 - low / 15)
        zero = -(low / scale + 0.5).floor()
        steps = groups / scale[..., None]
        rounded = steps.abs().mul_(HALF_AND_A_BIT).add_(0.5).floor_().copysign_(steps)
        q = (rounded + zero[..., None]).clamp_(0, 15).view(n, -1)[:, :k]
        return cls(pack(q.int()), scale, zero.to(torch.uint8), (n, k), group_size, dtype)

    @classmethod
    def from_gptq(cls, qweight, scales, qzeros, g_idx=None, *, zero_offset=1, dtype=torch.float16) -> "Int4Weight":
        """The tensors of a GPTQ checkpoint with 4 bits, sharing qweight and scales.

        qweight      int32 `[K / 8, N]`, eight k in a word, the lowest nibble first
        scales       fp16 `[K / group_size, N]`
        qzeros       int32 `[K / group_size, N / 8]`, eight n in a word, the lowest nibble first
        g_idx        `[K]`, the group of each k; only k // group_size can be taken (desc_act=False)
        zero_offset  what the file leaves off its zero points: 1 in the first version of the format, 0 in gptq_v2
        """
        check_tensor("qweight", qweight, (torch.int32,), ("K / 8", "N"))
        k, n = qweight.shape[0] * 8, qweight.shape[1]
        check_tensor("scales", scales, SCALES, ("K / group_size", n))
        if zero_offset not in (0, 1):
            raise ValueError(f"zero_offset: got {zero_offset!r}, expected 0 or 1")
        groups = len(scales)
        group_size = cdiv(k, groups)
        if g_idx is not None and not torch.equal(g_idx.long().cpu(), torch.arange(k) // group_size):
            raise NotImplementedError("g_idx: got groups in an order of their own (desc_act), expected k // group_size")
        check_tensor("qzeros", qzeros, (torch.int32,), (groups, cdiv(n, 8)))
        zero = (unpack(qzeros)[:, :n] + zero_offset).to(torch.uint8)
        return cls(qweight.mT, scales.mT, zero.mT, (n, k), group_size, dtype)

    @classmethod
    def from_awq(cls, qweight, scales, qzeros, dtype=torch.float16) -> "Int4Weight":
        """The tensors of an AWQ checkpoint (GEMM version), sharing scales; its codes are packed along N, so they are copied.

        qweight  int32 `[K, N / 8]`, nibble i of word j from the lowest: n = 8 j + (0, 2, 4, 6, 1, 3, 5, 7)[i]
        scales   fp16 `[K / group_size, N]`
        qzeros   int32 `[K / group_size, N / 8]`, packed as qweight
        """
        check_tensor("scales", scales, SCALES, ("K / group_size", "N"))
        groups, n = scales.shape
        check_tensor("qweight", qweight, (torch.int32,), ("K", cdiv(n, 8)))
        k = len(qweight)
        check_tensor("qzeros", qzeros, (torch.int32,), (groups, cdiv(n, 8)))
        order = torch.tensor(AWQ_ORDER, device=qweight.device).argsort()
        q, zero = (unpack(t).view(len(t), -1, 8)[..., order].flatten(1)[:, :n].mT for t in (qweight, qzeros))
        return cls(pack(q), scales.mT, zero.to(torch.uint8), (n, k), cdiv(k, groups), dtype)


def _check_group_size(group_size):
    if not isinstance(group_size, int) or group_size < 8 or group_size % 8:
        raise ValueError(f"group_size: got {group_size!r}, expected a positive multiple of 8")


def pack(q: Tensor) -> Tensor:
    """Integers from 0 to 15 `[rows, cols]` as int32 `[rows, ceil(cols / 8)]`, the lowest nibble first."""
    q = nn.functional.pad(q.int(), (0, -q.shape[1] % 8)).view(len(q), -1, 8)
    return (q << _shifts(q.device)).sum(2, dtype=torch.int32)


def unpack(packed: Tensor) -> Tensor:
    """The integers `[rows, 8 words]` (int32) of `packed [rows, words]`."""
    return ((packed[..., None] >> _shifts(packed.device)) & 15).flatten(1)


def _shifts(device):
    return torch.arange(0, 32, 4, dtype=torch.int32, device=device)
