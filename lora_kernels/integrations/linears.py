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
from torch.autograd import forward_ad
from torch.nn.modules.module import _has_any_global_hook

from lora_kernels import integrations, lora_linear
from lora_kernels.integrations import Layer

MAX_RANK = 512
fall_back = torch.compiler.assume_constant_result(integrations.fall_back)  # said while tracing, not in the graph


class NotFused(Exception):
    """Why a call runs the library's own forward."""


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
                return self._fused(x)
            except NotFused as reason:
                fall_back(f"{kind(type(self))}: {reason.args[0]}")
        return super().forward(x)

    def _fused(self, x):
        weight, bias, lora_a, lora_b, scaling, dropout_p = _checked(self.parts())
        _check_call(x, weight, lora_a)
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
    """A weight or bias that is a plain tensor, of a module without hooks."""
    tensor = module._parameters.get(name)
    if type(tensor) not in (nn.Parameter, Tensor) and not (tensor is None and name == "bias"):
        found = "parametrised or sharded" if tensor is None else f"a {type(tensor).__name__}"
        raise NotFused(f"the {name} of {what} is {found}, not a plain tensor")
    return tensor


def check_plain(what: str, module: nn.Module) -> None:
    """Whether `module`, a part of a layer, is a plain linear layer without hooks."""
    if type(module) is not nn.Linear:
        raise NotFused(f"{what} is a {type(module).__module__}.{type(module).__name__}")
    _check_hooks(what, module)


def dropout_p(dropout) -> float:
    """What a dropout drops now; a library that has no dropout to do may have a function that returns x, or `nn.Identity`."""
    if not isinstance(dropout, nn.Module):
        return 0.0
    _check_hooks("the dropout", dropout)
    if type(dropout) is nn.Dropout and 0.0 <= dropout.p < 1.0:
        return dropout.p if dropout.training else 0.0
    if type(dropout) is not nn.Identity:
        raise NotFused(f"the dropout is {dropout}")
    return 0.0


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


def _check_hooks(what, module):
    d = module.__dict__
    if (
        d["_forward_hooks"] or d["_forward_pre_hooks"] or d["_backward_hooks"] or d["_backward_pre_hooks"]
        or "forward" in d
    ):  # fmt: skip
        raise NotFused(f"{what} has a hook, or a forward of its own")


def _checked(parts):
    """`parts`, if lora_linear takes them."""
    if not isinstance(parts.scaling, (int, float)) or not 0.0 <= parts.scaling < math.inf:
        raise NotFused(f"the scaling is {parts.scaling}")
    if parts.lora_a.shape[0] > MAX_RANK:
        raise NotFused(f"the rank is {parts.lora_a.shape[0]}, more than {MAX_RANK}")
    return parts


def _check_call(x, weight, lora_a):
    """Whether this x can run fused, here and now."""
    if type(x) not in (Tensor, nn.Parameter):
        raise NotFused(f"x is a {type(x).__name__}")
    if x.is_nested or x.is_meta or x.layout is not torch.strided:
        raise NotFused("x is nested, sparse or on the meta device")
    if weight.requires_grad and torch.is_grad_enabled():
        raise NotFused("the base weight trains")
    autocasts = torch.is_autocast_enabled(x.device.type) and x.dtype is not torch.float64
    if not (x.dtype is weight.dtype is lora_a.dtype) and not autocasts:
        raise NotFused(f"x is {x.dtype}, the base weight {weight.dtype}, the adapter {lora_a.dtype}")
    if torch.compiler.is_compiling():
        return
    if _has_any_global_hook():
        raise NotFused("there are global module hooks")
    if (
        torch._C._get_tracing_state() is not None
        or torch._C._functorch.peek_interpreter_stack() is not None
        or forward_ad._current_level >= 0
    ):
        raise NotFused("torch.jit.trace, torch.func or forward-mode AD look inside")
