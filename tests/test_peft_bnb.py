# ruff: noqa: E402
"""PEFT over bitsandbytes: rows of docs/integrations.md; the judge holds each fused call against PEFT's own and that in fp64."""

import copy
import functools

import pytest
import torch
from torch import nn

bnb = pytest.importorskip("bitsandbytes")
peft = pytest.importorskip("peft")

from conftest import DEVICE
from features import EXACT, FUSED, feature
from peft_judge.cases import CLOSE, config, peft_model, step

import lora_kernels
from lora_kernels import testing
from lora_kernels.integrations import peft_bnb
from lora_kernels.integrations import transformers as blocks

pytest_plugins = ["peft_judge.cases"]
pytestmark = pytest.mark.usefixtures("as_before", "judge")
AT_16_BITS = functools.partial(torch.testing.assert_close, rtol=0.1, atol=0.5)  # the judge is stricter
K, N = 64, 128  # blocks divide the rows: bitsandbytes 0.50.2 gets the others wrong on CPUs


class Net(nn.Module):
    """As transformers makes it: PEFT has classes of its own for a model that is loaded so."""

    def __init__(
        self, compute=torch.float32, stored=torch.float32, known=True, nested=True, quant_type="nf4", bias=True,
        blocksize=64,
    ):  # fmt: skip
        super().__init__()
        options = {"compute_dtype": compute, "quant_type": quant_type, "compress_statistics": nested, "bias": bias}
        self.up, self.down = bnb.nn.Linear4bit(K, N, **options), bnb.nn.Linear4bit(N, K, **options)
        self.up.weight.blocksize = self.down.weight.blocksize = blocksize
        self.is_loaded_in_4bit = known
        self.to(stored).to(DEVICE)

    def forward(self, x):
        return self.down(nn.functional.gelu(self.up(x)))


def four_bit(**options):
    settings = {name: options.pop(name) for name in ("lora_dropout", "use_dora", "targets") if name in options}
    return peft_model(config(**{"targets": ("up", "down"), **settings}), Net(**options))


def fuse(model):
    """`model` runs fused, and all of it."""
    report = lora_kernels.apply_lora_kernels_to_model(model)
    assert len(report.fused) == len(report.layers) > 0
    return model


def x(dtype=torch.float32):
    return torch.randn(2, 5, K, dtype=dtype, device=DEVICE)


def assert_same(model, x, close=CLOSE):
    expected, expected_gradients = step(model, x)
    y, gradients = step(fuse(model), x)
    assert y.dtype == expected.dtype
    close(y, expected)
    for name, gradient in gradients.items():
        close(gradient, expected_gradients[name])


@feature("bitsandbytes' `Linear4bit` in nf4, nested or not, a bias or none", FUSED)
@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("nested", [True, False])
def test_nf4(nested, known):
    model = four_bit(nested=nested, bias=nested, known=known)
    kind = type(model.base_model.model.up).__module__
    assert kind == ("peft.tuners.lora.bnb" if known else "peft.tuners.lora.layer")
    assert_same(model, x())
    lora_kernels.unpatch_peft(model)
    assert type(model.base_model.model.up).__module__ == kind


@feature("the same in bf16, with PEFT's fp32 adapters", FUSED)
def test_nf4_in_bf16():
    assert_same(four_bit(compute=torch.bfloat16, stored=torch.bfloat16), x(torch.bfloat16), AT_16_BITS)


