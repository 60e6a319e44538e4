"""Blocks: layers that share x and the gated MLP, against the specification, on every strategy; what is saved, how they fail."""

import functools
import math
from dataclasses import replace

import block_cases
import pytest
import torch
from block_cases import Block, check, learning, run
from conftest import DEVICE, INTERPRETED, STRATEGIES, supports
from torch.utils import checkpoint

from lora_kernels import (
    LoRALinear,
    LoRAMLP,
    LoRAQKV,
    Projection,
    formats,
    lora_linear,
    lora_mlp,
    lora_projections,
    reference,
    testing,
)
from lora_kernels.backends import eager, triton_shared

BF16 = {"dtype": torch.bfloat16}
GQA = ((64, 8, True, 0.0), (16, 8, True, 0.0), (16, 4, False, 0.0))
MLP = ((72, 8, False, 0.0), (72, 8, False, 0.0), (40, 8, False, 0.0))
DROPPED = tuple((n, r, bias, 0.3) for n, r, bias, _ in GQA)
CASES = {
    "qkv": Block(33, 40, GQA),
    "qkv-bf16": Block(33, 40, GQA, **BF16),
    "qkv-fp32-adapters": Block(33, 40, GQA, dtype=torch.bfloat16, lora_dtype=torch.float32),
    "qkv-odd": Block(37, 75, ((71, 5, True, 0.0), (17, 3, False, 0.0), (17, 33, True, 0.0)), **BF16),
    "qkv-aligned": Block(32, 40, ((64, 8, True, 0.0), (16, 8, False, 0.0)), dtype=torch.float16),
    "qkv-scalings": Block(33, 40, GQA, scalings=(2.0, 0.5, 1 / 3), **BF16),
    "qkv-k-without-adapter": Block(33, 40, ((64, 40, True, 0.0), (16, 0, True, 0.0), GQA[2]), **BF16),
    "qkv-only-v": Block(33, 40, ((64, 0, False, 0.0), (16, 0, True, 0.0), GQA[2]), **BF16),
    "qkv-dropout": Block(33, 40, DROPPED, **BF16),
    "qkv-dropout-on-one": Block(33, 40, (DROPPED[0], *GQA[1:]), **BF16),
    "qkv-ranks-over-512": Block(20, 40, ((24, 300, False, 0.0), (24, 300, False, 0.0))),
    "qkv-leading": Block(11, 40, GQA, leading=(3,), **BF16),
    "qkv-frozen-x": Block(33, 40, GQA, frozen=("x",), **BF16),
    "qkv-frozen-a": Block(33, 40, GQA, frozen=("lora_a",), **BF16),
    "qkv-frozen-some": Block(33, 40, GQA, frozen=("0.lora_a", "1.lora_b", "1.bias", "2.lora_a", "2.lora_b")),
    "qkv-frozen-b": Block(33, 40, GQA, frozen=("lora_b", "bias"), **BF16),
    "qkv-inference": Block(33, 40, GQA, frozen=("x", "lora_a", "lora_b", "bias"), **BF16),
    "qkv-no-rows": Block(0, 40, GQA),
    "mlp": Block(33, 40, MLP, "silu"),
    "mlp-bf16": Block(33, 40, MLP, "silu", **BF16),
    "mlp-gelu-and-biases": Block(33, 40, tuple((n, r, True, p) for n, r, _, p in MLP), "gelu_tanh"),
    "mlp-gelu-fp16": Block(33, 40, MLP, "gelu_tanh", dtype=torch.float16),
    "mlp-biases-and-dropout": Block(33, 40, tuple((n, r, True, 0.2) for n, r, *_ in MLP), "silu"),
    "mlp-fp32-adapters": Block(33, 40, MLP, "silu", dtype=torch.bfloat16, lora_dtype=torch.float32),
    "mlp-down-without-adapter": Block(33, 40, (*MLP[:2], (40, 0, True, 0.0)), "silu"),
    "mlp-only-down": Block(33, 40, ((72, 0, False, 0.0), (72, 0, False, 0.0), MLP[2]), "silu"),
    "mlp-frozen-x": Block(33, 40, MLP, "silu", frozen=("x",)),
    "mlp-frozen-some": Block(33, 40, MLP, "silu", frozen=("x", "0.lora_a", "1.lora_b", "2.lora_b")),
    "mlp-frozen-a": Block(33, 40, MLP, "silu", frozen=("x", "lora_a")),
    "mlp-no-rows": Block(0, 40, MLP, "silu"),
}


