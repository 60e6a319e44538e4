"""NVIDIA's NeMo AutoModel: its `LinearLoRA` and `TritonLinearLoRA`, over a plain base weight.

`patch_linear_module` makes a class for each layer, of one of these and the layer's own; so do we, and that one is given back.
Its dropout may be after B (`dropout_position="post"`, the default); no kernel drops there.
"""

from collections.abc import Iterator

from nemo_automodel.components._peft.lora import LinearLoRA, TritonLinearLoRA
from torch import nn

from lora_kernels.integrations import Layer, linears
from lora_kernels.integrations.checks import NotFused
from lora_kernels.integrations.linears import Fused, Parts, check_plain, parameter


class _FusedLinearLoRA(Fused):
    def adapts(self) -> bool:
        return True

    def parts(self) -> Parts:
        if self.use_dora or getattr(self, "super_fwd", None) is not None:
            raise NotFused("DoRA has no kernel" if self.use_dora else "another library computes the base layer")
        drops = self.dropout_p if self.training else 0.0
        if drops > 0.0 and self.dropout_position != "pre":
            raise NotFused("dropout after B")
        check_plain("lora_A", self.lora_A)
        check_plain("lora_B", self.lora_B)
        return Parts(
            parameter("the layer", self, "weight"), parameter("the layer", self, "bias"),
            parameter("lora_A", self.lora_A, "weight"), parameter("lora_B", self.lora_B, "weight"), self.scale, drops,
        )  # fmt: skip


def fuse(model: nn.Module) -> Iterator[Layer]:
    """See `linears.fuse`; an MLP that NeMo runs as one operation of its own goes on as that."""
    kinds = {type(module) for module in model.modules() if isinstance(module, LinearLoRA)}
    ours = {
        kind: _fused_class(kind) for kind in kinds if kind.forward in (LinearLoRA.forward, TritonLinearLoRA.forward)
    }
    for layer in linears.fuse(model, {LinearLoRA: None} | ours):
        whole = model.get_submodule(layer.name.rpartition(".")[0])
        if getattr(whole, "_lora_mlp_fused", False):
            layer = layer._replace(reason="NeMo runs the whole MLP itself, but with use_memory_efficient_lora=False")
        yield layer


def _fused_class(theirs):
    return type(f"Fused{theirs.__name__}", (_FusedLinearLoRA, theirs), {})
