"""Parameters that lie on several devices: what the operators do with DTensors, and weights that an engine gathers.

A layer's weights are sharded in one of two ways. As DTensors they stay apart, and each device computes its part of the
products: tensor parallelism, for which the operators have rules (dtensor.py). Or an engine (FSDP, ZeRO-3) gathers them while
the module that holds them runs; then the one operation runs inside the calls of these modules (`inside`). transformers'
tensor parallelism gives its layers a forward that makes DTensors of what is local; the operation runs inside that (`in_style`).
"""

import functools
import sys
from collections.abc import Callable, Iterable

from torch import Tensor, nn

# Whose hooks gather a module's weights before it runs and free them afterwards, and do nothing to what it computes.
ENGINES = (
    "torch.distributed.fsdp", "torch.distributed._composable", "deepspeed.runtime.zero.", "deepspeed.utils.nvtx",
)  # fmt: skip

STYLES = "transformers.distributed.tensor_parallel"  # of the forward that it gives to a layer


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
    own_forward = "forward" in inner.__dict__ and (gathered(module) or not styled(module))
    return not own_forward and all(map(_is_engines, (*hooks(module), *hooks(inner))))


def styled(module: nn.Module) -> bool:
    """Whether transformers' tensor parallelism gave `module` a forward of its own, around that of its class."""
    return getattr(module.__dict__.get("forward"), "__module__", None) == STYLES


def in_style(layer: nn.Linear, compute: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """`compute(x)` instead of what the class of a `styled` layer does: x is placed before it, and y after it.

    In training x and the layer's weights are DTensors meanwhile; else they are plain, each device's part of them.
    """
    style, mesh = sys.modules[STYLES].ALL_PARALLEL_STYLES[layer._hf_tp_plan], layer._hf_device_mesh
    inputs, _ = style.transform_inputs_pre_forward(layer, (x,), {}, mesh)
    with style.context_around_forward(layer, mesh):
        y = compute(*inputs)
    return style.transform_output_post_forward(layer, y, mesh)


def placed_beside(x: Tensor, parameter: Tensor) -> Tensor:
    """A parameter of a `styled` layer as x is: plain, or a DTensor (which it is already unless every device has all of it)."""
    if is_dtensor(x) is is_dtensor(parameter):
        return parameter
    if is_dtensor(parameter):
        return parameter.to_local()
    return type(x).from_local(parameter, x.device_mesh, run_check=False)


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