ON_KERNELS = {  # what differs between strategies; the interpreter is slow
    "extended": ("qkv-k-without-adapter", "qkv-dropout-on-one", "qkv-no-rows", "mlp-bf16"),
    "chained": ("qkv-scalings", "mlp-gelu-and-biases"),
    "single_pass": ("qkv-bf16",),
    "one_launch": ("qkv-aligned",),
}


@pytest.fixture
def quick(monkeypatch):
    """What is the same for every backend, on the one that is fast in the interpreter."""
    if INTERPRETED:
        monkeypatch.setenv("LORA_KERNELS_BACKEND", "eager")


@pytest.mark.parametrize(
    ("name", "backend", "strategy"),
    [
        pytest.param(name, backend, strategy, id=f"{name}-{backend}-{strategy}")
        for backend, strategy in STRATEGIES
        for name in (CASES if backend != "triton" or DEVICE == "cuda" else ON_KERNELS[strategy])
        if strategy != "one_launch" or name in ON_KERNELS["one_launch"]
    ],
)
def test_within_the_error_budget(name, backend, strategy):
    dropout_p, r = (max(layer[i] for layer in CASES[name].layers) for i in (3, 1))
    if not supports(testing.Case(8, 16, 16, r, dropout_p=dropout_p), backend, strategy):
        pytest.skip("this strategy does not support the case")
    check(CASES[name], backend, strategy)


@pytest.mark.parametrize(
    "block", [CASES["qkv"], CASES["mlp"], CASES["mlp-biases-and-dropout"]], ids=["qkv", "mlp", "all"]
)
@pytest.mark.parametrize("damage", ["lora_b doubled", "dx of one", "dA negated", "up and gate"])
def test_the_judge_rejects(block, damage, monkeypatch):
    """Against the specification, so that a planted fault is found whatever it is planted in."""
    spec = block_cases.expected

    def wrong(*args):
        found = spec(*args)
        if damage == "lora_b doubled":
            found["1.lora_b"] *= 2
        elif damage == "dx of one":
            found["x"] *= 1.02
        elif damage == "dA negated":
            found["0.lora_a"] *= -1
        else:
            found["0.lora_a"], found["1.lora_a"] = found["1.lora_a"], found["0.lora_a"]
        return found

    monkeypatch.setattr(block_cases, "expected", wrong)
    with pytest.raises(AssertionError, match="error"):
        check(block, "eager")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("products", [triton_shared, eager], ids=["triton", "eager"])
def test_between_the_layers_of_an_mlp(products, activation, dtype):
    if products is triton_shared and "triton" not in dict(STRATEGIES):
        pytest.skip("needs a GPU, or TRITON_INTERPRET=1")
    block_cases.check_glu(products, activation, dtype)


@pytest.mark.parametrize("activation", [None, "silu", "gelu_tanh"])
@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
@pytest.mark.parametrize("pair", [pair for pair in STRATEGIES if pair[0] != "triton"] or STRATEGIES[:1], ids="-".join)
def test_gradcheck_in_fp64(activation, dropout_p, pair):
    layers = tuple((n, 2, True, dropout_p) for n in ((5, 5, 4) if activation else (6, 3, 3)))
    block = Block(3, 4, layers, activation, dtype=torch.float64)
    if not supports(testing.Case(3, 5, 4, 2, dtype=torch.float64, dropout_p=dropout_p), *pair):
        pytest.skip("this strategy does not support the case")
    x, projections, _ = block.inputs()
    names, tensors = zip(*learning(x, projections).items(), strict=True)

    def function(*tensors):
        given = dict(zip(names, tensors, strict=True))
        with_them = [
            p._replace(**{name: given[f"{i}.{name}"] for name in block_cases.LEARNS}) for i, p in enumerate(projections)
        ]
        return run(block, given["x"], with_them, *pair)

    torch.autograd.gradcheck(function, tensors, fast_mode=True)


@pytest.mark.parametrize(
    "block", [CASES["qkv-bf16"], CASES["mlp"], CASES["mlp-gelu-and-biases"]], ids=["qkv", "mlp", "gelu"]
)
def test_specification_equals_autograd(block):
    x, projections, dys = replace(block, dtype=torch.float64).inputs()
    wanted = learning(x, projections)
    layers = [reference.Layer(p.weight, p.lora_a, p.lora_b, p.scaling, p.bias) for p in projections]
    y = [reference.lora_mlp(x, *layers, block.mlp)] if block.mlp else reference.lora_projections(x, layers)
    grads = dict(zip(wanted, torch.autograd.grad(y, list(wanted.values()), dys), strict=True))
    expected = block_cases.expected(block, x, projections, dys, torch.Tensor.double)
    for name, grad in grads.items():
        torch.testing.assert_close(grad, expected[name])
    if block.mlp:
        z = torch.linspace(-4, 4, 50, dtype=torch.float64)
        theirs = torch.nn.functional.silu(z) if block.mlp == "silu" else torch.nn.functional.gelu(z, approximate="tanh")
        torch.testing.assert_close(reference.activated(z, block.mlp)[0], theirs)


