"""Every row its own adapter: right, isolated bit for bit, and in any order of programs."""

import math
import random

import pytest
import torch
from conftest import INTERPRETED

from lora_kernels import BatchPlan, LayerAdapters, lora_linear_batched, reference, testing
from lora_kernels.backends import BATCHED_BACKENDS, launcher

CHOICES = [("eager", "looped")]
if INTERPRETED or torch.cuda.is_available():
    CHOICES += [("triton", strategy) for strategy in BATCHED_BACKENDS["triton"].STRATEGIES]
every_choice = pytest.mark.parametrize("choice", CHOICES, ids="-".join)
kernels_only = pytest.mark.parametrize("choice", CHOICES[1:], ids="-".join)


class Batch:
    """Random adapters of random ranks (NaN past each rank) and rows; `run` goes through the public function."""

    def __init__(
        self, m=40, n=72, k=96, slots=5, rank=33, dtype=torch.float32, device="cpu", popularity="uniform", bias=True
    ):
        generator = torch.Generator().manual_seed(m * n + k * rank + slots)

        def normal(*shape, scale=1.0):
            return (torch.randn(shape, generator=generator) * scale).to(dtype)

        self.x, self.weight, self.bias = normal(m, k), normal(n, k, scale=k**-0.5), normal(n) if bias else None
        self.a, self.b = normal(slots, rank, k, scale=k**-0.5), normal(slots, n, rank, scale=rank**-0.5)
        self.ranks = torch.randint(1, rank + 1, (slots,), generator=generator, dtype=torch.int32)
        self.scalings = torch.rand(slots, generator=generator) + 0.5
        for slot, r in enumerate(self.ranks.tolist()):
            self.a[slot, r:] = self.b[slot, :, r:] = math.nan
        self.slots = {
            "uniform": torch.randint(-1, slots, (m,), generator=generator),
            "identical": torch.full((m,), slots - 1),
            "distinct": torch.arange(m) % slots,
            "zipf": (torch.rand(m, generator=generator).pow(3) * slots).long(),
            "base": torch.full((m,), -1),
        }[popularity].int()
        self.device = device

    def run(self, choice, rows=slice(None), **change):
        t = {**vars(self), **change}
        on = {name: None if t[name] is None else t[name].to(self.device) for name in ("x", "weight", "bias", "slots")}
        adapters = LayerAdapters(*(t[name].to(self.device) for name in ("a", "b", "ranks", "scalings")))
        backend, strategy = choice
        with testing.poisoned_empty():
            return lora_linear_batched(
                on["x"][rows], on["weight"], adapters, BatchPlan(on["slots"][rows].contiguous()), bias=on["bias"],
                backend=backend, strategy=strategy,
            ).cpu()  # fmt: skip

    def expected(self, dtype=torch.float64):
        t = [getattr(self, name).to(dtype) for name in ("x", "weight", "a", "b")]
        bias = None if self.bias is None else self.bias.to(dtype)
        return reference.lora_linear_batched(*t, self.ranks, self.scalings, self.slots, bias)


def assert_within_budget(batch, y):
    truth, eager = batch.expected(), batch.expected(batch.x.dtype)
    scale = truth.square().mean().sqrt()

    def rms(t):
        return ((t.double() - truth).square().mean().sqrt() / scale).item()

    assert y.dtype == batch.x.dtype
    accumulation = torch.finfo(torch.float32).eps * math.sqrt(batch.a.shape[2] + batch.a.shape[1])
    floor = 2 * torch.finfo(y.dtype).eps / math.sqrt(y.numel()) + accumulation  # as in docs/numerics.md
    assert rms(y) <= 1.25 * rms(eager) + floor


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
        dict(m=1, n=8, k=8, slots=1, rank=1),
        dict(m=7, n=33, k=37, slots=2, rank=7),
        dict(m=17, n=64, k=64, slots=64, rank=16),
        dict(m=65, n=40, k=40, slots=300, rank=8),
        dict(m=33, n=24, k=130, slots=3, rank=256),
        dict(m=16, n=16, k=16, slots=2, rank=64),
        dict(m=70, n=520, k=24, slots=3, rank=4),
    ],
    ids=lambda shape: "-".join(map(str, shape.values())),
)
def test_shapes_and_ranks(device, choice, shape):
    batch = Batch(**shape, device=device)
    assert_within_budget(batch, batch.run(choice))


