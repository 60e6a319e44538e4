"""Every bad argument of `lora_linear_batched`, `BatchPlan` and `LayerAdapters` is refused by name."""

import copy

import pytest
import torch
from batches import Batch, on

from lora_kernels import BatchPlan, add_lora_batched, lora_linear_batched


def call(**change):
    batch = Batch()
    plan = BatchPlan(batch.slots)
    arguments = dict(x=batch.x, weight=batch.weight, adapters=batch.adapters, plan=plan, bias=batch.bias)
    lora_linear_batched(**arguments)  # which the adapters remember
    return lora_linear_batched(**{**arguments, **change})


def add(**change):
    batch = Batch()
    arguments = dict(y=torch.zeros(40, 72), x=batch.x, adapters=batch.adapters, plan=BatchPlan(batch.slots))
    return add_lora_batched(**{**arguments, **change})


def adapters(**change):
    return on(Batch().adapters[0], "cpu", **change)


def slices(*widths, **change):
    """Those of `widths`, the last one changed."""
    *others, last = Batch(widths=widths).adapters
    return *others, on(last, "cpu", **change)


def plan(*shape, dtype=torch.int32, weights=None):
    return BatchPlan(torch.zeros(*shape, dtype=dtype), weights)


BAD = {
    "x is a list": (lambda: call(x=[1.0]), TypeError, "x: got list"),
    "x has another K": (lambda: call(x=torch.randn(40, 95)), ValueError, r"x: got shape \[40, 95\].*\[72, 96\]"),
    "x is a scalar": (lambda: call(x=torch.tensor(1.0)), ValueError, r"x: got shape \[\]"),
    "x has more rows": (lambda: call(x=torch.randn(41, 96)), ValueError, "plan: got 40 rows of slots, expected 41"),
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
    "weight is empty": (
        lambda: call(x=torch.empty(40, 0), weight=torch.empty(72, 0)),
        ValueError, r"which is \[72, 0\]; N, K >= 1",
    ),
    "bias is too long": (lambda: call(bias=torch.randn(73)), ValueError, r"bias: got shape \[73\], expected \[72\]"),
    "bias is half": (lambda: call(bias=torch.randn(72).half()), TypeError, "bias: got torch.float16, expected torch.float32"),
    "adapters are numbers": (lambda: call(adapters=(1, 2)), TypeError, "adapters: got int, expected a LayerAdapters"),
    "no adapters": (lambda: call(adapters=()), ValueError, "adapters: got none, expected a LayerAdapters"),
    "slices are too wide": (
        lambda: call(adapters=slices(40, 40)),
        ValueError, r"b \[5, 40, 33\] and .* N_\{1..2\} which add up to 72",
    ),
    "slices differ in K": (
        lambda: call(adapters=slices(40, 32, a=torch.randn(5, 33, 95))),
        ValueError, r"and a \[5, 33, 95\].*expected \[slots, R, 96\]",
    ),
    "slices differ in slots": (
        lambda: call(adapters=(*Batch(widths=(40,)).adapters, *Batch(widths=(32,), slots=4).adapters)),
        ValueError, r"adapters: got \[5, 4\] slots, expected the same number",
    ),
    "a slice is meta": (
        lambda: call(adapters=(*Batch(widths=(40,)).adapters, on(Batch(widths=(32,)).adapters[0], "meta"))),
        ValueError, r"adapters\[1\].a: got a meta tensor",
    ),
    "slices differ in dtype": (
        lambda: call(adapters=(*Batch(widths=(40,)).adapters, *Batch(widths=(32,), dtype=torch.float16).adapters)),
        TypeError, "adapters: got torch.float16, expected torch.float32",
    ),
    "plan is a tensor": (lambda: call(plan=torch.zeros(40)), TypeError, "plan: got Tensor, expected a BatchPlan"),
    "slot past the end": (
        lambda: call(plan=BatchPlan(torch.full((40,), 5, dtype=torch.int32))),
        ValueError, "slot 5, expected at most 4",
    ),
    "unknown backend": (lambda: call(backend="cublas"), ValueError, "backend: got 'cublas'"),
    "unknown strategy": (
        lambda: call(strategy="single_pass"),
        ValueError, "strategy: got 'single_pass', expected one of chained, extended",
    ),
    "strategy of the other": (
        lambda: call(backend="eager", strategy="one_launch"),
        NotImplementedError, "no strategy 'one_launch'",
    ),
    "adds to a list": (lambda: add(y=[1.0]), TypeError, "y: got list"),
    "adds a list": (lambda: add(x=[1.0]), TypeError, "x: got list"),
    "adds to half": (lambda: add(y=torch.zeros(40, 72).half()), ValueError, "y: got torch.float16.*expected torch.float32"),
    "adds to a scalar": (lambda: add(y=torch.tensor(1.0)), ValueError, r"y: got .* of shape \[\]"),
    "adds to fewer rows": (lambda: add(y=torch.zeros(39, 72)), ValueError, r"y: got .* \[39, 72\].*expected .*\[40, 'N'\]"),
    "adds to columns apart": (lambda: add(y=torch.zeros(72, 40).mT), ValueError, r"y: got .*strides \(1, 40\)"),
    "adds to another width": (
        lambda: add(y=torch.zeros(40, 71)),
        ValueError, r"adapters: got .* \[slots, 71, R\]",
    ),
    "adds on another device": (lambda: add(y=torch.zeros(40, 72, device="meta")), ValueError, "y: got a meta tensor"),
    "adds more rows than planned": (
        lambda: add(x=torch.randn(41, 96), y=torch.zeros(41, 72)),
        ValueError, "plan: got 40 rows of slots, expected 41",
    ),
    "adds a slot past the end": (
        lambda: add(plan=BatchPlan(torch.full((40,), 5, dtype=torch.int32))),
        ValueError, "slot 5, expected at most 4",
    ),
    "slots are int64": (
        lambda: BatchPlan(torch.zeros(4, dtype=torch.int64)),
        TypeError, "slots: got torch.int64, expected an int32",
    ),
    "slots are a list": (lambda: BatchPlan([0, 1]), TypeError, "slots: got list"),
    "slots are 3-D": (lambda: plan(2, 2, 2), ValueError, r"slots: got shape \[2, 2, 2\], expected \[M\] or \[M, S\]"),
    "no slots a row": (lambda: plan(2, 0), ValueError, r"slots: got shape \[2, 0\]"),
    "update with more rows": (
        lambda: plan(4).update(torch.zeros(5, dtype=torch.int32)),
        ValueError, r"slots: got shape \[5\], expected \[4\]",
    ),
    "update without weights": (
        lambda: plan(4, weights=torch.ones(4)).update(torch.zeros(4, dtype=torch.int32)),
        ValueError, "weights: got none, but there were some",
    ),
    "update with weights": (
        lambda: plan(4).update(torch.zeros(4, dtype=torch.int32), torch.ones(4)),
        ValueError, "weights: got some, but there were none",
    ),
    "weights are half": (lambda: plan(4, weights=torch.ones(4).half()), TypeError, "weights: got torch.float16"),
    "weights are a list": (lambda: plan(4, weights=[1.0]), TypeError, "weights: got list"),
    "weights of another shape": (
        lambda: plan(4, 2, weights=torch.ones(4)),
        ValueError, r"weights: got shape \[4\] on cpu, expected \[4, 2\] on cpu",
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


def test_a_plan_is_judged_anew_after_an_update():
    reused = BatchPlan(torch.zeros(40, dtype=torch.int32))
    call(plan=reused)
    reused.update(torch.full((40,), 5, dtype=torch.int32))
    with pytest.raises(ValueError, match="slot 5, expected at most 4"):
        call(plan=reused)
    reused.update(torch.zeros(40, dtype=torch.int32))
    call(plan=reused)


def test_a_layer_is_judged_anew_after_a_change():
    batch = Batch()
    weight, where = torch.nn.Parameter(batch.weight, requires_grad=False), BatchPlan(batch.slots)
    y = lora_linear_batched(batch.x, weight, batch.adapters, where)
    weight.data = weight.data.half()
    with pytest.raises(TypeError, match="weight: got torch.float16"):
        lora_linear_batched(batch.x, weight, batch.adapters, where)
    weight.data = weight.data.float().t()
    with pytest.raises(ValueError, match=r"x: got shape \[40, 96\]"):
        lora_linear_batched(batch.x, weight, batch.adapters, where)
    weight.data = batch.weight
    assert torch.equal(lora_linear_batched(batch.x, weight, batch.adapters, where), y)
    with pytest.raises(NotImplementedError, match="no backward"):
        lora_linear_batched(batch.x, weight.requires_grad_(), batch.adapters, where)


def test_adapters_are_copied_without_what_they_remember():
    batch = Batch()
    (original,) = batch.adapters
    y = lora_linear_batched(batch.x, batch.weight, original, BatchPlan(batch.slots))
    assert original.memory
    copied = copy.deepcopy(original)
    assert not copied.memory
    assert torch.equal(lora_linear_batched(batch.x, batch.weight, copied, BatchPlan(batch.slots)), y)


def test_the_operators_refuse_a_plan_of_other_rows():
    """What compilers and engines call: past the end of a plan the kernels would read what is not theirs."""
    batch = Batch()
    fields = [list(column) for column in zip(*(s.fields for s in batch.adapters), strict=True)]
    where, ops = BatchPlan(batch.slots), torch.ops.lora_kernels
    fewer, short = where.first(39).parts, (*where.parts[:2], where.order[:39], *where.parts[3:])
    for parts in (fewer, short):
        with pytest.raises(ValueError, match="plan: got parts of .*39.*, expected 40 each"):
            ops.lora_linear_batched(batch.x, batch.weight, None, *fields, *parts)
        with pytest.raises(ValueError, match="plan: got parts of .*39.*, expected 40 each"):
            ops.add_lora_batched(torch.zeros(40, 72), batch.x, *fields, *parts)
    for shape in ((39, 72), (40, 73)):
        with pytest.raises(ValueError, match=r"y: got shape .*, expected \[40, 72\]"):
            ops.add_lora_batched(torch.zeros(shape), batch.x, *fields, *where.parts)
