"""Every base-weight format, through the same tests: a new one adds no test code."""

import copy
import math
import re
import threading
from pathlib import Path

import pytest
import torch
from conftest import DEVICE
from torch.utils.checkpoint import checkpoint

from lora_kernels import (
    BatchPlan,
    LayerAdapters,
    LoRALinear,
    explain,
    formats,
    lora_linear,
    lora_linear_batched,
    testing,
)
from lora_kernels import trainable_parameters as count_parameters
from lora_kernels.formats import base

VARIANTS = [(name, options) for name, kind in formats.FORMATS.items() for options in kind.VARIANTS]
TRAINED = ("x", "lora_a", "lora_b", "bias")
N, K, R = 48, 136, 4


@pytest.fixture(params=VARIANTS, ids=lambda variant: "-".join([variant[0], *map(str, variant[1].values())]))
def make(request):
    """Quantises a weight in one of the formats."""
    name, options = request.param
    return lambda weight: formats.quantize(weight, name, **options)


@pytest.fixture(params=formats.FORMATS)
def weight(request):
    return formats.quantize(random(N, K, dtype=torch.bfloat16), request.param)


def random(*shape, dtype=torch.float32, scale=1.0):
    return (torch.randn(shape) * scale).to(dtype).to(DEVICE)


def problem(dtype=torch.float32, leading=(3, 5)):
    """`x, lora_a, lora_b, bias`, each wanting a gradient."""
    shapes = {"x": (*leading, K), "lora_a": (R, K), "lora_b": (N, R), "bias": (N,)}
    return {name: random(*shape, dtype=dtype).requires_grad_() for name, shape in shapes.items()}


def bits(tensor):
    return tensor.flatten().view(torch.uint8)


def assert_same(actual, expected):
    for a, b in zip(actual, expected, strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b)


# The format itself.


@pytest.mark.parametrize("shape", [(1, 1), (5, 7), (140, 65), (70, 257)], ids=str)
def test_dequantize_rounds_the_fp32_values_once_in_whatever_chunks(make, shape, monkeypatch):
    weight = make(random(*shape, dtype=torch.bfloat16))
    values = weight._rows(0, shape[0])
    assert values.dtype == torch.float32 and weight.dequantize().dtype == weight.dtype == torch.bfloat16
    assert weight.requantize(values).dtype == torch.bfloat16
    for chunk in (base.CHUNK, 1, 3 * shape[1]):
        monkeypatch.setattr(base, "CHUNK", chunk)
        for dtype in base.FLOATS:
            out = torch.full(shape, math.nan, dtype=dtype, device=DEVICE)
            assert weight.dequantize(out=out) is out
            assert torch.equal(out, values.to(dtype)) and torch.equal(weight.dequantize(dtype), out)


def test_a_weight_of_one_value_is_kept(make):
    for value in (0.0, 1.0, -0.5, 448.0):
        dense = torch.full((3, 130), value, device=DEVICE)
        assert torch.allclose(make(dense).dequantize(), dense, rtol=1e-6, atol=0.0)


def test_extreme_values_stay_finite_and_near(make):
    for scale in (1e-30, 1e-6, 1e6, 1e30, 1e37):
        dense = random(40, 70).clamp_(-4, 4) * scale
        error = (make(dense).dequantize() - dense).abs().max()
        assert error <= 0.2 * dense.abs().max()


def test_requantising_the_values_changes_nothing(make):
    """Codes are the same bit for bit; scales to a rounding, but for absmax values that are quantised themselves."""
    pytest.importorskip("hypothesis")
    from hypothesis import given
    from hypothesis import strategies as st

    @given(st.integers(1, 20), st.integers(1, 300), st.integers(-20, 20), st.integers(0, 2**31))
    def check(n, k, exponent, seed):
        torch.manual_seed(seed)
        once = make(random(n, k, scale=2.0**exponent))
        again = once.requantize(once.dequantize())
        assert torch.equal(bits(once.state()[0]), bits(again.state()[0]))
        assert torch.allclose(once.dequantize(), again.dequantize(), rtol=1e-2, atol=2.0**exponent * 1e-2)
        if "double_quant" not in once.options or not once.options["double_quant"]:
            assert torch.allclose(once.dequantize(), again.dequantize(), rtol=1e-6, atol=0.0)

    check()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_refused(make, bad):
    dense = random(8, 70)
    dense[3, 69] = bad
    with pytest.raises(ValueError, match="weight: holds NaN, or values that are infinite in fp32"):
        make(dense)
    with pytest.raises(ValueError, match="infinite in fp32"):
        make(torch.full((8, 70), 1e300, dtype=torch.float64, device=DEVICE))


