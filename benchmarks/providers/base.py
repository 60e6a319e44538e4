"""The base layer alone, which everything is compared with; of a merge, the copy of the weight."""

import torch
import torch.nn.functional as F

from benchmarks.providers import BASE, Provider


def providers(device: torch.device) -> list[Provider]:
    def trained(_, t):
        return _layer(t), ()

    def batched(_, t):
        return _layer(t)

    def merged(_, t):
        return t.weight.clone

    return [Provider(BASE, trained, batched, merged, quantized=trained, quantized_batched=batched)]


def _layer(tensors):
    return lambda x: F.linear(x, tensors.weight)
