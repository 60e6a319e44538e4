"""Formats against the libraries that made them: bitsandbytes, PEFT over it, transformers; torchao has a file of its own."""

import copy

import pytest
import torch
from torch import nn

from lora_kernels import LoRALinear, apply_lora, formats, testing
from lora_kernels.demo.material import in_4_bits
from lora_kernels.formats import FP8Weight, Int4Weight, Int8Weight, NF4Weight
from lora_kernels.formats.int4 import pack, unpack
from lora_kernels.modules import lora_layers

NAMES = "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"

SHAPES = [(64, 1024), (64, 768), (96, 64), (32, 100), (7, 130), (5, 66), (1, 2), (300, 512)]


@pytest.fixture(scope="module")
def bnb():
    return pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed (requirements/dev.txt)")


def linear4bit(bnb, n, k, nested=False, blocksize=64, quant_type="nf4", dtype=torch.float32):
    layer = bnb.nn.Linear4bit(k, n, compute_dtype=torch.float32, compress_statistics=nested, quant_type=quant_type)
    layer.weight.data = torch.randn(n, k, dtype=dtype)
    layer.weight.blocksize = blocksize
    return layer.to("cpu")


def by_definition(bnb, weight):
    """bitsandbytes' dequantisation in PyTorch; its AVX-512 kernel is wrong where blocksize does not divide K."""
    from bitsandbytes.backends.default.ops import _dequantize_4bit_compute

    state = weight.quant_state
    absmax = state.absmax
    if state.nested:
        absmax = bnb.functional.dequantize_blockwise(absmax, state.state2) + state.offset
    code = bnb.functional.get_4bit_type("nf4", "cpu")
    compute = getattr(_dequantize_4bit_compute, "_torchdynamo_orig_callable", _dequantize_4bit_compute)  # uncompiled
    return compute(weight.data.flatten(), absmax, code, state.blocksize, state.shape, torch.float32)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("blocksize", [64, 128, 256, 512])
def test_nf4_is_that_of_bitsandbytes_bit_for_bit(bnb, blocksize, nested):
    for n, k in SHAPES:
        layer = linear4bit(bnb, n, k, nested, blocksize)
        weight = NF4Weight.from_bitsandbytes(layer.weight)
        values = weight.dequantize(torch.float32)
        assert weight.blocksize == blocksize and weight.options["double_quant"] == nested
        assert torch.equal(values, by_definition(bnb, layer.weight))
        if k % blocksize == 0:
            dequantized = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
            assert torch.equal(values, dequantized)
        assert weight.packed.data_ptr() == layer.weight.data_ptr()  # no copy


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("blocksize", [64, 128, 256, 512])
def test_quantising_to_nf4_gives_the_bits_of_bitsandbytes(bnb, blocksize, nested):
    dense = torch.randn(96, 1024)
    dense[:2] = 0.0
    options = {"blocksize": blocksize, "compress_statistics": nested, "quant_type": "nf4"}
    packed, state = bnb.functional.quantize_4bit(dense, **options)
    weight = NF4Weight.quantize(dense, blocksize=blocksize, double_quant=nested)
    assert torch.equal(weight.packed, packed.flatten())
    if not nested:
        assert torch.equal(weight.absmax, state.absmax)
    else:  # of two values of its table that are about as near its kernel may take the other one
        off = (weight.absmax.int() - state.absmax.int()).abs()
        assert off.max() <= 1 and off.count_nonzero() <= 0.02 * len(off)
        assert torch.equal(weight.nested_code, state.state2.code) and torch.equal(weight.nested_offset, state.offset)
        assert torch.equal(weight.nested_absmax, state.state2.absmax)


