"""Modules of blocks: layers that exist, run together. Their state dict is that of the layers."""

from torch import Tensor, nn

from lora_kernels.blocks.functional import ACTIVATIONS, Projection, lora_mlp, lora_projections
from lora_kernels.modules import LoRALinear


class LoRAQKV(nn.Module):
    """The three projections of an attention block: `q, k, v = module(x)` reads x once. See `lora_projections`.

    q_proj, k_proj, v_proj  each a `LoRALinear`, or a frozen `nn.Linear`; widths may differ (GQA). Hooks on them do not run.

    >>> import torch
    >>> q, k, v = LoRAQKV(LoRALinear(64, 64, r=8), nn.Linear(64, 16).requires_grad_(False), LoRALinear(64, 16, r=4))(
    ...     torch.randn(2, 5, 64)
    ... )
    >>> q.shape, v.shape
    (torch.Size([2, 5, 64]), torch.Size([2, 5, 16]))
    """

    def __init__(self, q_proj: nn.Module, k_proj: nn.Module, v_proj: nn.Module):
        super().__init__()
        _check_layers(q_proj=q_proj, k_proj=k_proj, v_proj=v_proj)
        self.q_proj, self.k_proj, self.v_proj = q_proj, k_proj, v_proj

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return lora_projections(x, [projection(layer) for layer in (self.q_proj, self.k_proj, self.v_proj)])


class LoRAMLP(nn.Module):
    """The gated MLP of Llama, Mistral, Qwen and Gemma, `down_proj(f(gate_proj(x)) ∘ up_proj(x))`. See `lora_mlp`.

    gate_proj, up_proj, down_proj  each a `LoRALinear`, or a frozen `nn.Linear`. Hooks on them do not run.
    activation                     "silu" or "gelu_tanh"

    >>> import torch
    >>> gate, up, down = LoRALinear(64, 96, r=8), LoRALinear(64, 96, r=8), LoRALinear(96, 64, r=8)
    >>> LoRAMLP(gate, up, down)(torch.randn(2, 5, 64)).shape
    torch.Size([2, 5, 64])
    """

    def __init__(self, gate_proj: nn.Module, up_proj: nn.Module, down_proj: nn.Module, activation: str = "silu"):
        super().__init__()
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation: got {activation!r}, expected one of {', '.join(ACTIVATIONS)}")
        _check_layers(gate_proj=gate_proj, up_proj=up_proj, down_proj=down_proj)
        self.gate_proj, self.up_proj, self.down_proj, self.activation = gate_proj, up_proj, down_proj, activation

    def forward(self, x: Tensor) -> Tensor:
        layers = (self.gate_proj, self.up_proj, self.down_proj)
        return lora_mlp(x, *map(projection, layers), self.activation)

    def extra_repr(self) -> str:
        return f"activation={self.activation}"


def projection(layer: nn.Module) -> Projection:
    """What a `LoRALinear` or `nn.Linear` computes now; a merged one has no adapter."""
    if not isinstance(layer, LoRALinear):
        return Projection(layer.weight, bias=layer.bias)
    if layer.merged:
        return Projection(layer.merged_weight, bias=layer.bias)
    dropout_p = layer.lora_dropout if layer.training else 0.0
    return Projection(layer.weight, layer.lora_A.weight, layer.lora_B.weight, layer.scaling, layer.bias, dropout_p)


def _check_layers(**layers):
    for name, layer in layers.items():
        if not isinstance(layer, LoRALinear) and type(layer) is not nn.Linear:
            raise TypeError(f"{name}: got {type(layer).__name__}, expected a LoRALinear or an nn.Linear")
