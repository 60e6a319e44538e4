"""torchtune: its `LoRALinear`, over a plain base weight."""

from torch import nn
from torchtune.modules.peft.lora import LoRALinear

from lora_kernels.integrations import linears
from lora_kernels.integrations.checks import dropout_p
from lora_kernels.integrations.linears import Fused, Parts, check_plain, parameter


class FusedLoRALinear(Fused, LoRALinear):
    """torchtune's `LoRALinear`."""

    def adapts(self) -> bool:
        return not self.disabled

    def parts(self) -> Parts:
        check_plain("lora_a", self.lora_a)
        check_plain("lora_b", self.lora_b)
        return Parts(
            parameter("the layer", self, "weight"), parameter("the layer", self, "bias"),
            parameter("lora_a", self.lora_a, "weight"), parameter("lora_b", self.lora_b, "weight"),
            self.alpha / self.rank, dropout_p("the dropout", self.dropout),
        )  # fmt: skip


def fuse(model: nn.Module):
    """See `linears.fuse`."""
    return linears.fuse(model, {LoRALinear: FusedLoRALinear})