@pytest.mark.parametrize("nested", [False, True])
def test_repacking_for_the_cpu_is_undone(bnb, nested):
    layer = linear4bit(bnb, 96, 256, nested)
    before = NF4Weight.from_bitsandbytes(layer.weight)
    packed, absmax = before.packed.clone(), before.scales().clone()
    repack = bnb.functional._convert_weight_packed_for_cpu
    layer.weight.data, layer.weight.quant_state = repack(layer.weight.data, layer.weight.quant_state)
    assert not torch.equal(layer.weight.data.flatten(), packed)
    with pytest.warns(UserWarning, match="rounded its absmax to bf16"):
        after = NF4Weight.from_bitsandbytes(layer.weight)
    assert torch.equal(after.packed, packed) and after.dtype == before.dtype
    assert torch.equal(after.scales(), absmax.to(torch.bfloat16).float())


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("nested", [False, True])
def test_a_qlora_step_is_within_budget_of_the_truth_as_is_peft_over_bitsandbytes(bnb, nested, bias):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    case = testing.Case(m=40, n=96, k=128, r=8, scaling=2.0, bias=bias)
    tensors = testing.make_tensors(case)
    base = linear4bit(bnb, case.n, case.k, nested)
    base.bias = None if tensors.bias is None else nn.Parameter(tensors.bias.clone(), requires_grad=False)
    ours = LoRALinear.from_linear(base, r=case.r, lora_alpha=16)
    config = peft.LoraConfig(r=case.r, lora_alpha=16, target_modules=["0"])
    theirs = peft.get_peft_model(nn.Sequential(base), config).base_model.model[0]
    tensors = tensors._replace(weight=ours.weight.dequantize(torch.float32))
    truth, eager, magnitude = testing.expected(case, tensors)
    for layer, a, b in (
        (ours, ours.lora_A.weight, ours.lora_B.weight),
        (theirs, theirs.lora_A["default"].weight, theirs.lora_B["default"].weight),
    ):
        with torch.no_grad():
            a.copy_(tensors.lora_a), b.copy_(tensors.lora_b)
        x = tensors.x.clone().requires_grad_()
        y = layer(x)
        dx, da, db = torch.autograd.grad(y, (x, a, b), tensors.dy)
        for name, actual in {"y": y.detach(), "dx": dx, "da": da, "db": db}.items():
            testing.compare(case, name, actual, truth[name], eager[name], magnitude[name])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_qlora_step_of_a_model_is_that_of_peft_over_bitsandbytes(bnb, dtype):
    """Logits and every gradient of a Llama, held against PEFT over the dense values in fp64."""
    peft = pytest.importorskip("peft", reason="peft is not installed")
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    shape = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    config = transformers.LlamaConfig(
        **shape, num_attention_heads=4, num_key_value_heads=2, attn_implementation="eager"
    )
    base = in_4_bits(transformers.LlamaForCausalLM(config).to(dtype).requires_grad_(False))
    lora = peft.LoraConfig(r=4, lora_alpha=8, target_modules=[*NAMES], init_lora_weights=False)
    theirs, ours = (
        peft.get_peft_model(copy.deepcopy(base), lora),
        apply_lora(copy.deepcopy(base), NAMES, r=4, lora_alpha=8),
    )
    for name, layer in lora_layers(ours).items():
        layer.lora_A.weight.data = theirs.base_model.model.get_submodule(name).lora_A["default"].weight.data.clone()
        layer.lora_B.weight.data = theirs.base_model.model.get_submodule(name).lora_B["default"].weight.data.clone()
        dense = nn.Linear(layer.in_features, layer.out_features, bias=False)
        dense.weight.data = layer.weight.dequantize()
        base.set_submodule(name, dense)
    base.is_loaded_in_4bit = False
    truth = peft.get_peft_model(base.double(), lora)
    truth.load_state_dict(
        {name: t.double() for name, t in theirs.state_dict().items() if "lora_" in name}, strict=False
    )

    tokens = torch.randint(64, (2, 16))
    expected, yardstick, actual = (step(model, tokens) for model in (truth, theirs, ours))
    assert len(actual) == 1 + 4 * 7  # logits, and A and B of seven layers in two blocks
    for name, error in errors(actual, expected).items():
        budget = testing.Budget(errors(yardstick, expected)[name], 2.0, 2 * torch.finfo(dtype).eps)
        assert error <= budget.limit, (name, error, budget)


def step(model, tokens):
    y = model(input_ids=tokens, labels=tokens)
    y.loss.backward()
    gradients = {
        name.removeprefix("base_model.model.").replace(".default", ""): p.grad for name, p in model.named_parameters()
    }
    return {"logits": y.logits.detach()} | {name: grad for name, grad in gradients.items() if grad is not None}


def errors(actual, truth):
    return {name: float((t.double() - truth[name]).norm() / truth[name].norm()) for name, t in actual.items()}


def test_a_model_of_bitsandbytes_gets_adapters(bnb):
    model = nn.Sequential(linear4bit(bnb, 32, 64), nn.ReLU(), nn.Linear(32, 8))
    x = torch.randn(4, 64)
    expected = model.train()(x)
    apply_lora(model, r=4)
    assert isinstance(model[0].weight, NF4Weight) and isinstance(model[2].weight, nn.Parameter)
    assert torch.allclose(model(x), expected, atol=1e-5)


