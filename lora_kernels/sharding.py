"""Parameters that lie on several devices: what the operators do with DTensors, and weights that an engine gathers.

A layer's weights are sharded in one of two ways. As DTensors they stay apart, and each device computes its part of the
products: tensor parallelism, for which the operators have the rules below. Or an engine (FSDP, ZeRO-3) gathers them while
the module that holds them runs; then the one operation runs inside the calls of these modules (`inside`).
"""

import functools
import sys
from collections.abc import Callable, Iterable

from torch import Tensor, nn

# Whose hooks gather a module's weights before it runs and free them afterwards, and do nothing to what it computes.
ENGINES = (
    "torch.distributed.fsdp", "torch.distributed._composable", "deepspeed.runtime.zero.", "deepspeed.utils.nvtx",
)  # fmt: skip


def is_dtensor(tensor) -> bool:
    """Whether it is a `torch.distributed.tensor.DTensor`, which is not imported for the question."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def placed_as(gradient: Tensor, parameter: Tensor) -> Tensor:
    """A parameter's gradient, its sum reduced, sharded like the parameter: what an optimiser expects of it."""
    return gradient.redistribute(placements=parameter.placements) if is_dtensor(gradient) else gradient


def unwrapped(module: nn.Module) -> nn.Module:
    """The module itself, out of FSDP1's wrapper."""
    return module._modules.get("_fsdp_wrapped_module", module)


def kind(module: nn.Module) -> type:
    """The class of `module` before an engine made it one of its own, as FSDP2 does."""
    kinds = type(module).__mro__
    if not gathered(module):
        return kinds[0]
    return kinds[max((i + 1 for i, kind in enumerate(kinds) if kind.__module__.startswith(ENGINES)), default=0)]


def gathered(module: nn.Module) -> bool:
    """Whether an engine gathers the weights of `module` when it is called."""
    return module is not unwrapped(module) or any(_is_engines(hook) for hook in hooks(module))


def is_itself(module: nn.Module) -> bool:
    """Whether calling `module` does what its class does: nobody replaces its forward, or hooks into it but an engine."""
    inner = unwrapped(module)
    return "forward" not in inner.__dict__ and all(map(_is_engines, (*hooks(module), *hooks(inner))))


def hooks(module: nn.Module):
    """Those of its forward and backward pass."""
    d = module.__dict__
    kinds = d["_forward_pre_hooks"], d["_forward_hooks"], d["_backward_pre_hooks"], d["_backward_hooks"]
    return [hook for hooks in kinds for hook in hooks.values()] if any(kinds) else ()


def _is_engines(hook) -> bool:
    return getattr(hook, "__module__", "").startswith(ENGINES)


def inside(modules: Iterable[nn.Module], x: Tensor, compute: Callable[[Tensor], Tensor]) -> Tensor:
    """`compute(x)`, run inside the call of each of `modules` whose weights an engine gathers.

    All that the engine does before and after these calls, and before and after their backward passes, it does around the one
    operation: weights are gathered and freed, gradients reduced and scattered. Only what the modules would have
    computed is not computed.
    """
    for module in modules:
        if gathered(module):
            compute = functools.partial(_call, module, compute)
    return compute(x)


def _call(module, compute, x):
    inner = unwrapped(module)
    inner.forward = compute
    try:
        return module(x)
    finally:
        del inner.forward