def one_by_one(x, projections, mlp):
    """The same from `lora_linear`."""

    def linear(x, p):
        if p.lora_a is None:
            return torch.nn.functional.linear(x, p.weight, p.bias)
        return lora_linear(x, *p[:4], bias=p.bias, dropout_p=p.dropout_p)

    if mlp is None:
        return [linear(x, p) for p in projections]
    z, u = (linear(x, p) for p in projections[:2])
    f = torch.nn.functional.silu(z) if mlp == "silu" else torch.nn.functional.gelu(z, approximate="tanh")
    return [linear(f * u, projections[2])]


def assert_alike(some, others):
    """But for the order of sums and, in bf16, roundings: the same masks, the same terms."""
    for one, other in zip(some, others, strict=True):
        limit = 0.02 if one.dtype == torch.bfloat16 else 1e-5
        assert one.dtype == other.dtype and (one - other).norm() <= limit * other.norm()


@pytest.mark.parametrize("name", ["qkv-dropout", "mlp-biases-and-dropout", "qkv-k-without-adapter"])
def test_draws_the_masks_that_layer_by_layer_would(name, quick):
    x, projections, dys = CASES[name].inputs()
    wanted = list(learning(x, projections).values())
    ys = run(CASES[name], x, projections)
    torch.manual_seed(CASES[name].seed)
    others = one_by_one(x, projections, CASES[name].mlp)
    assert_alike(ys, others)
    assert_alike(*(torch.autograd.grad(each, wanted, dys) for each in (ys, others)))


@pytest.mark.parametrize(
    "name", ["qkv", "qkv-dropout", "qkv-frozen-b", "mlp", "mlp-biases-and-dropout", "mlp-frozen-a"]
)
def test_saves_x_and_h_and_of_the_mlp_gate_and_up(name, quick):
    block = CASES[name]
    x, projections, _ = block.inputs()
    own = {t.data_ptr() for p in projections for t in p if isinstance(t, torch.Tensor)}
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda s: saved.append(s) or s, lambda s: s):
        ys = run(block, x, projections)
    shapes = sorted(tuple(s.shape) for s in saved if s.data_ptr() not in own and s.dim())
    gate_and_up = [(block.m, block.layers[0][0])] * 2 if block.mlp else []
    of_x = [] if "lora_a" in block.frozen else [(block.m, block.k)]
    hs = [] if "lora_b" in block.frozen else [(block.m, r) for _, r, *_ in block.layers]
    assert shapes == sorted([*of_x, *gate_and_up, *hs])
    bits = {s.data_ptr() for s in saved}
    assert not bits & {y.data_ptr() for y in ys}


def test_one_shrink_and_one_pass_for_da(monkeypatch):
    calls = []
    for name in ("shrink", "wgrad"):
        original = getattr(eager, name)
        monkeypatch.setattr(eager, name, lambda *a, f=original, n=name: calls.append((n, a[0].shape)) or f(*a))
    x, projections, dys = CASES["qkv"].inputs()
    torch.autograd.backward(run(CASES["qkv"], x, projections, "eager"), dys)
    assert calls == [("shrink", x.shape), ("wgrad", x.shape)]


def test_a_result_that_is_not_used(quick):
    x, projections, dys = CASES["qkv"].inputs()
    wanted = learning(x, projections)
    q, _, v = run(CASES["qkv"], x, projections)
    grads = torch.autograd.grad((q, v), list(wanted.values()), (dys[0], dys[2]), allow_unused=True)
    alone = [one_by_one(x, projections, None)[i] for i in (0, 2)]
    expected = torch.autograd.grad(alone, list(wanted.values()), (dys[0], dys[2]), allow_unused=True)
    for name, grad, theirs in zip(wanted, grads, expected, strict=True):
        assert (grad is None) == (theirs is None) == name.startswith("1."), name
        if grad is not None:
            torch.testing.assert_close(grad, theirs)