@kernels_only
@pytest.mark.parametrize("shape", [dict(), dict(m=17, n=33, k=37, slots=7, rank=40)], ids=["plain", "ragged"])
def test_packed_adapters_give_the_same_bits(device, choice, shape):
    """Each with rows for its own rank, in any order and with gaps (NaN), instead of room for the largest."""
    batch = Batch(**shape, device=device)
    ranks = batch.ranks.tolist()
    total = sum(ranks) + 3 * len(ranks)
    a, b = (torch.full((total, size), math.nan) for size in (batch.a.shape[2], batch.b.shape[1]))
    first_row, row = torch.empty(len(ranks), dtype=torch.int64), 2
    for slot in reversed(range(len(ranks))):
        rows = slice(row, row + ranks[slot])
        a[rows], b[rows], first_row[slot] = batch.a[slot, : ranks[slot]], batch.b[slot, :, : ranks[slot]].mT, row
        row += ranks[slot] + 3
    packed = LayerAdapters(*(t.to(device) for t in (a, b, batch.ranks, batch.scalings, first_row)), batch.a.shape[1])
    x, weight, bias, slots = (t.to(device) for t in (batch.x, batch.weight, batch.bias, batch.slots))
    options = dict(bias=bias, backend=choice[0], strategy=choice[1])
    assert torch.equal(lora_linear_batched(x, weight, packed, BatchPlan(slots), **options).cpu(), batch.run(choice))


@every_choice
def test_no_rows(device, choice):
    batch = Batch(device=device)
    assert batch.run(choice, rows=slice(0)).shape == (0, 72)


@every_choice
def test_leading_dimensions(device, choice):
    batch = Batch(device=device)
    y = batch.run(choice)
    adapters = LayerAdapters(batch.a, batch.b, batch.ranks, batch.scalings)
    if device == "cpu":
        x, plan = batch.x.view(5, 8, -1), BatchPlan(batch.slots)
        options = dict(bias=batch.bias, backend=choice[0], strategy=choice[1])
        assert torch.equal(lora_linear_batched(x, batch.weight, adapters, plan, **options), y.view(5, 8, -1))


@kernels_only
def test_rows_are_isolated_bit_for_bit(device, choice):
    """Rows of slot 0 and base rows keep their bits whatever all others hold."""
    batch = Batch(device=device, dtype=torch.float16)
    y = batch.run(choice)
    watched = (batch.slots == 0) | (batch.slots == -1)
    assert watched.any() and not watched.all()
    for poison in (math.nan, math.inf, 6e4):
        x, a, b, scalings = (t.clone() for t in (batch.x, batch.a, batch.b, batch.scalings))
        x[~watched], a[1:], b[1:], scalings[1:] = poison, poison, poison, poison
        assert torch.equal(batch.run(choice, x=x, a=a, b=b, scalings=scalings)[watched], y[watched])
    ranks = torch.where(torch.arange(5) > 0, 1 + batch.ranks % 3, batch.ranks).int()
    assert torch.equal(batch.run(choice, ranks=ranks)[watched], y[watched])
    slots = torch.where(watched, batch.slots, 4)
    assert torch.equal(batch.run(choice, slots=slots)[watched], y[watched])


@kernels_only
def test_base_rows_equal_the_base_alone(device, choice):
    batch = Batch(device=device)
    base = batch.run(choice, slots=torch.full_like(batch.slots, -1))
    y = batch.run(choice)
    assert torch.equal(y[batch.slots == -1], base[batch.slots == -1])
    assert not torch.equal(y[batch.slots >= 0], base[batch.slots >= 0])


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


@kernels_only
def test_splitting_the_batch_changes_no_bits(device, choice):
    batch = Batch(device=device)
    y = batch.run(choice)
    for rows in (slice(0, 1), slice(3, 20), slice(20, 40)):
        assert torch.equal(batch.run(choice, rows=rows), y[rows])


