"""LitGPT: its `LoRALinear` and `LoRAQKVLinear`."""

from litgpt.lora import LoRALinear, LoRAQKVLinear
from torch import nn

from lora_kernels.integrations import linears
from lora_kernels.integrations.checks import dropout_p
from lora_kernels.integrations.linears import Fused, Parts, check_plain, parameter, side_by_side


class FusedLoRALinear(Fused, LoRALinear):
    """LitGPT's `LoRALinear`."""

    def adapts(self) -> bool:
        return self.r > 0 and not self.merged

    def parts(self) -> Parts:
        check_plain("the base layer", self.linear)
        return Parts(
            parameter("the base layer", self.linear, "weight"), parameter("the base layer", self.linear, "bias"),
            parameter("the layer", self, "lora_A"), parameter("the layer", self, "lora_B"), self.scaling,
            dropout_p("the dropout", self.lora_dropout),
        )  # fmt: skip


class FusedLoRAQKVLinear(FusedLoRALinear, LoRAQKVLinear):
    """LitGPT's `LoRAQKVLinear`: q, k and v, side by side in y's columns, each with an adapter or without."""

    def adapts(self) -> bool:
        return super().adapts() and any(self.enable_lora)

    def parts(self) -> Parts:
        parts = super().parts()
        widths = [self.head_size * heads for heads in (self.n_head, self.n_query_groups, self.n_query_groups)]
        return parts._replace(lora_b=side_by_side(parts.lora_b, widths, self.enable_lora))


def fuse(model: nn.Module):
    """See `linears.fuse`."""
    return linears.fuse(model, {LoRALinear: FusedLoRALinear, LoRAQKVLinear: FusedLoRAQKVLinear})
