"""What the host pays for a call and for a plan, as multiples of F.linear in the same rounds: a doubling fails.

Each figure is the fastest of many samples: a busy machine makes a time longer, never shorter.
"""

import pytest
import torch
import torch.nn.functional as F

from benchmarks.timing import take_turns, wall_timer
from lora_kernels import BatchPlan, LayerAdapters, lora_linear, lora_linear_batched

ROUNDS, CALLS = 40, 10
# Measured with torch 2.13 and Python 3.11: 16, 70, 52, 10 and 8. The limits are 1.8 times that.
LIMITS = {"lora_linear": 29, "forward + backward": 126, "lora_linear_batched": 94, "BatchPlan": 18, "update": 14.4}


@pytest.fixture(scope="module")
def ratios():
    x, weight, lora_a, lora_b = torch.randn(4, 64), torch.randn(64, 64), torch.randn(8, 64), torch.randn(64, 8)
    trained = lora_a.clone().requires_grad_(), lora_b.clone().requires_grad_()
    slots, ranks = torch.arange(32, dtype=torch.int32) % 8, torch.full((8,), 8, dtype=torch.int32)
    adapters = LayerAdapters(torch.randn(8, 8, 64), torch.randn(8, 64, 8), ranks, torch.ones(8))
    plan, updated = BatchPlan(slots[:4]), BatchPlan(slots)
    steps = {
        "F.linear": lambda: F.linear(x, weight),
        "lora_linear": lambda: lora_linear(x, weight, lora_a, lora_b, 2.0, backend="eager"),
        "forward + backward": lambda: torch.autograd.grad(
            lora_linear(x, weight, *trained, 2.0, backend="eager").sum(), trained
        ),
        "lora_linear_batched": lambda: lora_linear_batched(x, weight, adapters, plan, backend="eager"),
        "BatchPlan": lambda: BatchPlan(slots),
        "update": lambda: updated.update(slots),
    }
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        samples = take_turns({name: wall_timer([step] * CALLS) for name, step in steps.items()}, ROUNDS)
    finally:
        torch.set_num_threads(threads)
    return {name: min(times) / min(samples["F.linear"]) for name, times in samples.items()}


@pytest.mark.parametrize("name", LIMITS)
def test_the_host_cost_has_not_doubled(name, ratios):
    assert ratios[name] < LIMITS[name], f"{name}: {ratios[name]:.1f} times F.linear, expected less than {LIMITS[name]}"
