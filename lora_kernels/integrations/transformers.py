"""transformers: the q, k and v projections of an attention block run as one operation, and the gated MLP as another.

The projections are PEFT's LoRA layers, fused one by one before (integrations/peft.py). An attention block keeps its own
forward: the first of its projections that is called with an x computes all of them, and the others hand out what is theirs.
An MLP gets a forward of ours, by its class. Names, parameters and whatever PEFT does with the layers stay.
"""

import functools
import importlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from transformers.activations import GELUTanh, SiLUActivation

from lora_kernels import Projection, lora_mlp, lora_projections
from lora_kernels.integrations import Layer
from lora_kernels.integrations.checks import NotFused, check_call, check_hooks, fall_back
from lora_kernels.integrations.peft import Fused, as_theirs, reason_not_fused, weight_and_bias

# Their attention blocks have q_proj, k_proj and v_proj of one x; their MLPs are down_proj(act_fn(gate_proj(x)) * up_proj(x)).
ARCHITECTURES = {
    "Llama": "llama", "Mistral": "mistral", "Qwen2": "qwen2", "Qwen3": "qwen3",
    "Gemma": "gemma", "Gemma2": "gemma2", "Gemma3": "gemma3",
}  # fmt: skip
QKV, GATED = ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj", "down_proj")
ACTIVATIONS = {SiLUActivation: "silu", nn.SiLU: "silu", GELUTanh: "gelu_tanh"}


class Together:
    """Layers that read the same x: the first to be called computes the results of all."""

    x, ys = None, {}

    def __init__(self, layers):
        self.layers = layers

    def result(self, layer, x):
        """What `layer` makes of x, or None where it has to do that alone."""
        if torch.compiler.is_compiling() or not _is_active(layer):
            return None
        if layer not in self.layers:
            fall_back("q, k and v as one: nn.DataParallel copies the layers for each device (use torchrun)")
            return None
        if self.x is not x or layer not in self.ys:
            self.x, self.ys = None, {}
            layers = [each for each in self.layers if _is_active(each)]
            if len(layers) < 2:
                return None
            try:
                projections = [_projection(each, x) for each in layers]
            except NotFused as reason:
                fall_back(f"q, k and v as one: {reason.args[0]}")
                return None
            ys = zip(lora_projections(x, projections), projections, strict=True)
            self.x, self.ys = x, dict(zip(layers, (as_theirs(y, p.weight, x) for y, p in ys), strict=True))
        y = self.ys.pop(layer)
        if not self.ys:
            self.x = None
        return y

    def __getstate__(self):
        return {"layers": self.layers}  # what a copy needs


class FusedMLP:
    """Goes before a gated MLP of transformers in the order of bases."""

    def forward(self, x: Tensor) -> Tensor:
        if not torch.compiler.is_compiling():  # which sees one operator a layer, and fuses what is between them
            try:
                layers = [self._modules[name] for name in GATED]
                if any(map(_is_active, layers)):
                    gate, up, down = (_projection(layer, x) for layer in layers)
                    return as_theirs(lora_mlp(x, gate, up, down, _activation(self)), down.weight, x)
            except NotFused as reason:
                fall_back(f"gate, up and down as one: {reason.args[0]}")
        return super().forward(x)


def _projection(layer, x) -> Projection:
    check_hooks("a layer", layer)
    if _is_active(layer):
        return Projection(*layer.operands(x))
    if isinstance(layer, Fused) and (layer._disable_adapters or layer.merged_adapters):
        raise NotFused("one layer's adapter is disabled or merged, another's is not")
    base = layer._modules["base_layer"] if isinstance(layer, Fused) else layer
    check_hooks("a layer", base)
    weight, bias = weight_and_bias(base)
    check_call(x, weight, x)
    return Projection(weight, bias=bias)


def _is_active(layer) -> bool:
    return (
        isinstance(layer, Fused)
        and not (layer._disable_adapters or layer.merged_adapters)
        and any(layer.active_names())
    )


def _activation(mlp) -> str:
    check_hooks("the activation", mlp.act_fn)
    if type(mlp.act_fn) not in ACTIVATIONS:
        raise NotFused(f"the activation is {mlp.act_fn}")
    return ACTIVATIONS[type(mlp.act_fn)]


def fuse(model: nn.Module) -> Iterator[Layer]:
    """Let the blocks of `model` run as one; yields what became of each that has an adapter."""
    for name, module in model.named_modules():
        for parts, what in ((QKV, "q, k and v"), (GATED, "gate, up and down")):
            layers = [module._modules.get(part) for part in parts]
            if all(layers) and any(isinstance(layer, Fused) for layer in layers):
                reason = _fuse_mlp(module, layers) if parts is GATED else _fuse_qkv(module, layers)
                yield Layer(name, f"{type(module).__name__.removeprefix('Fused')}, {what}", reason)


def _fuse_qkv(module, layers) -> str | None:
    if not _is_known(type(module), "Attention"):
        return "no attention block that we know"
    adapted = tuple(layer for layer in layers if isinstance(layer, Fused))
    if len(adapted) < 2:
        return "one of its projections has an adapter only"
    together = Together(adapted)
    for layer in adapted:
        layer.together = together
    return _reason(adapted)


def _fuse_mlp(module, layers) -> str | None:
    if not isinstance(module, FusedMLP):
        if not _is_known(type(module), "MLP"):
            return "no MLP that we know"
        module.__class__ = _fused_class(type(module))
    try:
        _activation(module)
    except NotFused as reason:
        return reason.args[0]
    return _reason(layers)


def _reason(layers) -> str | None:
    """Why some of `layers` cannot be part of a block."""
    for layer in layers:
        try:
            check_hooks("a layer", layer)
        except NotFused as reason:
            return reason.args[0]
        if isinstance(layer, Fused) and (reason := reason_not_fused(layer)):
            return reason
    return None


def unfuse(model: nn.Module) -> None:
    """Let every layer of `model` run by itself again."""
    for module in model.modules():
        if isinstance(module, FusedMLP):
            module.__class__ = type(module).__bases__[1]
        module.__dict__.pop("together", None)


def _is_known(kind, part) -> bool:
    folder = ARCHITECTURES.get(kind.__name__.removesuffix(part))
    return kind.__module__ == f"transformers.models.{folder}.modeling_{folder}" and kind.__name__.endswith(part)


@functools.cache
def _fused_class(theirs):
    return type(f"Fused{theirs.__name__}", (FusedMLP, theirs), {"__module__": __name__})


def __getattr__(name):
    """Where pickle looks for the class of an MLP that it loads."""
    theirs = name.removeprefix("Fused")
    folder = ARCHITECTURES.get(theirs.removesuffix("MLP"))
    if folder is None or name != f"Fused{theirs}" or not theirs.endswith("MLP"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return _fused_class(getattr(importlib.import_module(f"transformers.models.{folder}.modeling_{folder}"), theirs))
