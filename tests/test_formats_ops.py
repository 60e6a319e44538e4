"""A quantised weight under torch.compile, export, fake tensors and selective checkpointing: one operator, its state saved."""

import functools

import pytest
import torch
from conftest import DEVICE
from test_formats import TRAINED, K, N, R, assert_same, make, problem, random  # noqa: F401  a fixture
from test_ops import Watch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import checkpoint

from lora_kernels import (
    BatchPlan,
    LayerAdapters,
    LoRALinear,
    formats,
    functional,
    lora_linear,
    lora_linear_batched,
    ops,
)

EVERY_FORMAT = pytest.mark.parametrize("format", formats.FORMATS)


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch._dynamo.reset()


def quantized(format):
    return formats.quantize(random(N, K, dtype=torch.bfloat16), format)


def batch():
    ranks = torch.tensor([R, 2], dtype=torch.int32, device=DEVICE)
    adapters = LayerAdapters(random(2, R, K), random(2, N, R), ranks, torch.ones(2, device=DEVICE))
    return random(3, K), adapters, BatchPlan(torch.tensor([0, -1, 1], dtype=torch.int32, device=DEVICE))


def test_the_parts_make_the_weight_again(make):  # noqa: F811
    weight = make(random(N, K))
    codes, (format, layout, *scales) = ops.parts(weight)
    again = formats.named(format).of_parts((codes, *scales), weight.shape, layout)
    assert type(again) is type(weight) and again.shape == weight.shape and again.options == weight.options
    assert all(a is b for a, b in zip(again.state(), weight.state(), strict=True))
    assert torch.equal(again.dequantize(torch.float32), weight.dequantize(torch.float32))