@feature("the same under autocast to its `compute_dtype`, as a trainer has it", FUSED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nf4_under_autocast(dtype):
    model = four_bit(compute=torch.bfloat16, stored=torch.bfloat16)
    with torch.autocast(DEVICE, torch.bfloat16):
        assert_same(model, x(dtype), AT_16_BITS)


@feature("the same with dropout, several adapters, a mixed batch in inference, after `deepcopy`", FUSED)
def test_nf4_with_all_that_a_dense_layer_has():
    model = fuse(four_bit(lora_dropout=0.25))
    step(model, x())
    model.eval().add_adapter("other", config(("up", "down")))
    model.base_model.set_adapter(["default", "other"])
    step(copy.deepcopy(model), x())
    with torch.inference_mode():
        model(x(), adapter_names=["other", "__base__"])


@feature("the same, merged and unmerged", FUSED)
@pytest.mark.filterwarnings("ignore:.*rounding errors:UserWarning")
def test_nf4_after_a_merge():
    """Merging makes another weight, which is converted anew."""
    model = fuse(four_bit()).train()
    before = model(x())
    model.merge_adapter()
    model.unmerge_adapter()
    again = copy.deepcopy(model)
    lora_kernels.unpatch_peft(again)
    inputs = x()
    CLOSE(model(inputs), again(inputs))
    assert before.shape == again(inputs).shape


def test_a_weight_is_converted_once_and_shares_its_codes(monkeypatch):
    model, made = fuse(four_bit()), []
    convert = peft_bnb.formats.NF4Weight.from_bitsandbytes
    monkeypatch.setattr(
        peft_bnb.formats.NF4Weight, "from_bitsandbytes", lambda weight: made.append(convert(weight)) or made[-1]
    )
    peft_bnb._weights.clear()
    layer = model.base_model.model.up
    for _ in range(2):
        weight, _ = layer.weight_and_bias()
    assert len(made) == 1 and weight is made[0]
    assert weight.packed.data_ptr() == layer.base_layer.weight.data_ptr()
    assert not set(model.state_dict()) ^ set(four_bit().state_dict())


REASONS = {
    "another compute_dtype": (dict(compute=torch.bfloat16), "x is torch.float32, the base weight torch.bfloat16"),
    "no compute_dtype": (dict(compute=None), "or chosen its compute_dtype"),
    "larger blocks": (dict(blocksize=1024), "blocksize: got 1024, expected one of 64, 128, 256, 512"),
    "fp4": (dict(quant_type="fp4"), "the weight is in fp4"),
    "a coarser weight": (
        dict(stored=torch.bfloat16),
        "the weight was torch.bfloat16, and bitsandbytes computes in torch.f",
    ),
    "DoRA": (dict(use_dora=True), "DoraLinearVariant has no kernel"),
}


@feature("another `compute_dtype` than x's or autocast's, or one finer than the weight was; fp4; DoRA", EXACT)
@pytest.mark.parametrize("name", REASONS)
def test_what_is_not_fused(name):
    options, reason = REASONS[name]
    model = four_bit(**options)
    inputs = x()
    with torch.random.fork_rng():
        expected, gradients = step(copy.deepcopy(model), inputs)
    with pytest.warns(UserWarning, match=reason):
        lora_kernels.apply_lora_kernels_to_model(model)
        y, actual = step(model, inputs)
    assert torch.equal(y, expected) and all(torch.equal(actual[name], gradients[name]) for name in actual)


@feature("another autocast than to its `compute_dtype`", EXACT)
def test_another_autocast():
    layer = fuse(four_bit()).base_model.model.up
    with pytest.warns(UserWarning, match="autocast in another dtype"), torch.autocast(DEVICE, torch.bfloat16):
        layer(x())


@feature("a weight that bitsandbytes has repacked for its CPU kernel, which an evaluation without us does", EXACT)
def test_a_repacked_weight():
    layer = fuse(four_bit()).base_model.model.up.eval()
    weight = layer.base_layer.weight
    weight.data, weight.quant_state = bnb.functional._convert_weight_packed_for_cpu(weight.data, weight.quant_state)
    with torch.no_grad(), pytest.warns(UserWarning, match="has repacked the weight for its own CPU kernel"):
        layer(x())


def test_compiled_it_is_theirs():
    layer = fuse(four_bit()).base_model.model.up
    with pytest.warns(UserWarning, match="under torch.compile"):
        torch.compile(layer, backend="eager")(x())


@feature("bitsandbytes' `Linear8bitLt`, which quantises x", f"{EXACT}; the model's rest fused")
def test_int8():
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.head = bnb.nn.Linear8bitLt(K, N, has_fp16_weights=False), nn.Linear(N, 3)
            self.is_loaded_in_8bit = True
            self.to(DEVICE)

        def forward(self, x):
            return self.head(self.up(x))

    model = peft_model(config(("up", "head")), Mixed())
    with pytest.warns(UserWarning, match="quantises x too"):
        report = lora_kernels.apply_lora_kernels_to_model(model)
    assert report.fused == ["base_model.model.head"] and peft_bnb.QUANTISES_X in report.skipped.values()


TARGETS = "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj".split()


def llama(dtype, targets=TARGETS):
    """A small model of transformers, in nf4 and ready to train as PEFT makes it: checkpointed, its norms in fp32."""
    transformers = pytest.importorskip("transformers")
    config_of = transformers.LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4
    )
    torch.manual_seed(1)
    base = transformers.LlamaForCausalLM(config_of).bfloat16().to(dtype)  # the same weights in each
    for name, module in list(base.named_modules()):
        if type(module) is nn.Linear and name != "lm_head":
            options = {"bias": False, "compute_dtype": dtype, "quant_type": "nf4"}
            layer = bnb.nn.Linear4bit(module.in_features, module.out_features, **options)
            layer.weight = bnb.nn.Params4bit(module.weight.data, requires_grad=False, quant_type="nf4", module=layer)
            base.set_submodule(name, layer)
    base.is_loaded_in_4bit = True
    return peft_model(config(targets), peft.prepare_model_for_kbit_training(base.to(DEVICE))).train()


