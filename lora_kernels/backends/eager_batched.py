"""Plain PyTorch, one adapter after another: the fallback of the batched operation. It reads the slots on the host."""

import torch

from lora_kernels.backends.eager import reasons_unsupported, strategy_reasons_unsupported  # noqa: F401

STRATEGIES = ("looped",)


def forward(x, weight, bias, adapters, plan, strategy):
    """`y [M,N]`: `x W' + bias`, and each row's own adapter."""
    y = torch.nn.functional.linear(x, weight, bias)
    ranks, scalings = adapters.ranks.tolist(), adapters.scalings.tolist()
    for slot in torch.unique(plan.slots).tolist():
        if not 0 <= slot < len(ranks) or ranks[slot] == 0:
            continue
        rows, r = (plan.slots == slot).nonzero().squeeze(1), ranks[slot]
        a, b = adapters.slot(slot, r)
        h = (x[rows] @ a.mT).mul_(scalings[slot])
        y[rows] = torch.addmm(y[rows], h, b.mT)
    return y
