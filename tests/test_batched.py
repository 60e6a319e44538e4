"""Every row its own adapters: right, isolated bit for bit, and in any order of programs."""

import functools
import itertools
import math

import pytest
import torch
from batches import CHOICES, Batch, assert_within_budget, on, packed
from conftest import INTERPRETED

from lora_kernels import BatchPlan, LayerAdapters, add_lora_batched, lora_linear_batched
from lora_kernels.backends import BATCHED_BACKENDS, launcher

every_choice = pytest.mark.parametrize("choice", CHOICES, ids="-".join)
kernels_only = pytest.mark.parametrize("choice", CHOICES[1:], ids="-".join)
QKV = dict(m=20, widths=(64, 32, 32), k=64, slots=4, rank=16)  # whole tiles, so TMA stores them
PAIRS = dict(m=12, widths=(40, 33), slots=6, rank=24, per_row=3)
BATCHES = dict(plain=dict(), qkv=QKV, pairs=PAIRS)
every_batch = pytest.mark.parametrize("shape", BATCHES.values(), ids=BATCHES)


@every_choice
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("popularity", ["uniform", "identical", "distinct", "zipf", "base"])
def test_popularity_and_dtype(device, choice, dtype, popularity):
    for base in (True, False):
        batch = Batch(dtype=dtype, device=device, popularity=popularity, bias=base)
        batch.weight *= base  # alone, a wrong adapter cannot hide behind the base term
        assert_within_budget(batch, batch.run(choice)) if base or popularity != "base" else None


@every_choice
@pytest.mark.parametrize(
    "shape",
    [
        dict(m=1, widths=(8,), k=8, slots=1, rank=1),
        dict(m=7, widths=(33,), k=37, slots=2, rank=7),
        dict(m=17, widths=(64,), k=64, slots=64, rank=16),
        dict(m=65, widths=(40,), k=40, slots=300, rank=8),
        dict(m=33, widths=(24,), k=130, slots=3, rank=256),
        dict(m=16, widths=(16,), k=16, slots=2, rank=64),
        dict(m=70, widths=(520,), k=24, slots=3, rank=4),
    ],
    ids=lambda shape: "-".join(map(str, shape.values())),
)
def test_shapes_and_ranks(device, choice, shape):
    batch = Batch(**shape, device=device)
    assert_within_budget(batch, batch.run(choice))


@every_choice
@every_batch
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_slices_and_several_adapters_a_row(device, choice, shape, dtype):
    for base in (True, False):
        batch = Batch(**shape, dtype=dtype, device=device)
        batch.weight *= base
        assert_within_budget(batch, batch.run(choice))


@kernels_only
@every_batch
def test_packed_adapters_give_the_same_bits(device, choice, shape):
    batch = Batch(**shape, device=device)
    adapters = tuple(packed(one_slice, device) for one_slice in batch.adapters)
    x, weight, bias, slots = (t.to(device) for t in (batch.x, batch.weight, batch.bias, batch.slots))
    plan = BatchPlan(slots, None if batch.weights is None else batch.weights.to(device))
    options = dict(bias=bias, backend=choice[0], strategy=choice[1])
    assert torch.equal(lora_linear_batched(x, weight, adapters, plan, **options).cpu(), batch.run(choice))


@every_choice
def test_slices_are_the_layers_one_by_one(device, choice):
    """Also where they have other ranks in the same slot, and one has none."""
    batch = Batch(**QKV, device=device)
    batch.adapters[1].ranks[2] = 0
    y = batch.run(choice)
    parts = zip(batch.weight.split(QKV["widths"]), batch.bias.split(QKV["widths"]), batch.adapters, strict=True)
    alone = [batch.run(choice, weight=w, bias=b, adapters=(one_slice,)) for w, b, one_slice in parts]
    torch.testing.assert_close(y, torch.cat(alone, dim=1))


