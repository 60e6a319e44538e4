"""Several LoRA layers as one operation: those that read the same x, and the gated MLP."""

from lora_kernels.blocks.functional import Projection, lora_mlp, lora_projections
from lora_kernels.blocks.modules import LoRAMLP, LoRAQKV

__all__ = ["LoRAMLP", "LoRAQKV", "Projection", "lora_mlp", "lora_projections"]
