"""Batched kernels with one line changed: some test of theirs must notice, and must accept the kernels as they are."""

import copy
import math
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from batches import Batch, assert_within_budget
from broken import broken_kernels
from conftest import INTERPRETED

from lora_kernels.backends import launcher, triton_batched

pytestmark = [
    pytest.mark.skipif(not INTERPRETED, reason="a wild store on a GPU would harm other tests"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # numpy's, about NaN and what lies beyond a mask
]

BATCHES = dict(
    plain=dict(m=18, widths=(40,), k=96, slots=3, rank=8),
    slices=dict(m=8, widths=(20, 40), k=64, slots=3, rank=40),
    pairs=dict(m=6, widths=(24,), k=40, slots=3, rank=5, per_row=2),
    many=dict(m=12, widths=(24,), k=32, slots=9, rank=40, popularity="distinct"),
    parts=dict(m=4, widths=(16,), k=400, slots=2, rank=4),
)


class Mutant(NamedTuple):
    """A kernel module with `old` in its source replaced by `new`, and a batch and a strategy that show it."""

    name: str
    module: str
    old: str
    new: str
    batch: str = "plain"
    strategy: str = "extended"


def mutants(module, strategy, *rows):
    return [Mutant(name, module, old, new, batch, strategy) for name, batch, old, new in rows]


MUTANTS = [
    *mutants(
        "batched", "extended",
        ("shrink: all rows take every adapter's h", "plain",
         "own = (own_segment[:, None] == (first + pair // SLICES)[None, :]) &", "own = (place < entries)[:, None] &"),
        ("shrink: stores past the rank", "pairs",
         "live = rank_row < tl.load(pick(ranks, slice) + slot, mask=slot >= 0, other=0)", "live = slot >= 0"),
        ("shrink: stores past the rows", "plain",
         "tl.load(segment + place, mask=place < entries, other=-1)", "tl.load(segment + tl.minimum(place, entries - 1))"),
        ("shrink: only the first block of ranks", "slices",
         "for r in range(0, tl.max(longest), BLOCK_R):\n        for", "for r in range(0, BLOCK_R, BLOCK_R):\n        for"),
        ("shrink: the longest rank of the last slice", "slices",
         "longest = tl.maximum(longest, tl.load(ranks[s] + own_slot, mask=own_slot >= 0, other=0))",
         "longest = tl.load(ranks[s] + own_slot, mask=own_slot >= 0, other=0)"),
        ("shrink: K tail skipped", "plain",
         "range(part * SHRINK_K, K, SPLIT", "range(part * SHRINK_K, K // SHRINK_K * SHRINK_K, SPLIT"),
        ("shrink: parts overlap", "plain", "K, SPLIT * SHRINK_K)", "K, SHRINK_K)"),
        ("shrink: all parts in one plane", "plain", "planes + (part.to(tl.int64) * entries + entry)", "planes + entry"),
        ("shrink: slices mixed up", "slices", "slice = pair % SLICES", "slice = pair // SLICES % SLICES"),
        ("shrink: an entry taken for a row", "pairs", "(entry // ADAPTERS)[:, None]", "(entry % M)[:, None]"),
        ("h: one plane skipped", "plain", "tl.static_range(PLANES - 1)", "tl.static_range(PLANES - 2)"),
        ("h: the same plane again", "plain", "        plane += tl.cast(entries, tl.int64) * stride\n", ""),
        ("h: what lies past the rank", "plain",
         "tl.where(offs_r[None, :] < rank[:, None], h * factor[:, None], 0.0)", "h * factor[:, None]"),
        ("h: factor ignored", "plain", "h * factor[:, None]", "h"),
        ("b: what lies past the rank", "plain", "return tl.where((offs_r < rank)[:, None], tile, 0.0)", "return tile"),
        ("b: the first adapter's", "plain", "tl.load(b + first_row * width + offs", "tl.load(b + offs"),
        ("expand: other rows get terms too", "plain", "acc = tl.where(mine[:, None], acc + term, acc)", "acc += term"),
        ("expand: a slot skipped", "plain", "slot = next_slot(own, slot)", "slot = next_slot(own, slot + 1)"),
        ("expand: scaling ignored", "plain", "tl.load(scalings + slot).to(ACC) +", "1.0 +"),
        ("expand: weights ignored", "pairs", "factor *= tl.load(weights + entry", "tl.load(weights + entry"),
        ("expand: the first entry twice", "pairs", "entry = rows * ADAPTERS + j", "entry = rows * ADAPTERS"),
        ("expand: another slice's h", "slices", "planes + slice * R_MAX, n", "planes, n"),
        ("slices: where they begin", "slices",
         "tl.where(beyond, start + widths[s], start)", "tl.where(beyond, start + 16, start)"),
        ("slices: one tile too far", "slices", "tile >= tiles)", "tile > tiles)"),
        ("slices: another slice's b", "slices", "acc, pick(b, slice)", "acc, b[0]"),
        ("slices: a tile reaches into the next", "slices", "bias, m, start + n, M, end, N", "bias, m, start + n, M, N, N"),
    ),
    *mutants(
        "batched", "chained",
        ("y overwritten", "plain", "load_tile(y, m, start + n, M, end, N, BLOCK_M, BLOCK_N, False).to(ACC)",
         "tl.zeros((BLOCK_M, BLOCK_N), ACC)"),
    ),
    *mutants(
        "decode", "one_launch",
        ("state left as it is", "plain", 'tl.atomic_xchg(state + t, 0, sem="relaxed", scope="gpu")', "pass"),
        ("arrivals left as they are", "plain", 'tl.atomic_xchg(arrived, 0, sem="relaxed", scope="gpu")', "pass"),
        ("the last part of K left out", "parts", "tl.static_range(1, PARTS)", "tl.static_range(1, PARTS - 1)"),
        ("a part that is not there yet", "parts", 'scope="gpu") == 2 * PARTS', 'scope="gpu") == 2 * PARTS - 1'),
        ("all parts in one place", "parts", "tl.store(parts_of(spill, tile, part,", "tl.store(parts_of(spill, tile, 0,"),
        ("one tile's sum for another", "plain",
         "tl.store(parts_of(spill, tile, part,", "tl.store(parts_of(spill, 0, part,"),
        ("prefetch: the same group again", "many",
         "tl.where(following, first + GROUP, 0)", "tl.where(following, first, 0)"),
        ("prefetch: the same ranks again", "many", "tl.where(r + BLOCK_R < longest, r + BLOCK_R, 0)", "r"),
        ("prefetch: the first ranks again", "many", "tl.where(following, r,", "tl.where(following, 0,"),
        ("the last adapter of the batch skipped", "many", "ADAPTERS - 1) + 1", "ADAPTERS - 1)"),
        ("other rows get terms too", "plain",
         "acc = tl.where((own == slot)[:, None], acc + term, acc)", "acc += term"),
        ("weights ignored", "pairs", "factor *= tl.load(weights + entry", "tl.load(weights + entry"),
        ("a tile reaches into the next slice", "slices", "start + n, M, start + width, N,", "start + n, M, N, N,"),
        ("another tile's b", "slices",
         "locate_columns(tile // tiles_m, widths, BLOCK_N)\n    tiles",
         "locate_columns(tile % tiles_m, widths, BLOCK_N)\n    tiles"),
    ),
]  # fmt: skip


@pytest.mark.parametrize("strategy", triton_batched.STRATEGIES)
@pytest.mark.parametrize("batch", BATCHES)
def test_the_kernels_are_accepted(batch, strategy):
    judge(batch, strategy)


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: f"{mutant.strategy}-{mutant.name}".replace(" ", "_"))
def test_a_broken_kernel_is_rejected(monkeypatch, tmp_path, mutant):
    modules = broken_kernels(mutant, monkeypatch, tmp_path)
    kernels = {
        name: getattr(modules[kernel.fn.__module__.rpartition(".")[2]], kernel.__name__)
        for name, kernel in vars(triton_batched._kernels()).items()
    }
    monkeypatch.setattr(triton_batched, "_kernels", lambda: SimpleNamespace(**kernels))
    try:
        with pytest.raises(AssertionError):
            judge(mutant.batch, mutant.strategy)
    finally:
        launcher.reset()


def judge(name, strategy):
    """The error budget, the same bits with the programs in other orders, the counters, and the isolation of rows."""
    from interpreter import programs_in_order

    batch, choice = Batch(**BATCHES[name]), ("triton", strategy)
    y = batch.run(choice)
    assert_within_budget(batch, y)
    for rearrange in (lambda programs: None, lambda programs: programs.append(programs.pop(0))):
        with programs_in_order(rearrange):  # the last program first; the first, and then the last
            assert torch.equal(batch.run(choice), y)
    assert not launcher.counters(torch.device("cpu"), 1).any()
    others = copy.deepcopy(batch.adapters)
    for one_slice in others:
        one_slice.a[1:] = one_slice.b[1:] = one_slice.scalings[1:] = math.nan
    watched = (batch.slots < 1).view(len(y), -1).all(1)
    assert watched.any() and torch.equal(batch.run(choice, adapters=others)[watched], y[watched])