def test_the_figures_of_the_docs_are_measured(make):
    """Bits a weight, and RMS relative error of gaussian weights."""
    torch.manual_seed(0)
    dense = torch.randn(1024, 1024).to(torch.bfloat16)
    weight = make(dense)
    error = float((weight.dequantize(torch.float32) - dense).norm() / dense.float().norm())
    row = f"| {8 * weight.nbytes / dense.numel():.3f} | {100 * error:.2f} % |"
    page = (Path(__file__).parent.parent / "docs" / "formats.md").read_text()
    rows = [line for line in page.splitlines() if line.startswith(f"| `{weight.name}` |")]
    assert any(line.endswith(row) for line in rows), f"{weight.name}, {weight.options}: {row}"


def test_the_nibble_past_an_odd_nf4_weight_is_that_of_zero():
    assert formats.quantize(torch.ones(1, 1), "nf4").packed.tolist() == [0xF7]


def test_int4_ranges_that_end_halfway_between_codes_keep_their_ends():
    """Else the next quantisation would have another scale."""
    low = torch.arange(15.0, device=DEVICE) + 0.5
    dense = torch.stack((-low, 15.0 - low), 1).repeat(100, 1) * torch.rand(1500, 1, device=DEVICE)
    once = formats.quantize(dense, "int4")
    assert torch.equal(once.packed, once.requantize(once.dequantize()).packed)


