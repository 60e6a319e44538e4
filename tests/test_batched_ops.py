"""The batched operator: what compile, fake tensors, autocast and inference mode make of it."""

import pytest
import torch
from batches import CHOICES, Batch, on
from conftest import DEVICE
from torch._subclasses.fake_tensor import FakeTensorMode

from lora_kernels import BatchPlan, lora_linear_batched

op = torch.ops.lora_kernels.lora_linear_batched
BATCHES = dict(
    single=dict(m=6, widths=(12,), k=20, slots=3, rank=5),
    slices=dict(m=6, widths=(12, 5, 7), k=20, slots=3, rank=5),
    several=dict(m=6, widths=(12,), k=20, slots=3, rank=5, per_row=2),
)
every_batch = pytest.mark.parametrize("shape", BATCHES.values(), ids=BATCHES)


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()


def arguments(batch):
    """x, weight, adapters, plan and bias on the device under test."""
    x, weight, bias, slots = (t.to(DEVICE) for t in (batch.x, batch.weight, batch.bias, batch.slots))
    adapters = tuple(on(one_slice, DEVICE) for one_slice in batch.adapters)
    return x, weight, adapters, BatchPlan(slots, None if batch.weights is None else batch.weights.to(DEVICE)), bias


def taken_apart(x, weight, adapters, plan, bias):
    """The operator's arguments for those of the function."""
    return x, weight, bias, *map(list, zip(*(s.fields for s in adapters), strict=True)), *plan.parts


def layer(x, weight, adapters, plan, bias, **choice):
    return torch.nn.functional.silu(lora_linear_batched(x, weight, adapters, plan, bias=bias, **choice)) + 1.0


@every_batch
def test_opcheck(shape):
    torch.library.opcheck(op, taken_apart(*arguments(Batch(**shape))))


@every_batch
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("choice", CHOICES[:2], ids="-".join)
def test_compiles_into_one_graph_for_every_step(shape, backend, choice):
    """Other slots, weights, ranks, scalings and adapters in the same memory, as in serving."""
    batch = Batch(**shape)
    x, weight, adapters, plan, bias = arguments(batch)
    choice = dict(zip(("backend", "strategy"), choice, strict=True))
    compiled = torch.compile(layer, fullgraph=True, backend=backend)
    results = [compiled(x, weight, adapters, plan, bias, **choice)]
    assert torch.equal(results[0], layer(x, weight, adapters, plan, bias, **choice))
    for step in range(2):
        plan.update(1 - plan.slots, None if plan.weights is None else plan.weights + 1.0)
        for one_slice in adapters:
            one_slice.ranks.copy_(1 + step + torch.arange(3))
            one_slice.scalings.mul_(2.0)
            one_slice.a.normal_()
            one_slice.b.normal_()
        results.append(compiled(x, weight, adapters, plan, bias, **choice))
        assert torch.equal(results[-1], layer(x, weight, adapters, plan, bias, **choice))
        assert not torch.equal(results[-1], results[-2])
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1, "recompiled"
    assert not torch._dynamo.utils.counters["graph_break"]


def test_compiles_into_one_graph_for_every_m():
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    for m in (6, 9, 4):
        args = arguments(Batch(**BATCHES["slices"] | dict(m=m)))
        assert torch.equal(compiled(*args), layer(*args))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1, "recompiled"


def test_compiles_with_inductor():
    args = arguments(Batch(**BATCHES["several"]))
    torch.testing.assert_close(torch.compile(layer, fullgraph=True)(*args), layer(*args))


def test_bad_input_is_named_while_compiling():
    x, *others = arguments(Batch(**BATCHES["single"]))
    with pytest.raises(Exception, match=r"x: got shape \[6, 19\]"):
        torch.compile(layer, fullgraph=True, backend="aot_eager")(x[:, 1:], *others)


def test_a_gradient_is_refused_while_compiling():
    x, *others = arguments(Batch(**BATCHES["single"]))
    with pytest.raises(Exception, match="has no backward"):
        torch.compile(layer, fullgraph=True, backend="aot_eager")(x.requires_grad_(), *others)


def test_exports_with_a_dynamic_batch():
    x, weight, adapters, plan, bias = arguments(Batch(**BATCHES["slices"]))

    class Layer(torch.nn.Module):
        def forward(self, x, slots):
            return lora_linear_batched(x, weight, adapters, BatchPlan(slots), bias=bias)

    shapes = {0: torch.export.Dim("m", min=3)}  # to build a plan is traced too, with slices such as `[1:]`
    program = torch.export.export(Layer(), (x, plan.slots), dynamic_shapes=(shapes, shapes))
    assert [node.target for node in program.graph.nodes].count(op.default) == 1
    assert torch.equal(program.module()(x[:4], plan.slots[:4]), Layer()(x[:4], plan.slots[:4]))


@every_batch
def test_fake_tensors_have_the_shapes_of_real_ones(shape):
    batch = Batch(**shape)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        x, weight, adapters, plan, bias = arguments(batch)
        y = lora_linear_batched(mode.from_tensor(x), weight, adapters, plan, bias=bias)
        assert (y.shape, y.dtype, y.device.type) == ((6, len(batch.weight)), torch.float32, DEVICE)


every_choice = pytest.mark.parametrize("choice", CHOICES, ids="-".join)


@every_choice
def test_inference_mode(choice):
    """Also with a plan and adapters from outside of it, which are updated inside."""
    batch = Batch(**BATCHES["several"])
    args = arguments(batch)
    expected = layer(*args)
    with torch.inference_mode():
        plan = args[3]
        plan.update(plan.slots.flip(0), plan.weights.flip(0))
        assert not torch.equal(layer(*args), expected)
        plan.update(plan.slots.flip(0), plan.weights.flip(0))
        assert torch.equal(layer(*args), expected)


@every_choice
@pytest.mark.parametrize("via", ["function", "operator", "compile"])
def test_autocast_changes_nothing(choice, via):
    args = arguments(Batch(**BATCHES["slices"]))
    backend, strategy = choice
    expected = lora_linear_batched(*args[:4], bias=args[4], backend=backend, strategy=strategy)
    compiled = torch.compile(lora_linear_batched, fullgraph=True, backend="eager")
    with torch.autocast(DEVICE, torch.bfloat16):
        if via == "operator":
            y = op(*taken_apart(*args), backend, strategy)
        else:
            function = compiled if via == "compile" else lora_linear_batched
            y = function(*args[:4], bias=args[4], backend=backend, strategy=strategy)
    assert torch.equal(y, expected)


def test_autocast_casts_nothing():
    x, *others, bias = arguments(Batch(**BATCHES["single"]))
    mismatch = pytest.raises(TypeError, match="weight: got torch.float32, expected torch.bfloat16.*autocast")
    with torch.autocast(DEVICE, torch.bfloat16), mismatch:
        lora_linear_batched(x.bfloat16(), *others, bias=bias)