@kernels_only
def test_permuting_renumbering_and_repeating_change_no_bits(device, choice):
    batch = Batch(device=device)
    y = batch.run(choice)
    assert torch.equal(batch.run(choice), y)
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(40, generator=generator)
    assert torch.equal(batch.run(choice, x=batch.x[order], slots=batch.slots[order]), y[order])
    names = torch.randperm(5, generator=generator)  # slot s becomes names[s]
    moved = {name: torch.empty_like(t).index_copy_(0, names, t) for name, t in (
        ("a", batch.a), ("b", batch.b), ("ranks", batch.ranks), ("scalings", batch.scalings),
    )}  # fmt: skip
    slots = torch.where(batch.slots < 0, -1, names.int()[batch.slots.clamp(min=0)])
    assert torch.equal(batch.run(choice, slots=slots, **moved), y)


@kernels_only
def test_slots_that_are_not_there_count_as_base(device, choice):
    """On a GPU nothing can be refused without reading it back; no memory past the table is touched either."""
    batch = Batch(device=device)
    plan = BatchPlan(torch.where(batch.slots == 1, 10**6, batch.slots).to(device))
    adapters = LayerAdapters(*(t.to(device) for t in (batch.a, batch.b, batch.ranks, batch.scalings)))
    module = BATCHED_BACKENDS["triton"]
    x, weight, bias = (t.to(device) for t in (batch.x, batch.weight, batch.bias))
    y = module.forward(x, weight, bias, adapters, plan, choice[1]).cpu()
    slots = torch.where(batch.slots == 1, -1, batch.slots)
    assert torch.equal(y, batch.run(choice, slots=slots))


@pytest.mark.skipif(not INTERPRETED, reason="orders programs by hand, in the interpreter")
def test_one_launch_gives_the_same_bits_in_any_order_of_programs(monkeypatch):
    from triton.runtime import interpreter

    builder = interpreter.interpreter_builder
    batch = Batch(m=20, n=48, k=70, slots=3, rank=17, dtype=torch.float16)
    choice = ("triton", "one_launch")
    expected = batch.run(choice)
    rng, set_grid_idx = random.Random(0), type(builder).set_grid_idx
    for round_ in range(40):
        order = []

        def permuted(self, x, y, z, order=order, round_=round_):
            if not order:
                order += range(self.grid_dim[0])
                order.reverse() if round_ == 0 else rng.shuffle(order)
            set_grid_idx(self, order.pop(), y, z)

        monkeypatch.setattr(type(builder), "set_grid_idx", permuted)
        assert torch.equal(batch.run(choice), expected)
        assert not launcher.counters(torch.device("cpu"), 1).any()


def test_plan_updates_in_place():
    plan = BatchPlan(torch.tensor([2, -1, 0, 2], dtype=torch.int32))
    addresses = plan.slots.data_ptr(), plan.order.data_ptr()
    plan.update(torch.tensor([1, 1, -1, 0], dtype=torch.int32))
    assert plan.order.tolist() == [2, 3, 0, 1]
    assert addresses == (plan.slots.data_ptr(), plan.order.data_ptr())
    assert len(plan) == 4


def call(**change):
    batch = Batch()
    adapters = LayerAdapters(batch.a, batch.b, batch.ranks, batch.scalings)
    arguments = dict(x=batch.x, weight=batch.weight, adapters=adapters, plan=BatchPlan(batch.slots), bias=batch.bias)
    return lora_linear_batched(**{**arguments, **change})


def adapters(**change):
    batch = Batch()
    return LayerAdapters(**{**{name: getattr(batch, name) for name in ("a", "b", "ranks", "scalings")}, **change})