@every_choice
def test_the_same_adapter_twice_in_a_row_counts_twice(device, choice):
    batch = Batch(**PAIRS, device=device)
    once = torch.where(torch.arange(3) == 0, batch.slots, -1)
    twice = torch.where(torch.arange(3) == 2, -1, batch.slots[:, :1])
    ones, twos = torch.ones_like(batch.weights), torch.full_like(batch.weights, 2.0)
    y = batch.run(choice, slots=twice, weights=ones)
    torch.testing.assert_close(y, batch.run(choice, slots=once, weights=twos))
    assert torch.equal(batch.run(choice, slots=twice, weights=None), y)


@every_choice
def test_no_rows(device, choice):
    assert Batch(device=device).run(choice, rows=slice(0)).shape == (0, 72)
    assert Batch(**PAIRS, device=device).run(choice, rows=slice(0)).shape == (0, 73)


@every_choice
def test_leading_dimensions(device, choice):
    batch = Batch(device=device)
    y = batch.run(choice)
    adapters, x, weight, bias = (
        on(batch.adapters[0], device),
        *(t.to(device) for t in (batch.x, batch.weight, batch.bias)),
    )
    plan, options = BatchPlan(batch.slots.to(device)), dict(bias=bias, backend=choice[0], strategy=choice[1])
    assert torch.equal(lora_linear_batched(x.view(5, 8, -1), weight, adapters, plan, **options).cpu(), y.view(5, 8, -1))


@kernels_only
@every_batch
def test_rows_are_isolated_bit_for_bit(device, choice, shape):
    """Rows of slot 0 and base rows keep their bits whatever all others hold."""
    batch = Batch(**shape, device=device, dtype=torch.float16)
    batch.slots[::5] = 0
    batch.slots[1::5] = -1
    y = batch.run(choice)
    entries = (batch.slots == 0) | (batch.slots == -1)
    watched = entries if entries.dim() == 1 else entries.all(dim=1)
    assert watched.any() and not watched.all() and y[watched].isfinite().all()

    def changed(adapters, value=None):
        a, b, ranks, scalings = (t.clone() for t in (adapters.a, adapters.b, adapters.ranks, adapters.scalings))
        if value is None:
            ranks[1:] = 1 + ranks[1:] % 3
        else:
            a[1:], b[1:], scalings[1:] = value, value, value
        return LayerAdapters(a, b, ranks, scalings)

    for poison in (math.nan, math.inf, 6e4):
        x = torch.where(watched[:, None], batch.x, poison)
        adapters = tuple(changed(one_slice, poison) for one_slice in batch.adapters)
        assert torch.equal(batch.run(choice, x=x, adapters=adapters)[watched], y[watched])
    assert torch.equal(batch.run(choice, adapters=tuple(map(changed, batch.adapters)))[watched], y[watched])
    slots = torch.where(watched.view(-1, *[1] * (batch.slots.dim() - 1)), batch.slots, 3)
    assert torch.equal(batch.run(choice, slots=slots)[watched], y[watched])


@every_choice
@pytest.mark.parametrize("k", [33, 80])
def test_a_nan_stays_in_its_row(device, choice, k):
    """In bf16 too, with a K at which PyTorch's own products let it into the row above, on a CPU with AMX."""
    batch = Batch(m=40, k=k, device=device, dtype=torch.bfloat16)
    batch.x[5::7] = math.nan
    assert torch.equal(batch.run(choice).isnan().any(1), batch.x.isnan().any(1))


@kernels_only
@every_batch
def test_base_rows_equal_the_base_alone(device, choice, shape):
    batch = Batch(**shape, device=device)
    batch.slots[::5] = -1
    base = batch.run(choice, slots=torch.full_like(batch.slots, -1))
    y, rows = batch.run(choice), torch.arange(len(base)) % 5 == 0
    assert torch.equal(y[rows], base[rows])
    assert not torch.equal(y[~rows], base[~rows])


