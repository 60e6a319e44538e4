"""LoRA layers of libraries other than PEFT: one forward for all of them; a library's file says what its layers are made of.

All compute `y = x Wᵀ + bias + scaling B(A(dropout(x)))`. Where the scaling enters does not matter, since B is linear;
where dropout does would, and all drop before A. As for PEFT, everything is read anew on each call, and a call that cannot
run fused runs the library's own forward.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lora_kernels import lora_linear, sharding
from lora_kernels.integrations import Layer, checks
from lora_kernels.integrations.checks import NotFused, check_call, check_hooks, check_rank, fall_back


class Parts(NamedTuple):
    """What a LoRA layer is made of: `weight [N,K]`, `bias [N]` or None, `lora_a [R,K]`, `lora_b [N,R]`."""

    weight: Tensor
    bias: Tensor | None
    lora_a: Tensor
    lora_b: Tensor
    scaling: float
    dropout_p: float


class Fused:
    """A library's layer, of which it is one in all but its forward. Its class says when the adapter counts, and its parts."""

    def adapts(self) -> bool:
        """Whether there is an adapter's term to add: not where it is merged, disabled or was never there."""
        raise NotImplementedError

    def parts(self) -> Parts:
        """What the layer is made of now; raises NotFused."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        if self.adapts():
            try:
                return compute(self.parts(), x)
            except NotFused as reason:
                fall_back(f"{kind(type(self))}: {reason.args[0]}")
        return super().forward(x)


def compute(parts: Parts, x: Tensor) -> Tensor:
    """What a layer of these parts makes of x; raises NotFused."""
    weight, bias, lora_a, lora_b, scaling, dropout_p = _checked(parts)
    check_call(x, weight, lora_a)
    return lora_linear(x, weight, lora_a, lora_b, scaling, bias=bias, dropout_p=dropout_p)


def kind(layer_class: type) -> str:
    """The library's name for one of its layers, or of ours in their place."""
    theirs = _theirs(layer_class)
    return f"{theirs.__module__.split('.')[0]}.{theirs.__name__}"


def fuse(model: nn.Module, classes: dict[type, type]) -> Iterator[Layer]:
    """Swap the classes of `model`'s layers, the library's for ours; yields what became of each that has an adapter."""
    for name, module in model.named_modules():
        if ours := classes.get(type(module)):
            module.__class__ = ours
        if isinstance(module, tuple(classes)) and any("lora" in part for part, _ in module.named_parameters()):
            yield Layer(name, kind(type(module)), _reason(module))


def unfuse(model: nn.Module) -> None:
    """Give every layer of `model` its library's own class back."""
    for module in model.modules():
        if isinstance(module, Fused):
            module.__class__ = _theirs(type(module))


def parameter(what: str, module: nn.Module, name: str) -> Tensor | None:
    """A weight, or the bias or None, that is a plain tensor."""
    tensor = checks.parameter(what, module, name)
    if sharding.is_dtensor(tensor):
        raise NotFused(f"the {name} of {what} is sharded")
    return tensor


def check_plain(what: str, module: nn.Module) -> None:
    """Whether `module`, a part of a layer, is a plain linear layer without hooks."""
    if type(module) is not nn.Linear:
        raise NotFused(f"{what} is a {type(module).__module__}.{type(module).__name__}")
    check_hooks(what, module)


def side_by_side(lora_b: Tensor, widths: list[int], enabled: list[bool]) -> Tensor:
    """`[N, G r]`: the G adapters of some slices of y's columns as one of the whole; `lora_b` has their `[N_i, r]` in order.

    Each slice reads its own r rows of A only, and one that is not enabled reads none.
    """
    blocks = iter(lora_b.split([width for width, on in zip(widths, enabled, strict=True) if on]))
    return torch.block_diag(
        *(next(blocks) if on else lora_b.new_empty(width, 0) for width, on in zip(widths, enabled, strict=True))
    )


def _theirs(layer_class):
    return next(base for base in layer_class.__mro__ if not base.__module__.startswith("lora_kernels."))


def _reason(module) -> str | None:
    """Why `module` cannot run fused."""
    if not isinstance(module, Fused):
        return "no kernel for this class"
    if "forward" in module.__dict__:
        return "it has a forward of its own"
    try:
        weight = _checked(module.parts()).weight
    except NotFused as reason:
        return reason.args[0]
    return "the base weight trains" if weight.requires_grad else None


def _checked(parts):
    """`parts`, if lora_linear takes them."""
    if not isinstance(parts.scaling, (int, float)) or not 0.0 <= parts.scaling < math.inf:
        raise NotFused(f"the scaling is {parts.scaling}")
    check_rank(parts.lora_a)
    return parts
