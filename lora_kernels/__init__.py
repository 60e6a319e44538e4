"""LoRA at the price of the base layer, unmerged: `y = x Wᵀ + b + s (x Aᵀ) Bᵀ` as one fused operation."""

from lora_kernels.adapters.checkpoint import load_adapter, save_adapter
from lora_kernels.dispatch import explain
from lora_kernels.functional import lora_linear
from lora_kernels.modules import LoRALinear, apply_lora, trainable_parameters

__version__ = "0.1.0"

__all__ = [
    "LoRALinear",
    "apply_lora",
    "explain",
    "load_adapter",
    "lora_linear",
    "save_adapter",
    "trainable_parameters",
]
