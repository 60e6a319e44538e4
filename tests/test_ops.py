"""The registered operator: what compile, export, fake tensors and selective checkpointing make of it."""

import contextlib
import functools

import pytest
import torch
from conftest import DEVICE
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import checkpoint

from lora_kernels import lora_linear, testing
from lora_kernels.testing import Case

op = torch.ops.lora_kernels.lora_linear
TRAINED = ("x", "lora_a", "lora_b")


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()


def tensors(case):
    t = testing.make_tensors(case, DEVICE)
    return {
        name: None if getattr(t, name) is None else getattr(t, name).detach().clone().requires_grad_(name in case.needs)
        for name in testing.INPUTS[:-1]
    }


def arguments(t, scaling=2.0, dropout_p=0.0):
    seed = torch.tensor(5, device=DEVICE) if dropout_p else None
    return (*(t[n] for n in ("x", "weight", "bias", "lora_a", "lora_b")), torch.tensor(scaling), dropout_p, seed)


CASES = {
    "plain": Case(5, 6, 7, 3),
    "bias": Case(5, 6, 7, 3, bias=True, needs=testing.TRAINABLE),
    "dropout": Case(5, 6, 7, 3, dropout_p=0.5),
    "no-rows": Case(0, 6, 7, 3),
    "inference": Case(5, 6, 7, 3, needs=()),
    "fp32-adapter": Case(5, 6, 7, 3, dtype=torch.bfloat16, lora_dtype=torch.float32),
    "frozen-a": Case(5, 6, 7, 3, needs=("lora_b",)),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_opcheck_forward(case):
    torch.library.opcheck(op, arguments(tensors(case), dropout_p=case.dropout_p))


@pytest.mark.parametrize(
    "needs", [(True, True, True), (True, False, False), (False, True, False), (False, False, True)]
)
def test_opcheck_backward(needs):
    case = Case(5, 6, 7, 3, needs=())
    x, weight, _, *rest, _ = arguments(tensors(case), dropout_p=0.5)
    _, h = op(x, weight, None, *rest, torch.tensor(5, device=DEVICE))
    dy = torch.randn(5, 6, device=DEVICE)
    args = (dy, x, h, weight, *rest, torch.tensor(5, device=DEVICE), needs)
    torch.library.opcheck(torch.ops.lora_kernels.lora_linear_backward, args)


class Watch(torch.utils._python_dispatch.TorchDispatchMode):
    """Sees every operator go by."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(str(func))
        return func(*args, **kwargs or {})


def test_a_dispatch_mode_sees_one_operator():
    t = tensors(CASES["plain"])
    with Watch() as watch:
        y = lora_linear(**t, scaling=2.0)
        y.backward(torch.ones_like(y))
    assert watch.seen.count("lora_kernels.lora_linear.default") == 1
    assert watch.seen.count("lora_kernels.lora_linear_backward.default") == 1
    assert not any("mm" in name for name in watch.seen)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_operator_and_function_give_the_same_bits(case):
    t = tensors(case)
    results = []
    for mode in (contextlib.nullcontext(), Watch()):
        torch.manual_seed(3)
        with mode:
            results.append(lora_linear(**t, scaling=1 / 3, dropout_p=case.dropout_p))
    assert torch.equal(*results)
    wanted = [t[name] for name in case.needs]
    grads = [torch.autograd.grad(y.sum(), wanted) for y in results if wanted]
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_h_is_no_way_around_the_gradient():
    y, h = op(*arguments(tensors(CASES["plain"])))
    assert y.requires_grad and not h.requires_grad


def layer(x, weight, bias, lora_a, lora_b, scaling, dropout_p=0.0):
    y = lora_linear(x, weight, lora_a, lora_b, scaling, bias=bias, dropout_p=dropout_p)
    return torch.nn.functional.gelu(y) + 1.0


def test_compiles_into_one_graph_for_every_m_and_scaling():
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    for m, scaling in ((8, 2.0), (17, 0.5), (33, 0.25)):
        t = tensors(Case(m, 6, 7, 3, leading=(2,), bias=True, needs=testing.TRAINABLE))
        inputs = [t[name] for name in testing.TRAINABLE]
        y, expected = (function(**t, scaling=torch.tensor(scaling)) for function in (compiled, layer))
        torch.testing.assert_close(y, expected)
        grads = zip(*(torch.autograd.grad(out.sum(), inputs) for out in (y, expected)), strict=True)
        assert all(torch.allclose(a, b) for a, b in grads)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1, "recompiled"


def test_compiles_again_for_another_float():
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    t = tensors(CASES["plain"])
    for scaling in (2.0, 0.5, 0.25):
        torch.testing.assert_close(compiled(**t, scaling=scaling), layer(**t, scaling=scaling))


def test_compiles_with_dropout():
    """The mask is drawn in the graph, so the same seed gives the same y, and forward and backward agree on it."""
    t = tensors(Case(40, 6, 200, 3, dropout_p=0.5))
    t["weight"].zero_()
    compiled = torch.compile(lora_linear, fullgraph=True, backend="aot_eager")
    draws = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        draws.append(compiled(**t, scaling=2.0, dropout_p=0.5))
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])
    # y is linear in x, so that x . dx = y . dy if backward has the mask of forward.
    dy = torch.randn_like(draws[0])
    (dx,) = torch.autograd.grad(draws[0], t["x"], dy)
    torch.testing.assert_close((t["x"] * dx).sum(), (draws[0] * dy).sum())


def test_compiles_with_inductor():
    t = tensors(CASES["bias"])
    inputs = [t[name] for name in testing.TRAINABLE]
    y, expected = (function(**t, scaling=2.0) for function in (torch.compile(layer, fullgraph=True), layer))
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(*(torch.autograd.grad(out.square().sum(), inputs) for out in (y, expected)))


def test_compiles_under_autocast():
    t = tensors(CASES["bias"])
    compiled = torch.compile(lora_linear, fullgraph=True, backend="aot_eager")
    with torch.autocast(DEVICE, torch.bfloat16):
        y, expected = compiled(**t, scaling=2.0), lora_linear(**t, scaling=2.0)
    assert y.dtype == torch.bfloat16 and torch.equal(y, expected)


def test_bad_input_is_named_while_compiling():
    t = tensors(CASES["plain"])
    t["lora_b"] = t["lora_b"].detach()[:, 1:]
    with pytest.raises(Exception, match=r"lora_b: got shape \[6, 2\], expected \[6, 3\]"):
        torch.compile(lora_linear, fullgraph=True, backend="aot_eager")(**t, scaling=2.0)


def test_autocast_reaches_the_operator():
    t = tensors(CASES["bias"])
    with torch.autocast(DEVICE, torch.bfloat16):
        y, h = op(*arguments(t))
    assert y.dtype == h.dtype == torch.bfloat16
    grads = torch.autograd.grad(y.sum(), [t[name] for name in testing.TRAINABLE])
    assert all(grad.dtype == torch.float32 for grad in grads)


def test_fake_tensors_have_the_shapes_of_real_ones():
    with FakeTensorMode():
        t = {
            name: torch.empty(shape, dtype=torch.bfloat16, device=DEVICE, requires_grad=name in TRAINED)
            for name, shape in (("x", (2, 5, 7)), ("weight", (6, 7)), ("lora_a", (3, 7)), ("lora_b", (6, 3)))
        }
        y = lora_linear(**t, scaling=2.0)
        assert (y.shape, y.dtype, y.device.type) == ((2, 5, 6), torch.bfloat16, DEVICE)
        grads = torch.autograd.grad(y.sum(), [t[name] for name in TRAINED])
        assert [grad.shape for grad in grads] == [t[name].shape for name in TRAINED]


def test_exports_with_a_dynamic_batch():
    class Layer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            for name, value in tensors(CASES["inference"]).items():
                if name not in ("x", "bias"):
                    self.register_buffer(name, value)

        def forward(self, x):
            return lora_linear(x, self.weight, self.lora_a, self.lora_b, 2.0)

    module = Layer()
    x = torch.randn(9, 7, device=DEVICE)
    program = torch.export.export(module, (x[:4],), dynamic_shapes=({0: torch.export.Dim("m")},))
    targets = [node.target for node in program.graph.nodes]
    assert targets.count(op.default) == 1
    torch.testing.assert_close(program.module()(x), module(x))


@pytest.mark.parametrize("policy", [checkpoint.CheckpointPolicy.MUST_SAVE, checkpoint.CheckpointPolicy.MUST_RECOMPUTE])
def test_selective_checkpointing_can_name_the_operator(policy):
    t = tensors(CASES["dropout"])
    inputs = [t[name] for name in TRAINED]
    calls = []

    def choose(ctx, called, *args, **kwargs):
        calls.append((called, ctx.is_recompute))
        return policy if called == op.default else checkpoint.CheckpointPolicy.PREFER_RECOMPUTE

    def run(x, lora_a, lora_b):
        return layer(x, t["weight"], None, lora_a, lora_b, 2.0, dropout_p=0.5)

    torch.manual_seed(1)
    expected = torch.autograd.grad(run(*inputs).sum(), inputs)
    context = functools.partial(checkpoint.create_selective_checkpoint_contexts, choose)
    torch.manual_seed(1)
    y = checkpoint.checkpoint(run, *inputs, use_reentrant=False, context_fn=context)
    actual = torch.autograd.grad(y.sum(), inputs)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))
    assert (op.default, False) in calls
