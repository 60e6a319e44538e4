"""Many adapters by dense products and a mask: every row meets every adapter, and a mask keeps its own."""

import torch
import torch.nn.functional as F

from benchmarks.providers import Provider


def providers(device: torch.device) -> list[Provider]:
    return [Provider("dense and mask", batched=_batched)]


def _batched(problem, tensors):
    slots, rank, k = tensors.a.shape
    a = tensors.a.reshape(slots * rank, k)
    b = tensors.b.permute(0, 2, 1).reshape(slots * rank, -1)
    own = F.one_hot(tensors.slots.long(), slots).to(tensors.x.dtype) * tensors.scalings.to(tensors.x.dtype)
    mask = own.repeat_interleave(rank, dim=1)
    return lambda x: torch.addmm(F.linear(x, tensors.weight), F.linear(x, a) * mask, b)
