"""Unsloth's autograd Function of one projection.

Importing it patches transformers and other packages: it comes last, and `--without unsloth` shows the rest untouched.
"""

import torch

from benchmarks.providers import Provider


def providers(device: torch.device) -> list[Provider]:
    import unsloth  # noqa: F401
    from unsloth.kernels.fast_lora import LoRA_W

    def linear(problem, tensors):
        lora = (tensors.lora_a, tensors.lora_b)
        dropout = (problem.dropout, None) if problem.dropout else ()  # the fused one, of 2026

        def step(x):  # its backward pass wants [batch, length, K]
            return LoRA_W.apply(x[None], tensors.weight, None, *lora, problem.scaling, *dropout)[0]

        return step, lora

    return [Provider("Unsloth", linear)]
