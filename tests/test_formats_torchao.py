"""torchao's quantised layers: taken over, trained and served, against torchao's own dequantisation."""

import pytest
import torch
from torch import nn

quantization = pytest.importorskip(
    "torchao.quantization", reason="torchao is not installed (requirements/integrations.txt)"
)

from lora_kernels import AdapterPool, BatchPlan, LoRALinear, apply_lora, attach_pool, lora_linear_batched  # noqa: E402
from lora_kernels.formats import FP8Weight, Int8Weight  # noqa: E402

pytestmark = pytest.mark.integration
KINDS = {"Int8WeightOnlyConfig": Int8Weight, "Float8WeightOnlyConfig": FP8Weight}


@pytest.fixture(params=KINDS)
def model(request):
    model = nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 64)).requires_grad_(False)
    quantization.quantize_(model, getattr(quantization, request.param)())
    model.kind = KINDS[request.param]
    return model.eval()


def test_a_layer_is_taken_over_with_its_codes_and_values(model):
    weight = LoRALinear.from_linear(model[0], r=4).weight
    assert type(weight) is model.kind
    assert weight.data.data_ptr() == model[0].weight.qdata.data_ptr()
    assert torch.allclose(weight.dequantize(torch.float32), model[0].weight.dequantize().float(), rtol=1e-6, atol=0.0)


def test_a_step_over_it(model):
    """y of a fresh adapter is torchao's; dx, dA and dB are those over its dense values."""
    dense = [nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 64)]
    for own, theirs in ((dense[0], model[0]), (dense[2], model[2])):
        own.weight.data, own.bias.data = theirs.weight.dequantize().float(), theirs.bias.data
    x = torch.randn(5, 64)
    expected = model(x)
    torch.manual_seed(1)
    ours = apply_lora(model, r=4)
    torch.manual_seed(1)
    reference = apply_lora(nn.Sequential(*dense), r=4)
    torch.testing.assert_close(ours(x), expected, rtol=1e-4, atol=1e-4)
    for each in (ours, reference):
        each[0].lora_B.weight.data.normal_(generator=torch.Generator().manual_seed(2))
        each(x).square().sum().backward()
    for i in (0, 2):
        for part in ("lora_A", "lora_B"):
            a, b = (getattr(each[i], part).weight.grad for each in (ours, reference))
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_a_pool_serves_over_it(model):
    pool = AdapterPool.for_model(model, slots=1, max_rank=2)
    tensors = {name: (torch.randn(2, k), torch.randn(n, 2), 0.5) for name, (k, n) in pool.layers.items()}
    pool.load_tensors("a", tensors)
    slots, x = torch.tensor([pool.acquire("a"), -1], dtype=torch.int32), torch.randn(2, 64)
    h = lora_linear_batched(
        x, model[0].weight.dequantize().float(), pool.layer("0"), BatchPlan(slots), bias=model[0].bias
    )
    base = model(x)
    with torch.inference_mode(), attach_pool(model, pool).batch(slots):
        torch.testing.assert_close(model[0](x), h)
        torch.testing.assert_close(model(x)[1], base[1], rtol=1e-4, atol=1e-4)
