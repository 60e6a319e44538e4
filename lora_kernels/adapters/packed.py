"""One adapter in host memory: checked, in the pool's dtype, and packed so that one transfer moves it."""

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from lora_kernels.adapters.checkpoint import _short
from lora_kernels.functional import DTYPES


class PackedAdapter(NamedTuple):
    """flat holds A `[R, K]` and then B transposed, `[R, N]`, of each layer; ranks and scalings are `[layers]`."""

    flat: Tensor
    ranks: Tensor
    scalings: Tensor

    @property
    def rank(self) -> int:
        return int(self.ranks.max())

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self)

    def to(self, device: torch.device) -> "PackedAdapter":
        """A copy on `device`, or itself if it is there."""
        return PackedAdapter(*(tensor.to(device, non_blocking=True) for tensor in self))

    def views(self, flat: Tensor, shapes: Mapping[str, tuple[int, int]]) -> Iterator[tuple[str, Tensor, Tensor]]:
        """`(layer, A, Bᵀ)` in `flat`, which is `self.flat` or a copy of it, for the layers that are adapted."""
        adapted = [
            (layer, r, shape) for (layer, shape), r in zip(shapes.items(), self.ranks.tolist(), strict=True) if r
        ]
        parts = flat.split([r * size for _, r, shape in adapted for size in shape])
        for (layer, r, (k, n)), a, b in zip(adapted, parts[::2], parts[1::2], strict=True):
            yield layer, a.view(r, k), b.view(r, n)


def pack(name: str, tensors, shapes, max_rank: int, dtype: torch.dtype, pinned: bool) -> PackedAdapter:
    """Check `{layer: (lora_a, lora_b, scaling)}` against `{layer: (K, N)}`, and copy it: TypeError, ValueError."""
    adapter = f"adapter {_short(name)}"
    if not isinstance(tensors, Mapping):
        raise TypeError(f"{adapter}: got a {type(tensors).__name__}, expected {{layer: (lora_a, lora_b, scaling)}}")
    if not tensors:
        raise ValueError(f"{adapter}: got no tensors, expected {{layer: (lora_a, lora_b, scaling)}}")
    for layer, parts in tensors.items():
        _check(f"{adapter}: {_short(layer)}", layer, parts, shapes, max_rank)
    ranks = [tensors[layer][0].shape[0] if layer in tensors else 0 for layer in shapes]
    scalings = [tensors[layer][2] if layer in tensors else 0.0 for layer in shapes]
    size = sum(r * (k + n) for r, (k, n) in zip(ranks, shapes.values(), strict=True))
    packed = PackedAdapter(
        torch.empty(size, dtype=dtype, pin_memory=pinned),
        torch.tensor(ranks, dtype=torch.int32, pin_memory=pinned),
        torch.tensor(scalings, dtype=torch.float32, pin_memory=pinned),
    )
    for layer, *views in packed.views(packed.flat, shapes):
        a, b, _ = tensors[layer]
        for which, view, tensor in zip("AB", views, (a, b.mT), strict=True):
            if not view.copy_(tensor).isfinite().all():
                where = f"{adapter}: {layer}: lora_{which}"
                raise ValueError(f"{where} has NaN or Inf in {dtype} (from {tensor.dtype}), expected none")
    return packed


def _check(where, layer, parts, shapes, max_rank):
    if layer not in shapes:
        raise ValueError(f"{where}: is no layer of this pool, which has {listed(shapes)}")
    if not isinstance(parts, tuple) or len(parts) != 3:
        raise TypeError(f"{where}: got a {type(parts).__name__}, expected a triple (lora_a, lora_b, scaling)")
    a, b, scaling = parts
    for which, tensor in (("lora_A", a), ("lora_B", b)):
        if not isinstance(tensor, Tensor) or tensor.layout != torch.strided or tensor.dtype not in DTYPES:
            got = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
            raise TypeError(f"{where}: {which} is {got}, expected a dense tensor of {', '.join(map(str, DTYPES))}")
        if tensor.is_meta:
            raise ValueError(f"{where}: {which} is a meta tensor, expected one with data")
    k, n = shapes[layer]
    r = a.shape[0] if a.dim() else 0
    if list(a.shape) != [r, k] or list(b.shape) != [n, r]:
        shapes = f"lora_A is {list(a.shape)} and lora_B {list(b.shape)}"
        raise ValueError(f"{where}: {shapes}, expected [R, {k}] and [{n}, R]")
    if not 1 <= r <= max_rank:
        raise ValueError(f"{where}: rank is {r}, expected 1 <= rank <= {max_rank}, the max_rank of this pool")
    if isinstance(scaling, bool) or not isinstance(scaling, (int, float)):
        raise TypeError(f"{where}: scaling is {type(scaling).__name__}, expected a number")
    if not 0 <= scaling <= torch.finfo(torch.float32).max:
        raise ValueError(f"{where}: scaling is {scaling}, expected a finite fp32 number >= 0")


def listed(values, text=_short, most=8) -> str:
    """`'a', 'b' and 5 more`."""
    shown = ", ".join(text(value) for value, _ in zip(values, range(most), strict=False))
    return f"{shown} and {len(values) - most} more" if len(values) > most else shown or "none"