def test_what_no_format_can_hold_is_refused(bnb):
    with pytest.raises(TypeError, match="got quant_type 'fp4', expected 'nf4'"):
        LoRALinear.from_linear(linear4bit(bnb, 32, 64, quant_type="fp4"), r=4)
    with pytest.raises(ValueError, match="weight: has no quant_state, expected a quantised Params4bit"):
        LoRALinear.from_linear(bnb.nn.Linear4bit(64, 32, quant_type="nf4"), r=4)
    with pytest.raises(ValueError, match="linear: its weight is not in int8"):
        LoRALinear.from_linear(bnb.nn.Linear8bitLt(64, 32, has_fp16_weights=False), r=4)
    with pytest.raises(ValueError, match="quantize: got 'int8', expected None, since linear is in nf4 already"):
        LoRALinear.from_linear(linear4bit(bnb, 32, 64), r=4, quantize="int8")


@pytest.mark.parametrize("evaluated", [False, True])
def test_int8_of_bitsandbytes(bnb, evaluated):
    layer = bnb.nn.Linear8bitLt(64, 32, has_fp16_weights=False).to("cpu")
    if evaluated:  # which moves the codes from the weight to the state
        layer.eval()(torch.randn(2, 64, dtype=torch.float16))
    state = layer.state if evaluated else layer.weight
    expected = bnb.functional.int8_vectorwise_dequant(state.CB, state.SCB)
    weight = LoRALinear.from_linear(layer, r=4).weight
    assert isinstance(weight, Int8Weight) and weight.data.data_ptr() == state.CB.data_ptr()
    assert torch.allclose(weight.dequantize(torch.float32), expected, rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("block_size", [None, (128, 128)])
def test_fp8_of_transformers(block_size):
    fp8 = pytest.importorskip("transformers.integrations.finegrained_fp8", reason="transformers is not installed")
    layer = fp8.FP8Linear(200, 300, block_size=block_size)
    dense = FP8Weight.quantize(torch.randn(300, 200), scaling="block" if block_size else "tensor")
    layer.weight.data = dense.data
    layer.weight_scale_inv.data = dense.scale if block_size else dense.scale[0, 0]
    weight = LoRALinear.from_linear(layer, r=4).weight
    assert torch.equal(weight.dequantize(), dense.dequantize(torch.bfloat16))
    assert weight.data.data_ptr() == dense.data.data_ptr()


@pytest.mark.parametrize("zero_offset", [0, 1])
def test_int4_of_gptq(zero_offset):
    k, n, group = 256, 48, 64
    q, zero = torch.randint(0, 16, (k, n)), torch.randint(1, 16, (k // group, n))
    scales = torch.rand(k // group, n).half()
    qweight, qzeros = pack(q.mT).mT.contiguous(), pack(zero - zero_offset)
    weight = Int4Weight.from_gptq(qweight, scales, qzeros, torch.arange(k) // group, zero_offset=zero_offset)
    expected = (q.float() - zero.repeat_interleave(group, 0)) * scales.float().repeat_interleave(group, 0)
    assert torch.equal(weight.dequantize(torch.float32), expected.mT)
    assert weight.packed.data_ptr() == qweight.data_ptr()
    with pytest.raises(NotImplementedError, match="g_idx: got groups in an order of their own"):
        Int4Weight.from_gptq(qweight, scales, qzeros, torch.arange(k).flip(0) // group)


def test_int4_of_awq():
    k, n, group = 256, 48, 64
    q, zero = torch.randint(0, 16, (k, n)), torch.randint(0, 16, (k // group, n))
    scales = torch.rand(k // group, n).half()

    def packed(t):  # nibble i holds this column of eight: docs/formats.md
        return pack(t.view(len(t), -1, 8)[..., [0, 2, 4, 6, 1, 3, 5, 7]].flatten(1))

    weight = Int4Weight.from_awq(packed(q), scales, packed(zero))
    expected = (q.float() - zero.repeat_interleave(group, 0)) * scales.float().repeat_interleave(group, 0)
    assert torch.equal(weight.dequantize(torch.float32), expected.mT)


def test_unpack_undoes_pack():
    q = torch.randint(0, 16, (5, 64))
    assert torch.equal(unpack(pack(q)), q.int())


def test_a_plain_layer_is_no_quantised_one():
    assert formats.from_linear(nn.Linear(8, 8)) is None
    assert formats.from_linear(nn.ReLU()) is None