def test_fp8_blocks_need_not_be_square():
    dense = random(70, 100) * torch.linspace(1, 9, 100, device=DEVICE)
    weight = formats.quantize(dense, "fp8", block=(32, 16))
    for n, k in ((0, 0), (31, 15), (32, 16), (69, 99)):
        block = dense[n // 32 * 32 : n // 32 * 32 + 32, k // 16 * 16 : k // 16 * 16 + 16]
        assert weight.scale[n // 32, k // 16] == block.abs().max() / 448.0
        assert weight._rows(n, n + 1)[0, k] == weight.data[n, k].float() * weight.scale[n // 32, k // 16]
    assert (weight.dequantize() - dense).abs().max() <= 2**-4 * dense.abs().max()


def test_state_is_plain_tensors_that_files_and_casts_keep(make, tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    weight = make(random(40, 130))
    safetensors.save_file(weight.state_dict(), tmp_path / "weight.safetensors")
    other = make(random(40, 130))
    other.load_state_dict(safetensors.load_file(tmp_path / "weight.safetensors", device=DEVICE))
    assert torch.equal(other.dequantize(), weight.dequantize())
    moved = copy.deepcopy(weight).to(torch.float16).to(DEVICE)
    assert_same(map(bits, moved.state()), map(bits, weight.state()))
    assert [t.dtype for t in moved.state()] == [t.dtype for t in weight.state()]
    assert weight.nbytes == sum(t.nbytes for t in weight.state_dict().values())
    name, tensor = next(iter(weight.state_dict().items()))
    with pytest.raises(RuntimeError, match=f"{name}: got torch.float64, expected {tensor.dtype}"):
        other.load_state_dict(weight.state_dict() | {name: tensor.double()})


# What is above it: the same results as with the dense values, bit for bit.


@pytest.mark.parametrize(
    ("dtype", "leading"),
    [(torch.float32, (2, 3)), (torch.bfloat16, (7,)), (torch.float64, ()), (torch.float32, (0,))],
    ids=str,
)
def test_lora_linear_and_its_gradients_are_those_of_the_dense_values(make, dtype, leading):
    weight, t = make(random(N, K, dtype=torch.bfloat16)), problem(dtype, leading)
    dense = weight.dequantize(dtype)
    for _ in range(2):  # the second call is one that was in order
        torch.manual_seed(1)
        actual = lora_linear(**t, weight=weight, scaling=0.5, dropout_p=0.25)
    torch.manual_seed(1)
    expected = lora_linear(**t, weight=dense, scaling=0.5, dropout_p=0.25)
    inputs = [t[name] for name in TRAINED]
    dy = torch.randn_like(actual)
    assert_same([actual], [expected])
    assert_same(torch.autograd.grad(actual, inputs, dy), torch.autograd.grad(expected, inputs, dy))


def test_every_strategy_takes_one(weight, pair):
    t = problem(leading=(5,))
    options = {"backend": pair[0], "strategy": pair[1], "scaling": 0.5}
    actual = lora_linear(**t, weight=weight, **options)
    expected = lora_linear(**t, weight=weight.dequantize(torch.float32), **options)
    inputs = [t[name] for name in TRAINED]
    assert_same([actual], [expected])
    assert_same(*(torch.autograd.grad(y.sin().sum(), inputs) for y in (actual, expected)))


@pytest.mark.parametrize("backend", [None, "eager"])
def test_a_batch_of_adapters(weight, backend):
    x, bias = random(6, K), random(N)
    adapters = LayerAdapters(random(2, R, K), random(2, N, R), torch.tensor([R, 2], dtype=torch.int32, device=DEVICE),
                             torch.ones(2, device=DEVICE))  # fmt: skip
    plan = BatchPlan(torch.tensor([0, 1, -1, 1, 0, -1], dtype=torch.int32, device=DEVICE))
    expected = lora_linear_batched(x, weight.dequantize(torch.float32), adapters, plan, bias=bias, backend=backend)
    for _ in range(2):
        assert_same([lora_linear_batched(x, weight, adapters, plan, bias=bias, backend=backend)], [expected])
    with torch.autocast(DEVICE, torch.bfloat16):
        assert_same([lora_linear_batched(x, weight, adapters, plan, bias=bias, backend=backend)], [expected])


def test_the_quantised_state_is_saved_for_backward_and_no_dense_weight(weight):
    t, saved = problem(), []
    with torch.autograd.graph.saved_tensors_hooks(lambda s: saved.append(s) or s, lambda s: s):
        y = lora_linear(**t, weight=weight, scaling=1.0)
    parameters = {p.data_ptr() for name, p in t.items() if name != "x"}
    state = {s.data_ptr() for s in weight.state()}
    assert {s.data_ptr() for s in saved} >= state
    assert sum(s.nbytes for s in saved if s.data_ptr() in state) == weight.nbytes
    activations = [tuple(s.shape) for s in saved if s.data_ptr() not in state | parameters]
    assert sorted(activations) == [(15, R), (15, K)]
    (dx,) = torch.autograd.grad(y.sum(), t["x"])
    assert torch.equal(dx, torch.autograd.grad(lora_linear(**t, weight=weight, scaling=1.0).sum(), t["x"])[0])


def test_backward_after_the_state_changed_raises(weight):
    t = problem()
    y = lora_linear(**t, weight=weight, scaling=1.0)
    with torch.no_grad():
        weight.state()[-1].zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(weight, reentrant):
    t = problem()
    inputs = [t[name] for name in TRAINED]
    expected = torch.autograd.grad(lora_linear(**t, weight=weight, scaling=1.0).sin().sum(), inputs)

    def layer(x, lora_a, lora_b, bias):
        return lora_linear(x, weight, lora_a, lora_b, 1.0, bias=bias).sin()

    checkpoint(layer, *inputs, use_reentrant=reentrant).sum().backward()
    assert_same([value.grad for value in inputs], expected)


@pytest.mark.parametrize("dtype", testing.HALF, ids=str)
def test_autocast_dequantises_to_its_dtype(weight, dtype):
    t = problem()
    with torch.autocast(DEVICE, dtype):
        actual = lora_linear(**t, weight=weight, scaling=1.0)
        expected = lora_linear(**t, weight=weight.dequantize(dtype), scaling=1.0)
    assert actual.dtype == dtype
    assert_same([actual], [expected])


def test_all_layers_share_one_scratch():
    formats.release_scratch()
    small, large = (formats.quantize(random(n, K), "int8") for n in (8, N))
    t = problem()
    small_t = t | {"lora_b": random(8, R), "bias": None}
    with torch.inference_mode():  # a scratch made here serves training too
        lora_linear(**small_t, weight=small, scaling=1.0)
    lora_linear(**small_t, weight=small, scaling=1.0)
    assert formats.scratch_bytes() == 8 * K * 4
    y = lora_linear(**t, weight=large, scaling=1.0)
    lora_linear(**small_t, weight=small, scaling=1.0)  # writes over the large one
    assert formats.scratch_bytes() == N * K * 4
    (dx,) = torch.autograd.grad(y.sum(), t["x"])
    (expected,) = torch.autograd.grad(lora_linear(**t, weight=large.dequantize(), scaling=1.0).sum(), t["x"])
    assert torch.equal(dx, expected)
    formats.release_scratch()
    assert formats.scratch_bytes() == 0


def test_threads_do_not_overwrite_each_other():
    weights = [formats.quantize(random(256, 256), "int8") for _ in range(4)]
    x, a, b = random(8, 256), random(R, 256), random(256, R)
    expected = [lora_linear(x, weight.dequantize(), a, b, 1.0) for weight in weights]
    wrong = []

    def run(i):
        for _ in range(10):
            if not torch.equal(lora_linear(x, weights[i], a, b, 1.0), expected[i]):
                wrong.append(i)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_explain_says_what_becomes_of_it(weight):
    plan = explain(64, N, K, R, weight_format=weight.name).plan
    assert f"{weight.name} is dequantised into a scratch: " in plan.why
    assert plan.strategy == explain(64, N, K, R).plan.strategy
    assert weight.name in str(explain(64, N, K, R, weight_format=weight.name))
    with pytest.raises(ValueError, match="format: got 'nf5', expected one of"):
        explain(64, N, K, R, weight_format="nf5")


def test_a_device_that_a_format_does_not_know_is_refused(weight, monkeypatch):
    monkeypatch.setattr(type(weight), "reasons_unsupported", lambda device: [f"x is on {device}"])
    with pytest.raises(NotImplementedError, match=f"weight: {weight.name} cannot run this problem: x is on {DEVICE}"):
        lora_linear(**problem(leading=(11,)), weight=weight, scaling=1.0, backend="eager")
    monkeypatch.undo()
    assert weight.reasons_unsupported(torch.device("mps")) == ["x is on mps, expected cpu or cuda"]


# The module.


@pytest.mark.parametrize("format", formats.FORMATS)
def test_a_layer_over_a_quantised_weight(format, tmp_path):
    linear = torch.nn.Linear(K, N, device=DEVICE)
    weight = formats.quantize(linear.weight, format)
    layer = LoRALinear.from_linear(linear, r=R, quantize=format)
    torch.nn.init.normal_(layer.lora_B.weight)
    assert torch.equal(layer.weight.dequantize(), weight.dequantize())
    assert count_parameters(layer).total == N * K + N + R * (N + K)
    x = random(5, K)
    y = layer(x)
    assert torch.equal(
        y, lora_linear(x, weight, layer.lora_A.weight, layer.lora_B.weight, layer.scaling, bias=layer.bias)
    )
    y.sum().backward()
    assert layer.lora_A.weight.grad is not None and layer.bias.grad is None
    other = LoRALinear.from_linear(torch.nn.Linear(K, N, device=DEVICE), r=R, quantize=format)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x), y)
    assert torch.equal(copy.deepcopy(layer)(x), y)
    half = copy.deepcopy(layer).to(torch.bfloat16)
    assert torch.equal(half.weight.dequantize(), weight.dequantize()) and half(x.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("format", formats.FORMATS)
def test_merge_reports_its_error_and_unmerge_restores_every_bit(format):
    layer = LoRALinear.from_linear(torch.nn.Linear(K, N, device=DEVICE), r=R, quantize=format)
    torch.nn.init.normal_(layer.lora_B.weight, std=0.1)
    x = random(5, K).requires_grad_()
    before, keys = layer(x), list(layer.state_dict())
    state = [t.clone() for t in layer.weight.state()]
    exact = layer.weight.dequantize() + layer.scaling * layer.lora_B.weight.detach() @ layer.lora_A.weight.detach()
    for _ in range(2):
        error = layer.merge()
        assert layer.merged and list(layer.state_dict()) == keys
        merged = layer.merged_weight.dequantize()
        lost = (merged - exact).norm()
        assert error.relative_to_weight == pytest.approx(float(lost / exact.norm()), rel=1e-3)
        assert error.relative_to_update == pytest.approx(
            float(lost / (exact - layer.weight.dequantize()).norm()), rel=1e-3
        )
        assert 0.0 < error.relative_to_weight < 0.15
        assert type(layer.merged_weight) is type(layer.weight)
        expected = torch.nn.functional.linear(x, merged, layer.bias)
        assert torch.equal(layer(x), expected)
        assert_same(*(torch.autograd.grad(y.sin().sum(), x) for y in (layer(x), expected)))
        with torch.autocast(DEVICE, torch.bfloat16):
            assert torch.equal(layer(x), torch.nn.functional.linear(x, merged, layer.bias))
        layer.unmerge()
        assert torch.equal(layer(x), before)
        assert_same(map(bits, layer.weight.state()), map(bits, state))


def test_merge_refuses_what_is_not_finite_and_changes_nothing(weight):
    layer = LoRALinear.from_linear(torch.nn.Linear(K, N, device=DEVICE), r=R, quantize=weight.name)
    torch.nn.init.constant_(layer.lora_B.weight, math.inf)
    with pytest.raises(ValueError, match="merge: weight \\+ scaling B A holds NaN or Inf"):
        layer.merge()
    assert not layer.merged


def test_a_dense_merge_reports_nothing():
    assert LoRALinear(8, 8, r=2).merge() is None


def test_every_format_has_its_file_and_its_section():
    folder = Path(formats.__file__).parent
    page = (Path(__file__).parent.parent / "docs" / "formats.md").read_text()
    assert {path.stem for path in folder.glob("*.py")} == {*formats.FORMATS, "__init__", "base", "scratch"}
    assert set(re.findall(r"^## `(\w+)`", page, re.MULTILINE)) == set(formats.FORMATS)
    for name, kind in formats.FORMATS.items():
        assert kind.INSTRUCTIONS is None or f"{kind.INSTRUCTIONS:g} for {name}" in page


def test_what_a_kernel_reads_says_what_it_may_cost(weight):
    """Without it neither the static gate nor `test_weights.py` would see the kernel."""
    assert (type(weight)._tile is not base.QuantizedWeight._tile) == (weight.INSTRUCTIONS is not None)