@EVERY_FORMAT
def test_opcheck(format):
    t, weight = problem(leading=(5,)), quantized(format)
    codes, state = ops.parts(weight)
    dy, h, rest = random(5, N), random(5, R), (torch.tensor(2.0), 0.0, None)
    checks = ["test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]
    if not codes.is_floating_point():  # PyTorch cannot compare those of a byte
        checks.append("test_schema")
    check = functools.partial(torch.library.opcheck, test_utils=checks)
    check(ops.lora_linear, (t["x"], codes, t["bias"], t["lora_a"], t["lora_b"], *rest, None, None, *state))
    x, a, b = (t[name].detach() for name in ("x", "lora_a", "lora_b"))
    check(ops.lora_linear_backward, (dy, x, h, codes, a, b, *rest, (True, True, True), None, None, *state))
    check(ops.quantized_linear, (t["x"], codes, t["bias"], weight.shape, False, *state))
    check(ops.quantized_linear, (dy.requires_grad_(), codes, None, weight.shape, True, *state))
    x, adapters, plan = batch()
    fields = map(list, zip(adapters.fields, strict=True))
    check(ops.lora_linear_batched, (x, codes, None, *fields, *plan.parts, None, None, *state))


@EVERY_FORMAT
@pytest.mark.parametrize("autocast", [False, True])
def test_compiles_with_the_bits_of_an_eager_call(format, autocast):
    weight, t = quantized(format), problem()

    def layer(x, lora_a, lora_b, bias):
        return lora_linear(x, weight, lora_a, lora_b, 0.5, bias=bias).sin()

    inputs, results = [t[name] for name in TRAINED], []
    for call in (layer, torch.compile(layer, fullgraph=True, backend="aot_eager")):
        with torch.autocast(DEVICE, torch.bfloat16, enabled=autocast):
            y = call(*inputs)
        results.append((y, *torch.autograd.grad(y.sum(), inputs)))
    assert_same(*results)


def test_a_compiled_step_saves_the_state_and_no_dense_weight(make):  # noqa: F811
    weight, t, saved = make(random(N, K)), problem(), []
    compiled = torch.compile(
        lambda x, a, b: lora_linear(x, weight, a, b, 1.0), fullgraph=True, backend="aot_eager", dynamic=False
    )
    with torch.autograd.graph.saved_tensors_hooks(lambda s: saved.append(s) or s, lambda s: s):
        compiled(t["x"], t["lora_a"], t["lora_b"])
    assert {s.data_ptr() for s in weight.state()} <= {s.data_ptr() for s in saved}
    dense = [s for s in saved if s.is_floating_point() and s.dtype.itemsize > 1 and s.numel() >= N * K]
    assert not dense


@EVERY_FORMAT
def test_modules_compile_merged_and_not(format):
    layer = LoRALinear.from_linear(torch.nn.Linear(K, N, device=DEVICE), r=R, quantize=format)
    torch.nn.init.normal_(layer.lora_B.weight)
    layer.bias.requires_grad_()
    x = random(2, 5, K).requires_grad_()
    for merge in (False, True):
        if merge:
            layer.merge()
        inputs = (x, layer.bias) if merge else (x, layer.bias, layer.lora_A.weight, layer.lora_B.weight)
        compiled, results = torch.compile(layer, fullgraph=True, backend="aot_eager"), []
        for call in (layer, compiled):
            y = call(x)
            results.append((y, *torch.autograd.grad(y.sin().sum(), inputs)))
        assert_same(*results)
        with torch.autocast(DEVICE, torch.bfloat16):
            assert_same([compiled(x)], [layer(x)])


def test_compiles_with_inductor():
    weight, t = quantized("nf4"), problem()
    inputs = [t[name] for name in TRAINED]

    def layer(x, lora_a, lora_b, bias):
        return torch.nn.functional.gelu(lora_linear(x, weight, lora_a, lora_b, 0.5, bias=bias)) + 1.0

    y, expected = (call(*inputs) for call in (torch.compile(layer, fullgraph=True), layer))
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(*(torch.autograd.grad(out.sum(), inputs) for out in (y, expected)))


@EVERY_FORMAT
def test_a_compiled_batch_of_adapters(format):
    weight, (x, adapters, plan) = quantized(format), batch()
    call = functools.partial(lora_linear_batched, weight=weight, adapters=adapters, plan=plan)
    assert_same([torch.compile(call, fullgraph=True, backend="aot_eager")(x)], [call(x)])


@EVERY_FORMAT
def test_fake_tensors_have_the_shapes_of_real_ones(format):
    weight = quantized(format)
    with FakeTensorMode() as mode:
        kind, state = type(weight), [mode.from_tensor(t) for t in weight.state()]
        fake = kind.of_parts(state, weight.shape, weight.layout)
        x, a, b = (torch.empty(shape, device=DEVICE, requires_grad=True) for shape in ((2, 5, K), (R, K), (N, R)))
        y = lora_linear(x, fake, a, b, 1.0)
        merged = functional.quantized_linear(x, fake, None)
        assert y.shape == merged.shape == (2, 5, N) and y.device.type == DEVICE
        assert [g.shape for g in torch.autograd.grad(y.sum(), (x, a, b))] == [x.shape, a.shape, b.shape]
        assert torch.autograd.grad(merged.sum(), x)[0].shape == x.shape


@EVERY_FORMAT
def test_exports_with_a_dynamic_batch(format):
    layer = LoRALinear.from_linear(torch.nn.Linear(K, N, device=DEVICE), r=R, quantize=format)
    torch.nn.init.normal_(layer.lora_B.weight)
    x = random(9, K)
    program = torch.export.export(layer, (x[:4],), dynamic_shapes=({0: torch.export.Dim("m")},))
    assert [node.target for node in program.graph.nodes].count(ops.lora_linear.default) == 1
    assert_same([program.module()(x)], [layer(x)])


@pytest.mark.parametrize("policy", [checkpoint.CheckpointPolicy.MUST_SAVE, checkpoint.CheckpointPolicy.MUST_RECOMPUTE])
def test_selective_checkpointing_can_name_the_operator(policy):
    weight, t, seen = quantized("nf4"), problem(), []
    inputs = [t[name] for name in TRAINED]

    def layer(x, lora_a, lora_b, bias):
        return lora_linear(x, weight, lora_a, lora_b, 1.0, bias=bias).sin()

    def choose(ctx, called, *args, **kwargs):
        seen.append(called)
        return policy if called == ops.lora_linear.default else checkpoint.CheckpointPolicy.PREFER_RECOMPUTE

    expected = torch.autograd.grad(layer(*inputs).sum(), inputs)
    context = functools.partial(checkpoint.create_selective_checkpoint_contexts, choose)
    y = checkpoint.checkpoint(layer, *inputs, use_reentrant=False, context_fn=context)
    assert_same(torch.autograd.grad(y.sum(), inputs), expected)
    assert ops.lora_linear.default in seen


def test_a_dispatch_mode_sees_one_operator():
    weight, t = quantized("int8"), problem()
    with Watch() as watch:
        lora_linear(**t, weight=weight, scaling=1.0).sum().backward()
    ours = [name for name in watch.seen if name.startswith("lora_kernels.")]
    assert ours == ["lora_kernels.lora_linear.default", "lora_kernels.lora_linear_backward.default"]


def test_the_gradient_of_x_is_differentiable_where_the_base_is_all_there_is():
    weight, x = quantized("int8"), random(2, K).requires_grad_()
    with Watch():
        (dx,) = torch.autograd.grad(functional.quantized_linear(x, weight, None).square().sum(), x, create_graph=True)
        dx.sum().backward()
    w = weight.dequantize(torch.float32)
    torch.testing.assert_close(x.grad, (2 * torch.ones(2, K, device=DEVICE) @ w.mT) @ w)
