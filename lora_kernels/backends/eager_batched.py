"""Plain PyTorch, one adapter after another: the fallback of the batched operation. It reads the slots on the host."""

import torch

from lora_kernels.backends.eager import reasons_unsupported, strategy_reasons_unsupported  # noqa: F401

STRATEGIES = ("looped",)


def forward(x, weight, bias, adapters, plan, strategy):
    """`y [M,N]`: `x W' + bias`, and each row's own adapters; `adapters` is a tuple, one a slice of y's columns."""
    y = torch.nn.functional.linear(x, weight, bias)
    columns = y.split([one_slice.b.shape[1] for one_slice in adapters], dim=1)
    slots = plan.slots.view(len(plan), plan.adapters_per_row)
    weights = None if plan.weights is None else plan.weights.view(slots.shape)
    for j in range(slots.shape[1]):
        for slot in torch.unique(slots[:, j]).tolist():
            rows = (slots[:, j] == slot).nonzero().squeeze(1)
            for y_slice, one_slice in zip(columns, adapters, strict=True):
                if not 0 <= slot < len(one_slice.ranks) or not (r := int(one_slice.ranks[slot])):
                    continue
                a, b = one_slice.slot(slot, r)
                h = (x[rows] @ a.mT).mul_(one_slice.scalings[slot])
                if weights is not None:
                    h *= weights[rows, j, None].to(h.dtype)
                y_slice[rows] = torch.addmm(y_slice[rows], h, b.mT)
    return y