BAD = {
    "x is a list": (lambda: call(x=[1.0]), TypeError, "x: got list"),
    "x has another K": (lambda: call(x=torch.randn(40, 95)), ValueError, r"x: got shape \[40, 95\].*\[72, 96\]"),
    "x is a scalar": (lambda: call(x=torch.tensor(1.0)), ValueError, r"x: got shape \[\]"),
    "x has more rows": (lambda: call(x=torch.randn(41, 96)), ValueError, "plan: got 40 slots, expected 41"),
    "x is half": (lambda: call(x=torch.randn(40, 96).half()), TypeError, "weight: got torch.float32, expected torch.float16"),
    "x is an integer": (lambda: call(x=torch.ones(40, 96, dtype=torch.int64)), TypeError, "x: got torch.int64"),
    "x is meta": (lambda: call(x=torch.empty(40, 96, device="meta")), ValueError, "x: got a meta tensor"),
    "x wants a gradient": (lambda: call(x=torch.randn(40, 96, requires_grad=True)), NotImplementedError, "no backward"),
    "weight is 1-D": (lambda: call(weight=torch.randn(96)), ValueError, r"weight \[N, K\], which is \[96\]"),
    "weight has another N": (
        lambda: call(weight=torch.randn(73, 96)),
        ValueError, r"expected \[slots, R, 96\] and \[slots, 73, R\]",
    ),
    "weight is meta": (lambda: call(weight=torch.empty(72, 96, device="meta")), ValueError, "weight: got a meta tensor"),
    "bias is too long": (lambda: call(bias=torch.randn(73)), ValueError, r"bias: got shape \[73\], expected \[72\]"),
    "bias is half": (lambda: call(bias=torch.randn(72).half()), TypeError, "bias: got torch.float16, expected torch.float32"),
    "adapters is a tuple": (lambda: call(adapters=(1, 2)), TypeError, "adapters: got tuple, expected a LayerAdapters"),
    "plan is a tensor": (lambda: call(plan=torch.zeros(40)), TypeError, "plan: got Tensor, expected a BatchPlan"),
    "slot past the end": (
        lambda: call(plan=BatchPlan(torch.full((40,), 5, dtype=torch.int32))),
        ValueError, "slot 5, expected at most 4",
    ),
    "unknown backend": (lambda: call(backend="cuda"), ValueError, "backend: got 'cuda'"),
    "unknown strategy": (lambda: call(strategy="chained"), ValueError, "strategy: got 'chained', expected one of extended"),
    "strategy of the other": (
        lambda: call(backend="eager", strategy="one_launch"),
        NotImplementedError, "no strategy 'one_launch'",
    ),
    "slots are int64": (
        lambda: BatchPlan(torch.zeros(4, dtype=torch.int64)),
        TypeError, "slots: got torch.int64, expected an int32",
    ),
    "slots are a list": (lambda: BatchPlan([0, 1]), TypeError, "slots: got list"),
    "slots are 2-D": (lambda: BatchPlan(torch.zeros(2, 2, dtype=torch.int32)), ValueError, r"slots: got shape \[2, 2\]"),
    "update with more rows": (
        lambda: BatchPlan(torch.zeros(4, dtype=torch.int32)).update(torch.zeros(5, dtype=torch.int32)),
        ValueError, "slots: got 5 rows, expected 4",
    ),
    "a is 2-D": (lambda: adapters(a=torch.randn(5, 33)), ValueError, r"a: got shape \[5, 33\]"),
    "a is a view": (lambda: adapters(a=torch.randn(5, 96, 33).mT), ValueError, "a: got shape.*contiguous"),
    "a and b differ in dtype": (lambda: adapters(b=torch.randn(5, 72, 33).half()), TypeError, "b: got torch.float16"),
    "a and b differ in rank": (
        lambda: adapters(b=torch.randn(5, 72, 32)),
        ValueError, r"b: got shape \[5, 72, 32\], expected \[5, N, 33\]",
    ),
    "a and b differ in slots": (lambda: adapters(b=torch.randn(4, 72, 33)), ValueError, r"expected \[5, N, 33\]"),
    "ranks are int64": (
        lambda: adapters(ranks=torch.ones(5, dtype=torch.int64)),
        TypeError, "ranks: got torch.int64, expected torch.int32",
    ),
    "too few ranks": (lambda: adapters(ranks=torch.ones(4, dtype=torch.int32)), ValueError, "ranks: got 4 slots, expected 5"),
    "scalings are half": (lambda: adapters(scalings=torch.ones(5).half()), TypeError, "scalings: got torch.float16"),
    "too many scalings": (lambda: adapters(scalings=torch.ones(6)), ValueError, "scalings: got 6 slots, expected 5"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    action, error, message = BAD[name]
    with pytest.raises(error, match=message):
        action()
