"""Whether a library's LoRA layer can run fused, here and now: what every integration checks, each time that it is called."""

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules.module import _has_any_global_hook

from lora_kernels import integrations, sharding

MAX_RANK = 512
fall_back = torch.compiler.assume_constant_result(integrations.fall_back)  # said while tracing, not in the graph


class NotFused(Exception):
    """Why a call runs the library's own forward."""


def check_hooks(what: str, module: nn.Module) -> None:
    """Whether nobody hooks into `module`."""
    if "forward" in module.__dict__ or sharding.hooks(module):
        raise NotFused(f"{what} has a hook, or a forward of its own")


def check_itself(what: str, module: nn.Module) -> None:
    """`check_hooks`, but for those of an engine."""
    if not sharding.is_itself(module):
        raise NotFused(f"{what} has a hook, or a forward of its own")


def parameter(what: str, module: nn.Module, name: str) -> Tensor | None:
    """A weight, or the bias or None, that is a plain tensor or a DTensor."""
    tensor = module._parameters.get(name, module.__dict__.get(name))  # where FSDP1 has its views
    plain = type(tensor) in (nn.Parameter, Tensor) or sharding.is_dtensor(tensor)
    if not plain and not (tensor is None and name == "bias"):
        kind = "parametrised" if tensor is None else f"a {type(tensor).__name__}"
        raise NotFused(f"the {name} of {what} is {kind}, not a plain tensor")
    return tensor


def dropout_p(what: str, dropout) -> float:
    """What a dropout drops now; for no dropout a library may have `nn.Identity`, or a function that returns x."""
    if not isinstance(dropout, nn.Module):
        return 0.0
    check_itself(what, dropout)
    if type(dropout) is nn.Dropout and 0.0 <= dropout.p < 1.0:
        return dropout.p if dropout.training else 0.0
    if type(dropout) is not nn.Identity:
        raise NotFused(f"{what} is {dropout}")
    return 0.0


def check_rank(lora_a: Tensor) -> None:
    """Whether lora_linear has kernels for it."""
    if lora_a.shape[0] > MAX_RANK:
        raise NotFused(f"the rank is {lora_a.shape[0]}, more than {MAX_RANK}")


def check_call(x: Tensor, weight, lora_a: Tensor, fp32_adapters: bool = False) -> None:
    """Whether this x can run fused; `fp32_adapters`: the library casts x to such an adapter, and back."""
    if type(x) not in (Tensor, nn.Parameter) and not sharding.is_dtensor(x):
        raise NotFused(f"x is a {type(x).__name__}")
    if not sharding.is_dtensor(x) is sharding.is_dtensor(weight) is sharding.is_dtensor(lora_a):
        raise NotFused("x, the base weight and the adapter are not all DTensors")
    if x.is_nested or x.is_meta or x.layout is not torch.strided:
        raise NotFused("x is nested, sparse or on the meta device")
    if weight.requires_grad and torch.is_grad_enabled():
        raise NotFused("the base weight trains")
    if not isinstance(weight, Tensor) and autocasts(x) and torch.get_autocast_dtype(x.device.type) is not weight.dtype:
        raise NotFused(f"the quantised base computes in {weight.dtype}, autocast in another dtype")
    fits = lora_a.dtype is x.dtype or (fp32_adapters and lora_a.dtype is torch.float32)
    if not (fits and weight.dtype is x.dtype) and not autocasts(x):
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


def autocasts(x: Tensor) -> bool:
    """Whether autocast is on for x."""
    return torch.is_autocast_enabled(x.device.type) and x.dtype is not torch.float64


def casts(x: Tensor) -> bool:
    """Whether autocast would give the result another dtype than x's."""
    return autocasts(x) and torch.get_autocast_dtype(x.device.type) is not x.dtype
