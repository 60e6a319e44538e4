"""microsoft's loralib: its `Linear` and `MergedLinear`, which no longer merge on `eval()`."""

import loralib
from torch import nn

from lora_kernels.integrations import linears
from lora_kernels.integrations.checks import dropout_p
from lora_kernels.integrations.linears import Fused, Parts, parameter, side_by_side


class _Unmerged(Fused):
    """Its `eval()` and `train()` change no weight.

    loralib's own merge the adapter into `weight` and take it out again: what is saved in between has it twice, and the
    weight drifts by a rounding each time. Ours run the same fused operation both ways, and take out what was merged before.
    """

    def train(self, mode: bool = True):
        if self.merged:
            super().train(True)
        return nn.Linear.train(self, mode)

    def adapts(self) -> bool:
        return self.r > 0 and not self.merged

    def parts(self) -> Parts:
        weight = parameter("the layer", self, "weight")
        return Parts(
            weight.mT if self.fan_in_fan_out else weight, parameter("the layer", self, "bias"),
            parameter("the layer", self, "lora_A"), parameter("the layer", self, "lora_B"), self.scaling,
            dropout_p("the dropout", self.lora_dropout),
        )  # fmt: skip


class FusedLinear(_Unmerged, loralib.Linear):
    """loralib's `Linear`."""


class FusedMergedLinear(_Unmerged, loralib.MergedLinear):
    """loralib's `MergedLinear`: equally wide slices of y's columns, such as q, k and v, each with an adapter or without."""

    def adapts(self) -> bool:
        return super().adapts() and any(self.enable_lora)

    def parts(self) -> Parts:
        parts, slices = super().parts(), len(self.enable_lora)
        widths = [self.out_features // slices] * slices
        return parts._replace(lora_b=side_by_side(parts.lora_b, widths, self.enable_lora))


CLASSES = {loralib.Linear: FusedLinear, loralib.MergedLinear: FusedMergedLinear}


def fuse(model: nn.Module):
    """See `linears.fuse`; what `eval()` had merged is taken out of the weights."""
    for layer in linears.fuse(model, CLASSES):
        module = model.get_submodule(layer.name)
        if isinstance(module, Fused):
            module.train(module.training)
        yield layer
