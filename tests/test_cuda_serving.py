"""The CUDA kernels while serving: CUDA graphs, streams, a thousand repeats, compute-sanitizer.

As in test_gpu_serving.py, whose layer and streams these are: without a GPU a graph is a function, a stream is none, and the
kernels are emulated.
"""

import math
import random
import sys

import pytest
import torch
from test_cuda import CHOICE, needs_kernels, shuffle  # noqa: F401
from test_gpu_serving import (
    NAMES,
    STEPS,
    Served,
    capture,
    check_repeats,
    on,
    sanitized,
    streams,
    synchronize,
)

from lora_kernels import lora_linear_batched

pytestmark = [needs_kernels, pytest.mark.usefixtures("shuffle")]


class ServedByCuda(Served):
    def y(self):
        options = dict(bias=self.bias, backend=CHOICE[0], strategy=CHOICE[1])
        return lora_linear_batched(self.x, self.weight, self.pool.layer("proj"), self.plan, **options)


def served_layer(**options):
    return ServedByCuda("one_launch", **options)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_graph_replays_with_other_slots_ranks_and_adapters(dtype):
    served, rng = served_layer(dtype=dtype), random.Random(0)
    replay, y = capture(served.y)
    for step in range(STEPS):
        served.replace(rng.choice(NAMES), len(NAMES) + step)
        with served.using(rng.sample(NAMES, rng.choice((1, 2, 3)))) as slots:
            tenants = served.fill(rng, slots)
            y.fill_(math.nan)
            replay()
            assert torch.equal(y, served.truth(tenants)), f"step {step}"


def test_two_streams_and_two_graphs_at_once():
    pair, lanes, rng = [served_layer(seed=seed) for seed in range(2)], streams(2), random.Random(0)
    graphs = [capture(served.y) for served in pair]
    with pair[0].using(NAMES[:2]) as first, pair[1].using(NAMES[2:4]) as second:
        tenants = [served.fill(rng, slots) for served, slots in zip(pair, (first, second), strict=True)]
        synchronize()
        for _ in range(STEPS):
            eager = []
            for served, (replay, y), lane in zip(pair, graphs, lanes, strict=True):
                with on(lane):
                    y.fill_(math.nan)
                    replay()
                    eager.append(served.y())
            synchronize()
            for served, names, (_, y), also in zip(pair, tenants, graphs, eager, strict=True):
                assert torch.equal(y, served.truth(names)) and torch.equal(also, y)


def test_the_same_bits_a_thousand_times():
    check_repeats(served_layer())


def run_small_batches():
    """What compute-sanitizer watches."""
    for rows in (5, 16):
        served = served_layer(rows=rows)
        with served.using(NAMES[:3]) as slots:
            tenants = served.fill(random.Random(0), slots)
            for _ in range(2):
                assert torch.equal(served.y(), served.truth(tenants))


def test_what_the_sanitizer_watches_is_right():
    run_small_batches()


@pytest.mark.gpu
@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "synccheck"])
def test_compute_sanitizer_finds_nothing(tool):
    status, output = sanitized(tool, "run_small_batches", __file__)
    assert status == 0 and "SUMMARY: 0 " in output, output[-4000:]


@pytest.mark.gpu
def test_a_launch_that_cannot_be_raises_with_the_name_of_the_error(monkeypatch):
    served = served_layer()
    monkeypatch.setattr(torch.Tensor, "get_device", lambda tensor: 99)
    with pytest.raises(RuntimeError, match="could not be launched: cudaErrorInvalidDevice"):
        served.y()


if __name__ == "__main__":
    {"run_small_batches": run_small_batches}[sys.argv[1]]()
