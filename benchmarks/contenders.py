"""What is compared: the base layer alone, the operations PEFT composes, and every strategy of ours."""

from functools import partial

import torch.nn.functional as F

from lora_kernels import lora_linear
from lora_kernels.backends import BACKENDS

BASE, COMPOSED = "F.linear (base only)", "composed as in PEFT"
SCALING = 2.0


def base(x, weight, lora_a, lora_b):
    return F.linear(x, weight)


def composed(x, weight, lora_a, lora_b):
    return F.linear(x, weight) + F.linear(F.linear(x, lora_a), lora_b) * SCALING


def ours(x, weight, lora_a, lora_b, backend=None, strategy=None):
    return lora_linear(x, weight, lora_a, lora_b, SCALING, backend=backend, strategy=strategy)


def strategies(device) -> dict:
    """`{"backend / strategy": (backend, strategy)}` of what can run on `device`; eager only where no kernel can."""
    names = ["triton"] if device.type == "cuda" else ["eager"]
    return {f"{name} / {strategy}": (name, strategy) for name in names for strategy in BACKENDS[name].STRATEGIES}


def all_of(device) -> dict:
    """Every contender as `name -> f(x, weight, lora_a, lora_b)`."""
    named = {
        name: partial(ours, backend=backend, strategy=strategy)
        for name, (backend, strategy) in strategies(device).items()
    }
    return {BASE: base, COMPOSED: composed, **named}
