"""Plain PyTorch, one adapter after another: the fallback of the batched operation. It reads the slots on the host."""

import torch

from lora_kernels.backends.eager import reasons_unsupported, strategy_reasons_unsupported  # noqa: F401
from lora_kernels.backends.operands import with_clean_rows

STRATEGIES = ("looped",)


def forward(x, weight, bias, adapters, plan, strategy):
    """`y [M,N]`: `x W' + bias`, and each row's own adapters; `adapters` is a tuple, one a slice of y's columns."""
    y = torch.nn.functional.linear(with_clean_rows(x), weight, bias)
    add(x, y, adapters, plan)
    return y


def add(x, y, adapters, plan):
    """`y [M,N]` plus each row's own adapters, in place."""
    columns = y.split([one_slice.b.shape[1] for one_slice in adapters], dim=1)
    weights = None if plan.weights is None else plan.weights.view(len(plan), plan.adapters_per_row)
    ranks = [one_slice.ranks.tolist() for one_slice in adapters]
    for j, slot, rows in plan.groups:
        x_rows = with_clean_rows(x[rows])
        for y_slice, one_slice, rank in zip(columns, adapters, ranks, strict=True):
            if slot < len(rank) and rank[slot]:
                a, b = one_slice.slot(slot, rank[slot])
                h = (x_rows @ a.mT).mul_(one_slice.scalings[slot])
                if weights is not None:
                    h.mul_(weights[rows, j, None])
                y_slice.index_add_(0, rows, with_clean_rows(h) @ b.mT)
