"""Many adapters by gather and bmm: each row's own A and B are copied side by side."""

import torch
import torch.nn.functional as F

from benchmarks.providers import Provider


def providers(device: torch.device) -> list[Provider]:
    return [Provider("gathered bmm", batched=_batched)]


def _batched(problem, tensors):
    slots, scale = tensors.slots.long(), tensors.scalings[tensors.slots.long(), None, None].to(tensors.x.dtype)

    def step(x):
        a, b = tensors.a[slots], tensors.b[slots]
        return F.linear(x, tensors.weight) + torch.bmm(torch.bmm(x[:, None], a.mT) * scale, b.mT).squeeze(1)

    return step
