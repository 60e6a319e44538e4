"""The base layer alone, which everything is compared with; of a merge, the copy of the weight."""

import torch
import torch.nn.functional as F

from benchmarks.providers import BASE, Provider


def providers(device: torch.device) -> list[Provider]:
    return [Provider(BASE, lambda _, t: (_layer(t), ()), lambda _, t: _layer(t), lambda _, t: t.weight.clone)]


def _layer(tensors):
    return lambda x: F.linear(x, tensors.weight)
