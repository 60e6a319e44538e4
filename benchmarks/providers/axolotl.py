"""Axolotl's autograd Function of one projection."""

import torch
import torch.nn.functional as F

from benchmarks.providers import Provider


def providers(device: torch.device) -> list[Provider]:
    from axolotl.kernels.lora import LoRA_O

    def linear(problem, tensors):
        lora = (tensors.lora_a, tensors.lora_b)

        def step(x):
            x = x[None]  # its backward pass wants [batch, length, K]
            dropped = F.dropout(x, problem.dropout) if problem.dropout else None
            return LoRA_O.apply(x, dropped, tensors.weight, None, None, *lora, problem.scaling, None, None)[0]

        return step, lora

    return [Provider("Axolotl", linear)]