@kernels_only
def test_strided_inputs(device, choice):
    batch = Batch(device=device)
    strided = {
        "bias": torch.stack([batch.bias, torch.full_like(batch.bias, math.nan)], 1)[:, 0],
        "x": batch.x.mT.contiguous().mT,
        "weight": torch.cat([batch.weight, torch.full_like(batch.weight, math.nan)], 1)[:, :96],
    }
    y = batch.run(choice)
    for name, value in strided.items():
        assert torch.equal(batch.run(choice, **{name: value}), y), name
    pairs = Batch(**PAIRS, device=device)
    assert torch.equal(pairs.run(choice, slots=pairs.slots.mT.contiguous().mT), pairs.run(choice))


@kernels_only
@every_batch
def test_splitting_the_batch_changes_no_bits(device, choice, shape):
    """Except for `chained`, whose base layer is PyTorch's."""
    batch = Batch(**shape, device=device)
    y = batch.run(choice)
    for rows in (slice(0, 1), slice(3, 20), slice(5, 12)):
        if choice[1] == "chained":
            torch.testing.assert_close(batch.run(choice, rows=rows), y[rows])
        else:
            assert torch.equal(batch.run(choice, rows=rows), y[rows])


@kernels_only
@every_batch
def test_permuting_renumbering_and_repeating_change_no_bits(device, choice, shape):
    batch = Batch(**shape, device=device)
    y = batch.run(choice)
    assert torch.equal(batch.run(choice), y)
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(len(y), generator=generator)
    weights = None if batch.weights is None else batch.weights[order]
    assert torch.equal(batch.run(choice, x=batch.x[order], slots=batch.slots[order], weights=weights), y[order])
    names = torch.randperm(len(batch.adapters[0].ranks), generator=generator)  # slot s becomes names[s]
    moved = tuple(
        LayerAdapters(*(torch.empty_like(t).index_copy_(0, names, t) for t in (s.a, s.b, s.ranks, s.scalings)))
        for s in batch.adapters
    )
    slots = torch.where(batch.slots < 0, -1, names.int()[batch.slots.clamp(min=0)])
    assert torch.equal(batch.run(choice, slots=slots, adapters=moved), y)


@kernels_only
def test_slots_that_are_not_there_count_as_base(device, choice):
    """On a GPU nothing can be refused without reading it back; no memory past the table is touched either."""
    batch = Batch(device=device)
    plan = BatchPlan(torch.where(batch.slots == 1, 10**6, batch.slots).to(device))
    x, weight, bias = (t.to(device) for t in (batch.x, batch.weight, batch.bias))
    y = BATCHED_BACKENDS[choice[0]].forward(x, weight, bias, (on(batch.adapters[0], device),), plan, choice[1]).cpu()
    assert torch.equal(y, batch.run(choice, slots=torch.where(batch.slots == 1, -1, batch.slots)))


@kernels_only
def test_k_in_parts(device, choice):
    """Few columns and a long K: in one launch several programs share a tile's sum."""
    batch = Batch(m=20, widths=(24,), k=520, slots=3, rank=8, device=device)
    assert_within_budget(batch, batch.run(choice))


@pytest.mark.skipif(not INTERPRETED, reason="orders programs by hand, in the interpreter")
@pytest.mark.parametrize("launch", ["tiles", "parts"])
def test_one_launch_gives_the_same_bits_in_any_order_of_programs(launch):
    """In all 120 orders; random ones of more programs: tests/fuzz.py --orders."""
    import orders

    batch = Batch(**orders.FIVE_PROGRAMS[launch])
    expected = orders.run(batch)
    assert_within_budget(batch, expected)
    for order in itertools.permutations(range(5)):
        y = orders.run(batch, functools.partial(list.sort, key=order.index))
        assert torch.equal(y, expected), order


def test_plan_updates_in_place():
    plan = BatchPlan(torch.tensor([2, -1, 0, 2], dtype=torch.int32))
    addresses = [part.data_ptr() for part in plan.parts if part is not None]
    plan.update(torch.tensor([1, 1, -1, 0], dtype=torch.int32))
    assert plan.order.tolist() == [2, 3, 0, 1]
    assert plan.segment.tolist() == [0, 1, 2, 2]
    assert plan.distinct.tolist() == [-1, 0, 1, -1]
    assert addresses == [part.data_ptr() for part in plan.parts if part is not None]
    assert len(plan) == 4


