"""LoRA at the price of the base layer, unmerged: `y = x Wᵀ + b + s (x Aᵀ) Bᵀ` as one fused operation."""

from lora_kernels.adapters.attach import attach_pool
from lora_kernels.adapters.checkpoint import load_adapter, save_adapter
from lora_kernels.adapters.plan import BatchPlan, LayerAdapters
from lora_kernels.adapters.pool import AdapterPool, PoolFullError
from lora_kernels.blocks import LoRAMLP, LoRAQKV, Projection, lora_mlp, lora_projections
from lora_kernels.dispatch import explain
from lora_kernels.functional import add_lora_batched, lora_linear, lora_linear_batched
from lora_kernels.integrations import apply_lora_kernels_to_model, patch_peft, unpatch_peft
from lora_kernels.modules import LoRALinear, apply_lora, trainable_parameters

__version__ = "0.1.0"

__all__ = [
    "AdapterPool",
    "BatchPlan",
    "LayerAdapters",
    "LoRALinear",
    "LoRAMLP",
    "LoRAQKV",
    "PoolFullError",
    "Projection",
    "add_lora_batched",
    "apply_lora",
    "apply_lora_kernels_to_model",
    "attach_pool",
    "explain",
    "load_adapter",
    "lora_linear",
    "lora_linear_batched",
    "lora_mlp",
    "lora_projections",
    "patch_peft",
    "save_adapter",
    "trainable_parameters",
    "unpatch_peft",
]