def test_results_may_be_modified_in_place_and_backward_run_twice(quick):
    block = CASES["mlp"]
    x, projections, dys = block.inputs()
    (y,) = run(block, x, projections)
    y = y.mul_(2)
    first = torch.autograd.grad(y, x, dys[0], retain_graph=True)
    assert torch.equal(first[0], torch.autograd.grad(y, x, dys[0])[0])
    for q in run(CASES["qkv"], *CASES["qkv"].inputs()[:2]):
        q.add_(1)


@pytest.mark.parametrize("name", ["qkv", "mlp"])
def test_double_backward_raises_and_changed_parameters_too(name, quick):
    x, projections, dys = CASES[name].inputs()
    ys = run(CASES[name], x, projections)
    (dx,) = torch.autograd.grad(ys, x, dys, create_graph=True)
    with pytest.raises(NotImplementedError, match="no double backward"):
        dx.square().sum().backward()
    ys = run(CASES[name], x, projections)
    with torch.no_grad():
        projections[0].lora_b.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.backward(ys, dys)


@pytest.mark.parametrize("name", ["qkv-dropout", "mlp-biases-and-dropout"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_replays_the_masks(name, reentrant, quick):
    block = CASES[name]
    x, projections, dys = block.inputs()
    wanted = list(learning(x, projections).values())
    expected = torch.autograd.grad(run(block, x, projections), wanted, dys)
    ys = checkpoint.checkpoint(lambda x: tuple(run(block, x, projections)), x, use_reentrant=reentrant)
    torch.autograd.backward(ys, dys)
    assert all(torch.equal(t.grad, grad) for t, grad in zip(wanted, expected, strict=True))


@pytest.mark.parametrize("name", ["qkv", "mlp"])
def test_autocast_equals_the_casts_by_hand(name, quick):
    x, projections, dys = CASES[name].inputs()
    half = [
        p._replace(weight=p.weight.bfloat16(), bias=None if p.bias is None else p.bias.bfloat16()) for p in projections
    ]
    wanted = list(learning(x, projections).values())
    with torch.autocast(DEVICE, torch.bfloat16):
        ys = run(CASES[name], x, projections)
    by_hand = run(CASES[name], x.bfloat16(), half)
    assert all(y.dtype == torch.bfloat16 and torch.equal(y, other) for y, other in zip(ys, by_hand, strict=True))
    grads = (torch.autograd.grad(each, wanted, [dy.bfloat16() for dy in dys]) for each in (ys, by_hand))
    assert all(a.dtype == torch.float32 and torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize("name", ["qkv-k-without-adapter", "mlp"])
def test_compiles_into_one_graph(name, quick):
    """Layer by layer, through the registered operator."""
    torch._dynamo.reset()
    block, graphs = CASES[name], []
    x, projections, dys = block.inputs()

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    function = functools.partial(block_run, mlp=block.mlp)
    ys = torch.compile(function, fullgraph=True, backend=backend)(x, projections)
    called = [str(node.target) for node in graphs[0].graph.nodes]
    assert called.count("lora_kernels.lora_linear") == sum(p.lora_a is not None for p in projections)
    wanted = list(learning(x, projections).values())
    others = run(block, x, projections)
    assert_alike(ys, others)
    assert_alike(*(torch.autograd.grad(each, wanted, dys) for each in (ys, others)))


def block_run(x, projections, mlp):
    return (lora_mlp(x, *projections, mlp),) if mlp else lora_projections(x, projections)


@pytest.mark.parametrize("backend", [None, "eager"])
def test_quantised_weights(backend):
    """As on their dense values."""
    for block in (
        Block(33, 64, ((64, 8, True, 0.0), (64, 8, False, 0.0))),
        Block(33, 64, 3 * ((64, 8, False, 0.0),), "silu"),
    ):
        x, projections, dys = block.inputs()
        quantised = [p._replace(weight=formats.named("nf4").quantize(p.weight)) for p in projections]
        dense = [p._replace(weight=q.weight.dequantize(x.dtype)) for p, q in zip(projections, quantised, strict=True)]
        wanted = list(learning(x, projections).values())
        both = [run(block, x, each, backend) for each in (quantised, dense)]
        assert_alike(*both)
        assert_alike(*(torch.autograd.grad(ys, wanted, dys) for ys in both))


def test_modules_hold_their_layers():
    gate, up = (LoRALinear(40, 72, r=4, lora_dropout=0.5) for _ in range(2))
    down = LoRALinear(72, 40, r=4)
    for layer in (gate, up, down):
        torch.nn.init.normal_(layer.lora_B.weight)
    mlp, x = LoRAMLP(gate, up, down), torch.randn(3, 5, 40)
    assert {name.split(".")[0] for name in mlp.state_dict()} == {"gate_proj", "up_proj", "down_proj"}
    torch.manual_seed(1)
    y = mlp(x)
    torch.manual_seed(1)
    torch.testing.assert_close(y, down(torch.nn.functional.silu(gate(x)) * up(x)))
    mlp.eval()
    y = mlp(x)
    up.merge()
    torch.testing.assert_close(mlp(x), y)
    q, k = LoRALinear(40, 40, r=4), torch.nn.Linear(40, 8).requires_grad_(False)
    qkv = LoRAQKV(q, k, v := LoRALinear(40, 8, r=2, use_rslora=True))
    torch.testing.assert_close(qkv(x), (q(x), k(x), v(x)))


def test_modules_over_quantised_weights():
    """As layer by layer; one that is merged has requantised its weight."""

    def layer(k, n):
        made = LoRALinear.from_linear(torch.nn.Linear(k, n), r=4, quantize="nf4")
        torch.nn.init.normal_(made.lora_B.weight)
        return made

    q, k, v, gate, up, down = (layer(*sizes) for sizes in 3 * [(64, 64)] + 2 * [(64, 128)] + [(128, 64)])
    x, learn = torch.randn(2, 5, 64), [p for each in (q, k, v, gate, up, down) for p in each.lora_A.parameters()]
    qkv, mlp = LoRAQKV(q, k, v), LoRAMLP(gate, up, down)
    for merged in (False, True):
        if merged:
            up.merge()
        as_one = (*qkv(x), mlp(x))
        alone = q(x), k(x), v(x), down(torch.nn.functional.silu(gate(x)) * up(x))
        assert_alike(as_one, alone)
        grads = (
            torch.autograd.grad(sum(y.square().sum() for y in ys), learn, allow_unused=True) for ys in (as_one, alone)
        )
        ours, theirs = ([g for g in each if g is not None] for each in grads)
        assert len(ours) == len(theirs) == 6 - merged
        assert_alike(ours, theirs)
    assert set(mlp.state_dict()) >= {"up_proj.lora_A.weight"} and set(qkv.state_dict()) >= {"q_proj.lora_A.weight"}


A, B, W = torch.ones(2, 8), torch.ones(6, 2), torch.ones(6, 8)


@pytest.mark.parametrize(
    ("projections", "error", "words"),
    [
        ([], ValueError, "projections: got none"),
        ([W], TypeError, r"projections\[0\]: got Tensor, expected a Projection"),
        ([Projection(W), Projection(W, A)], TypeError, r"projections\[1\]: lora_b: got None, expected a torch.Tensor"),
        ([Projection(W, A, B[:5])], ValueError, r"projections\[0\]: lora_b: got shape \[5, 2\], expected \[6, 2\]"),
        ([Projection(W[:, :7])], ValueError, r"projections\[0\]: x: got shape \[3, 8\], expected \[..., 7\]"),
        ([Projection(W.double())], TypeError, r"projections\[0\]: weight: got torch.float64, expected torch.float32"),
        ([Projection(W, A, B, math.nan)], ValueError, r"projections\[0\]: scaling: got nan"),
        ([Projection(W, A, B, dropout_p=1.0)], ValueError, r"projections\[0\]: dropout_p: got 1.0"),
        ([Projection(W.clone().requires_grad_())], ValueError, r"projections\[0\]: weight: requires grad"),
    ],
    ids=str,
)
def test_bad_projections_are_named(projections, error, words):
    with pytest.raises(error, match=words):
        lora_projections(torch.ones(3, 8), projections)


def test_bad_mlps_are_named():
    x, wide = torch.ones(3, 8), Projection(W)
    for args, words in (
        ((wide, wide, Projection(W.T), "relu"), "activation: got 'relu', expected one of silu, gelu_tanh"),
        ((wide, Projection(W[:5]), Projection(W.T)), "up: got a weight of 5 rows, expected 6, as gate"),
        ((wide, wide, wide), r"down: x: got shape \[3, 6\], expected \[..., 8\]"),
    ):
        with pytest.raises(ValueError, match=words):
            lora_mlp(x, *args)
    with pytest.raises(ValueError, match=r"projections\[0\]: x: got a 0-d tensor"):
        lora_projections(torch.tensor(1.0), [wide])
    with pytest.raises(TypeError, match="up_proj: got ReLU, expected a LoRALinear"):
        LoRAMLP(torch.nn.Linear(8, 6), torch.nn.ReLU(), torch.nn.Linear(6, 8))