def test_plan_of_several_adapters_a_row():
    slots = torch.tensor([[2, -1], [0, 2]], dtype=torch.int32)
    plan = BatchPlan(slots, torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    assert plan.order.tolist() == [1, 2, 0, 3]
    assert plan.segment.tolist() == [0, 1, 2, 2]
    plan.update(slots, torch.zeros(2, 2))
    assert not plan.weights.any()
    assert (len(plan), plan.adapters_per_row) == (2, 2)


def test_captured_launches_have_counters_of_their_own(monkeypatch):
    """Graphs may replay at the same time; and what is captured first is replayed when it likes."""
    device = torch.device("cpu")
    monkeypatch.setattr(launcher, "_arena_of", {})
    shared = launcher.counters(device, 100)
    assert launcher.counters(device, 50).data_ptr() == shared.data_ptr()
    monkeypatch.setattr(launcher, "_is_capturing", lambda device: True)
    pieces = [launcher.counters(device, 100) for _ in range(3)]
    assert len({shared.data_ptr(), *(piece.data_ptr() for piece in pieces)}) == 4
    assert all(piece.shape == (100,) and not piece.any() for piece in pieces)
    pieces[1].fill_(1)
    launcher.reset()
    assert not pieces[1].any()
    assert not launcher.counters(device, launcher._ARENA).any()  # more than is left
    monkeypatch.setattr(launcher, "_arena_of", {})
    assert not launcher.counters(device, 10).any()  # a capture without a warm-up


@every_choice
@every_batch
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_adapters_added_to_what_is_there(device, choice, shape, dtype):
    """Into some columns of a larger matrix, whose others keep their bits; on zeros the adapters' terms, nothing else."""
    batch = Batch(**shape, dtype=dtype, device=device, bias=False)
    batch.weight *= 0.0
    n, x = len(batch.weight), batch.x.to(device)
    wide = torch.zeros(len(x), n + 3, dtype=dtype, device=device)
    wide[:, :2], wide[:, -1] = math.nan, math.inf
    before = wide.clone()
    adapters = tuple(on(one_slice, device) for one_slice in batch.adapters)
    plan = BatchPlan(batch.slots.to(device), None if batch.weights is None else batch.weights.to(device))
    y = wide[:, 2:-1]
    assert add_lora_batched(y, x, adapters, plan, backend=choice[0]) is y
    assert_within_budget(batch, y.cpu())
    assert all(torch.equal(wide[:, c].isnan(), before[:, c].isnan()) for c in (0, 1)) and bool(
        wide[:, -1].isinf().all()
    )
    once = y.clone()
    add_lora_batched(y, x, adapters, plan, backend=choice[0])
    if dtype is torch.float32:  # others round between an entry and the next
        torch.testing.assert_close(y, 2 * once)


@every_choice
@every_batch
@pytest.mark.parametrize("rows", [0, 1, 9])
def test_a_step_of_fewer_rows_than_the_plan(device, choice, shape, rows):
    """The others are base rows; and so they are in each beginning of the plan that has all of the step's rows."""
    batch = Batch(**shape, device=device)
    weights = None if batch.weights is None else batch.weights.to(device)
    plan = BatchPlan(batch.slots.to(device), weights)
    plan.update(batch.slots[:rows].to(device), None if weights is None else weights[:rows])
    x, weight, bias = (t.to(device) for t in (batch.x, batch.weight, batch.bias))
    adapters = tuple(on(one_slice, device) for one_slice in batch.adapters)
    of_step = batch.slots.clone()
    of_step[rows:] = -1
    for padded in sorted({rows, min(rows + 1, len(plan)), len(plan)}):
        y = lora_linear_batched(
            x[:padded], weight, adapters, plan.first(padded), bias=bias, backend=choice[0], strategy=choice[1]
        )
        assert torch.equal(y.cpu(), batch.run(choice, slice(padded), slots=of_step))
