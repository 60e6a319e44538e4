"""DeepSpeed: its `LoRAOptimizedLinear`, over a base weight that is neither sharded nor quantised."""

from deepspeed.linear.optimized_linear import LoRAOptimizedLinear
from torch import nn

from lora_kernels.integrations import linears
from lora_kernels.integrations.checks import NotFused
from lora_kernels.integrations.linears import Fused, Parts, check_plain, parameter


class FusedLoRAOptimizedLinear(Fused, LoRAOptimizedLinear):
    """DeepSpeed's `LoRAOptimizedLinear`."""

    def adapts(self) -> bool:
        return self._initialized and not self.disabled

    def parts(self) -> Parts:
        if self.zero_shards > 1 or self.quantization_config is not None:
            raise NotFused("the base weight is sharded or quantised")
        check_plain("lora_weight_1", self.lora_weight_1)
        check_plain("lora_weight_2", self.lora_weight_2)
        lora_a, lora_b = (parameter("the adapter", part, "weight") for part in (self.lora_weight_1, self.lora_weight_2))
        return Parts(parameter("the layer", self, "weight"), None, lora_a, lora_b, self.lora_scaling_factor, 0.0)


def fuse(model: nn.Module):
    """See `linears.fuse`."""
    return linears.fuse(model, {LoRAOptimizedLinear: FusedLoRAOptimizedLinear})
