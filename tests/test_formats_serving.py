"""A pool over bases that other libraries have quantised: converted once, the codes shared, the layers left as they are."""

import copy

import pytest
import torch
from torch import nn

from lora_kernels import (
    AdapterPool,
    BatchPlan,
    apply_lora,
    attach_pool,
    load_adapter,
    lora_linear_batched,
    save_adapter,
)
from lora_kernels.formats import FP8Weight
from lora_kernels.modules import weight_of

K, N = 64, 96


@pytest.fixture(autouse=True)
def eager(monkeypatch):
    monkeypatch.setenv("LORA_KERNELS_BACKEND", "eager")


def linear4bit(k, n):
    bnb = pytest.importorskip("bitsandbytes")
    layer = bnb.nn.Linear4bit(k, n, compute_dtype=torch.float32, quant_type="nf4")
    return layer.to("cpu")


def linear8bit(k, n):
    bnb = pytest.importorskip("bitsandbytes")
    return bnb.nn.Linear8bitLt(k, n, has_fp16_weights=False).to("cpu")


def fp8_linear(k, n):
    fp8 = pytest.importorskip("transformers.integrations.finegrained_fp8")
    layer = fp8.FP8Linear(k, n, block_size=(128, 128))
    dense = FP8Weight.quantize(torch.randn(n, k), scaling="block")
    layer.weight.data, layer.weight_scale_inv.data = dense.data, dense.scale
    return layer


def torchao_linear(k, n):
    quantization = pytest.importorskip("torchao.quantization")
    layer = nn.Sequential(nn.Linear(k, n))
    quantization.quantize_(layer, quantization.Int8WeightOnlyConfig())
    return layer[0]


@pytest.fixture(
    params=[linear4bit, linear8bit, fp8_linear, pytest.param(torchao_linear, marks=pytest.mark.integration)],
    ids=lambda make: make.__name__,
)
def model(request):
    model = nn.Sequential(request.param(K, N), nn.ReLU(), nn.Linear(N, K), nn.ReLU(), request.param(K, N))
    return model.train(False).requires_grad_(False)


@pytest.fixture
def pool(model):
    pool = AdapterPool.for_model(model, slots=2, max_rank=4, dtype=torch.float32)
    for name, rank in (("a", 4), ("b", 1)):
        tensors = {i: (torch.randn(rank, k), torch.randn(n, rank), 0.5) for i, (k, n) in pool.layers.items()}
        pool.load_tensors(name, tensors)
    return pool


def test_every_sequence_gets_its_own_adapter(model, pool):
    slots, x = torch.tensor([pool.acquire("b"), -1, pool.acquire("a")], dtype=torch.int32), torch.randn(3, 2, K)
    expected, plan = x, BatchPlan(slots.repeat_interleave(2))
    for name, layer in model.named_children():
        if name in pool.layers:
            weight = weight_of(layer)
            dense = weight if isinstance(weight, torch.Tensor) else weight.dequantize(torch.float32)
            layer = lambda x, w=dense, n=name, b=layer.bias: lora_linear_batched(x, w, pool.layer(n), plan, bias=b)  # noqa: E731
        expected = layer(expected)
    with attach_pool(model, pool).batch(slots):
        assert torch.equal(model(x), expected)


def test_the_codes_are_shared_and_nothing_is_left_behind(model, pool):
    codes = [weight_of(layer).state()[0].data_ptr() for layer in (model[0], model[4])]
    before = {name: dict(vars(module)) for name, module in model.named_modules()}
    serving = attach_pool(model, pool)
    held = [model[i].forward.args[1].state()[0].data_ptr() for i in (0, 4)]
    assert held == codes and codes[0] != codes[1]
    serving.detach()
    assert {name: dict(vars(module)) for name, module in model.named_modules()} == before


def test_outside_of_a_batch_a_layer_is_its_own(monkeypatch):
    model = nn.Sequential(linear4bit(K, N)).eval()
    pool = AdapterPool.for_model(model, slots=1, max_rank=1)
    assert pool.dtype == torch.float32  # of the weight before
    x = torch.randn(2, K, requires_grad=True)  # bitsandbytes repacks the weight for an x that needs none
    base = model(x)
    serving = attach_pool(model, pool)
    assert torch.equal(model(x), base)
    with torch.no_grad(), serving.batch(torch.full((2,), -1, dtype=torch.int32)):
        torch.testing.assert_close(model(x), base)


def test_a_layer_that_no_format_can_hold_is_refused():
    bnb = pytest.importorskip("bitsandbytes")
    model = nn.Sequential(bnb.nn.Linear4bit(K, N, quant_type="fp4").to("cpu"))
    with pytest.raises(TypeError, match="got quant_type 'fp4', expected 'nf4'"):
        AdapterPool.for_model(model, slots=1, max_rank=1)
    pool = AdapterPool({"0": (K, N)}, slots=1, max_rank=1, dtype=torch.float32)
    with pytest.raises(TypeError, match="got quant_type 'fp4', expected 'nf4'"):
        attach_pool(model, pool)
    assert "forward" not in vars(model[0])


def test_dense_layers_beside_it_keep_their_dtype(model):
    pool = AdapterPool.for_model(model, slots=1, max_rank=1, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="2 is 96 -> 64, torch.float32, cpu, expected 96 -> 64, torch.bfloat16, cpu"):
        attach_pool(model, pool)


def test_adapter_files_load_into_it(model, tmp_path):
    """What was trained over the quantised base: as a pool's adapter, and into the model again."""
    trained = apply_lora(copy.deepcopy(model), r=2)
    for layer in (trained[0], trained[4]):
        nn.init.normal_(layer.lora_B.weight)
    save_adapter(trained, tmp_path)
    x = torch.randn(2, K)
    expected = trained(x)
    pool = AdapterPool.for_model(model, slots=1, max_rank=2, dtype=torch.float32)
    pool.load("trained", tmp_path)
    slots = torch.full((2,), pool.acquire("trained"), dtype=torch.int32)
    with torch.no_grad(), attach_pool(model, pool).batch(slots):
        torch.testing.assert_close(model(x), expected)
    assert torch.equal(load_adapter(copy.deepcopy(trained), tmp_path)(x), expected)
