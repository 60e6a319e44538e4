"""NeMo AutoModel's linear layer with its Triton kernels."""

import torch
from torch import nn

from benchmarks.providers import Provider, needs_gpu


def providers(device: torch.device) -> list[Provider]:
    needs_gpu(device)
    from nemo_automodel.components._peft.lora import patch_linear_module

    def linear(problem, tensors):
        base = nn.Linear(problem.k, problem.n, bias=False, dtype=tensors.x.dtype, device=device)
        base.weight = nn.Parameter(tensors.weight, requires_grad=False)
        layer = patch_linear_module(
            base, dim=problem.r, alpha=problem.scaling * problem.r, dropout=problem.dropout, dropout_position="pre"
        )
        layer.lora_A.weight, layer.lora_B.weight = tensors.lora_a, tensors.lora_b
        return layer, (tensors.lora_a, tensors.lora_b)

    return [Provider("NeMo AutoModel", linear)]
