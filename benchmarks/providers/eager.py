"""What one writes down in PyTorch: the base layer, two small ones, a scale and an add."""

import torch
import torch.nn.functional as F

from benchmarks.providers import Provider


def providers(device: torch.device) -> list[Provider]:
    return [Provider("eager PyTorch", linear, merge=_merge)]


def layer(x, weight, lora_a, lora_b, scaling, dropout):
    dropped = F.dropout(x, dropout) if dropout else x
    return F.linear(x, weight) + F.linear(F.linear(dropped, lora_a), lora_b) * scaling


def linear(problem, tensors, call=layer):
    lora = (tensors.lora_a, tensors.lora_b)
    return lambda x: call(x, tensors.weight, *lora, problem.scaling, problem.dropout), lora


def _merge(problem, tensors):
    return lambda: tensors.weight + problem.scaling * (tensors.lora_b.detach() @ tensors.lora_a.detach())
