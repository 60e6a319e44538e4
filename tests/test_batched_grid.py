"""Ranks x adapters x popularity x rows x dtypes x strategies: every two values meet in some batch."""

import itertools
import random

import pytest
import torch
from batches import CHOICES, Batch, assert_within_budget

GRID = dict(
    rank=[1, 7, 8, 16, 33, 64, 128, 256],
    slots=[1, 2, 8, 64, 300],
    popularity=["uniform", "identical", "zipf", "distinct", "base"],
    m=[0, 1, 2, 15, 16, 33, 64, 130, 257],
    dtype=[torch.float16, torch.bfloat16, torch.float32],
    choice=CHOICES,
)


def every_pair(grid):
    """Few and small points of the grid such that every two values of different axes meet in one of them."""
    rng = random.Random(0)
    axes = [[(name, value) for value in values] for name, values in grid.items()]
    left = {pair for two in itertools.combinations(axes, 2) for pair in itertools.product(*two)}
    while left:
        start = dict(min(left, key=str))
        points = [{name: start.get(name, rng.choice(values)) for name, values in grid.items()} for _ in range(50)]
        point = max(
            points, key=lambda point: (len(left & pairs_of(point)), -point["m"] * point["slots"] * point["rank"])
        )
        left -= pairs_of(point)
        yield point


def pairs_of(point):
    return set(itertools.combinations(point.items(), 2))


def name(point):
    return "-".join(("-".join(point["choice"]), *(str(value) for axis, value in point.items() if axis != "choice")))


@pytest.mark.parametrize("point", list(every_pair(GRID)), ids=name)
def test_grid(device, point):
    batch = Batch(
        **{axis: value for axis, value in point.items() if axis != "choice"}, widths=(24,), k=40, device=device
    )
    assert_within_budget(batch, batch.run(point["choice"]))


@pytest.mark.parametrize("choice", CHOICES, ids="-".join)
def test_ragged_prefill(device, choice):
    """Requests of uneven lengths one after another, each with its own adapter; beyond the rows of a decoding step."""
    batch = Batch(m=700, widths=(40, 24), k=72, slots=4, rank=16, dtype=torch.float16, device=device)
    lengths = torch.tensor([1, 333, 5, 250, 111])
    batch.slots = torch.tensor([2, 0, -1, 3, 2], dtype=torch.int32).repeat_interleave(lengths)
    assert_within_budget(batch, batch.run(choice))