def loss_and_gradients(model, dtype):
    tokens = torch.randint(64, (2, 12), generator=torch.Generator().manual_seed(3), device="cpu").to(DEVICE)
    with torch.autocast(DEVICE, dtype, enabled=dtype != torch.float32):
        loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
    model.zero_grad()
    loss.backward()
    return {"loss": loss.detach()} | {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


@feature("a model of transformers after `prepare_model_for_kbit_training`, checkpointed, under autocast", FUSED)
def test_a_model_of_transformers():
    found = loss_and_gradients(fuse(llama(torch.bfloat16)), torch.bfloat16)
    assert len(found) == 29 and all(t.isfinite().all() and t.any() for t in found.values())


@feature(
    "the same with `blocks=True`: as one over nf4, projections without an adapter too", f"{FUSED} (a block as one)"
)
@pytest.mark.parametrize("targets", [TARGETS, ["q_proj", "v_proj", "up_proj"]], ids=["all", "some"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_blocks(dtype, targets, monkeypatch):
    calls = []
    for name in ("lora_projections", "lora_mlp"):
        original = getattr(blocks, name)
        monkeypatch.setattr(blocks, name, lambda *a, f=original, n=name, **k: calls.append(n) or f(*a, **k))
    model = llama(dtype, targets)
    expected, exact = loss_and_gradients(model, dtype), loss_and_gradients(llama(torch.float32, targets), torch.float32)
    report = lora_kernels.apply_lora_kernels_to_model(model, blocks=True)
    assert len(report.blocks) == 4 and not report.skipped and not any(block.reason for block in report.blocks)
    found = loss_and_gradients(model, dtype)
    assert calls.count("lora_projections") == calls.count("lora_mlp") == 4  # twice, since it is checkpointed
    for name, gradient in found.items():
        zero = torch.zeros_like(gradient)
        assert gradient.dtype == expected[name].dtype
        error, yardstick = (testing.errors(each[name], exact[name], zero)["rms"][0] for each in (found, expected))
        assert error <= testing.Budget(yardstick, 2.0, max(1e-5, 2 * torch.finfo(dtype).eps)).limit, name


def test_blocks_keep_the_dtype_of_x_under_autocast():
    """As bitsandbytes' layers do, one by one."""
    model = llama(torch.bfloat16)
    lora_kernels.apply_lora_kernels_to_model(model, blocks=True)
    layer, inputs = model.base_model.model.model.layers[0], torch.randn(2, 5, 64)
    with torch.autocast(DEVICE, torch.bfloat16):
        assert layer.self_attn.q_proj(inputs).dtype == layer.mlp(inputs).dtype == torch.float32
        assert set(layer.self_attn.q_proj.together.ys) == {layer.self_attn.k_proj, layer.self_attn.v_proj}


@feature("a block of which one layer is in fp4", f"{EXACT}; layer by layer")
def test_a_block_in_fp4():
    model = llama(torch.float32, ["q_proj", "v_proj", "up_proj"])
    inner = model.base_model.model.model.layers[0].mlp
    inner.gate_proj.weight.quant_state.quant_type = "fp4"
    with pytest.warns(UserWarning, match="gate, up and down as one: the weight is in fp4"):
        lora_kernels.apply_lora_kernels_to_model(model, blocks=True)
        inner(torch.randn(2, 64))
