"""Models that other libraries made: their LoRA layers run our operation, and everything else about them stays theirs."""

import functools
import importlib
import os
import sys
import warnings
from contextlib import AbstractContextManager
from typing import NamedTuple

from torch import nn

# A file here for each library, and the module of the library in which its LoRA layers are.
LIBRARIES = {
    "peft": "peft",
    "loralib": "loralib",
    "litgpt": "litgpt.lora",
    "torchtune": "torchtune.modules.peft.lora",
    "deepspeed": "deepspeed.linear.optimized_linear",
    "nemo": "nemo_automodel.components._peft.lora",
}


class Layer(NamedTuple):
    """One adapted layer: its name in the model, its class, and why it does not run fused (None: it does)."""

    name: str
    kind: str
    reason: str | None


class Report(NamedTuple):
    """What runs fused, layer by layer, and which blocks run as one; `str()` is for reading."""

    layers: tuple[Layer, ...]
    blocks: tuple[Layer, ...] = ()

    @property
    def fused(self) -> list[str]:
        """The names of the layers that run fused, in a block or alone."""
        return [layer.name for layer in self.layers if layer.reason is None]

    @property
    def skipped(self) -> dict[str, str]:
        """The names of the other layers, and why."""
        return {layer.name: layer.reason for layer in self.layers if layer.reason is not None}

    def __str__(self) -> str:
        lines = [f"{len(self.fused)} of {len(self.layers)} adapted layers run fused", *_lines(self.layers)]
        if self.blocks:
            as_one = sum(block.reason is None for block in self.blocks)
            lines += [f"{as_one} of {len(self.blocks)} blocks run as one", *_lines(self.blocks)]
        return "\n".join(lines)

    __repr__ = __str__


def _lines(layers):
    width = max((len(layer.name) for layer in layers), default=0)
    return (f"{layer.name:{width}}  {layer.kind}: {layer.reason or 'fused'}" for layer in layers)


def apply_lora_kernels_to_model(model: nn.Module, *, blocks: bool = False) -> Report:
    """Let the LoRA layers of `model` run fused, in place; those that cannot go on as they were, and the report says why.

    model  has layers of PEFT (0.18 to 0.21), microsoft's loralib, LitGPT, torchtune, DeepSpeed or NeMo
    blocks also run q, k and v of an attention block as one operation, and gate, up and down of an MLP: in Llama, Mistral, Qwen
           and Gemma models of transformers. Needs to be said again after adapters were added to other layers

    Only the layers' class changes: parameters, state dict, hooks, saving, merging and switching adapters stay the library's
    (but loralib's layers no longer merge on `eval()`). With PEFT, adapters can be added later, to other layers too.
    A call that cannot run fused (a hook on `lora_A`, say) runs the library's own forward, with one warning for each reason;
    with LORA_KERNELS_STRICT=1 in the environment it raises instead.
    A second call changes nothing, and reports what is true then.

    Raises TypeError if `model` is no module, ValueError if it has no LoRA layer, RuntimeError where LORA_KERNELS_STRICT is
    set and a layer cannot run fused. docs/integrations.md has what runs fused and what does not.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got {type(model).__name__}, expected a torch.nn.Module")
    layers = []
    for name, theirs in LIBRARIES.items():
        if theirs in sys.modules:  # else the model has none of its layers
            layers += importlib.import_module(f"lora_kernels.integrations.{name}").fuse(model)
    if not layers:
        raise ValueError(
            f"model: has no LoRA layer of {', '.join(LIBRARIES)}; add one first, with peft.get_peft_model for example"
        )
    found = ()
    if blocks and "transformers" in sys.modules:
        from lora_kernels.integrations import transformers

        found = tuple(transformers.fuse(model))
    for layer in (*layers, *found):
        if layer.reason is not None:
            fall_back(f"{layer.kind}: {layer.reason}")
    return Report(tuple(layers), found)


def patch_peft() -> AbstractContextManager:
    """Let every PEFT model made or loaded from now on run fused, until `unpatch_peft()` or the end of a `with` block.

    Models that were there before stay as they are. Raises ImportError without PEFT, or with one older than 0.18.
    """
    from lora_kernels.integrations import peft

    return peft.patch()


def unpatch_peft(model: nn.Module | None = None) -> None:
    """End `patch_peft()`: models made from now on are PEFT's own. With a `model`, give it its own layers back instead."""
    if model is not None:
        from lora_kernels.integrations import linears

        linears.unfuse(model)
    if model is None or "peft" in sys.modules:
        from lora_kernels.integrations import peft, transformers

        if model is None:
            peft.unpatch()
        else:
            transformers.unfuse(model)
            peft.unfuse(model)


def fall_back(reason: str) -> None:
    """Say once why something does not run fused; RuntimeError with LORA_KERNELS_STRICT=1."""
    message = f"lora_kernels: not fused, {reason}"
    if os.environ.get("LORA_KERNELS_STRICT") == "1":
        raise RuntimeError(f"{message} (LORA_KERNELS_STRICT=1)")
    _warn_once(message)


@functools.cache
def _warn_once(message):
    warnings.warn(message, stacklevel=4)
