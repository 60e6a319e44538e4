# ruff: noqa: E402
"""What does not run fused is PEFT's own, bit for bit, and said: rows of docs/integrations.md; and the judge is judged."""

import pytest
import torch
from torch import nn

peft = pytest.importorskip("peft")

from features import EXACT, feature
from peft_judge.cases import BITWISE, K, N, Net, assert_same, config, peft_model, step
from peft_judge.judge import FAULTS, planted

import lora_kernels

pytest_plugins = ["peft_judge.cases"]
pytestmark = pytest.mark.usefixtures("as_before", "judge")


@feature("several adapters active at once, with dropout in training", EXACT)
def test_several_active_adapters_with_dropout(x):
    model = peft_model(config(lora_dropout=0.2))
    model.add_adapter("other", config())
    model.base_model.set_adapter(["default", "other"])
    with pytest.warns(UserWarning, match="several active adapters with dropout"):
        report = lora_kernels.apply_lora_kernels_to_model(model)
    assert "random numbers" in report.skipped["base_model.model.up"]
    torch.manual_seed(5)
    y = model(x)
    lora_kernels.unpatch_peft(model)
    torch.manual_seed(5)
    assert torch.equal(model(x), y)


@feature("`adapter_names` with gradients", EXACT)
def test_mixed_batch_with_gradients(x):
    model = peft_model().eval()
    lora_kernels.apply_lora_kernels_to_model(model)
    with pytest.warns(UserWarning, match="mixed batch with gradients"):
        model(x, adapter_names=["default", "__base__"]).sum().backward()
    assert model.base_model.model.up.lora_A.default.weight.grad is not None


PARTS = {
    "base_layer": lambda layer: layer.base_layer,
    "lora_A": lambda layer: layer.lora_A.default,
    "lora_B": lambda layer: layer.lora_B.default,
    "lora_dropout": lambda layer: layer.lora_dropout.default,
}


@feature("hooks on `base_layer`, `lora_A`, `lora_B`, `lora_dropout`, and global ones", EXACT)
@pytest.mark.parametrize("part", [*PARTS, "global"])
@pytest.mark.parametrize("kind", ["forward_hook", "forward_pre_hook", "full_backward_hook"])
def test_hooks_on_its_parts(x, part, kind):
    model = peft_model()
    lora_kernels.apply_lora_kernels_to_model(model)
    seen = []
    if part == "global":
        register = getattr(torch.nn.modules.module, f"register_module_{kind}")
    else:
        register = getattr(PARTS[part](model.base_model.model.up), f"register_{kind}")
    handle = register(lambda module, *_: seen.append(module))
    try:
        with pytest.warns(UserWarning, match="hook"):
            model(x.requires_grad_()).sum().backward()
    finally:
        handle.remove()
    assert seen


@feature("`torch.compile(fullgraph=True)` of what is not fused", EXACT)
def test_compile_of_what_is_not_fused(x, judge):
    model = peft_model(config(r=600))  # DoRA itself does not compile (PEFT 0.21)
    with pytest.warns(UserWarning, match="the rank is 600"):
        lora_kernels.apply_lora_kernels_to_model(model)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), model(x))


NOT_FUSED = {
    "DoRA": ({"use_dora": True}, "DoraLinearVariant has no kernel"),
    "rank": ({"r": 600}, "the rank is 600"),
}


@feature("DoRA, ranks over 512", EXACT)
@pytest.mark.parametrize("name", NOT_FUSED)
def test_variants(x, name):
    settings, reason = NOT_FUSED[name]
    model = peft_model(config(**settings))
    with pytest.warns(UserWarning, match=reason):
        report = lora_kernels.apply_lora_kernels_to_model(model)
    assert reason in report.skipped["base_model.model.up"] and reason in str(report)
    assert_same(model, x, BITWISE)


class Quantised(nn.Linear):
    """Stands for any base layer that is more than its weight."""

    def forward(self, x):
        return nn.functional.linear(x, self.weight.round(decimals=1), self.bias)


@feature("quantised and other base layers, parametrised weights, a trained base weight", EXACT)
@pytest.mark.parametrize("kind", ["subclass", "parametrised", "parametrised adapter", "trained"])
def test_other_base_layers(x, kind):
    base = Net()
    if kind == "subclass":
        base.up = Quantised(K, N)
    model = peft_model(base=base)
    layer = model.base_model.model.up
    if kind == "parametrised":
        torch.nn.utils.parametrizations.spectral_norm(layer.base_layer.eval())
    elif kind == "parametrised adapter":
        torch.nn.utils.parametrizations.weight_norm(layer.lora_A.default)
    elif kind == "trained":
        layer.base_layer.weight.requires_grad_()
    with pytest.warns(UserWarning, match="not fused"):
        lora_kernels.apply_lora_kernels_to_model(model)
    assert_same(model, x, BITWISE)


@feature("embedding and convolution layers", f"{EXACT}; the model's rest fused")
def test_other_layer_classes():
    class Other(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.conv, self.up = nn.Embedding(10, K), nn.Conv1d(K, K, 1), nn.Linear(K, N)

        def forward(self, tokens):
            return self.up(self.conv(self.embed(tokens).mT).mT)

    model = peft_model(config(["embed", "conv", "up"]), Other())
    tokens = torch.tensor([[1, 2, 3]])
    expected = model(tokens)
    with pytest.warns(UserWarning, match="no kernel for this class"):
        report = lora_kernels.apply_lora_kernels_to_model(model)
    assert report.fused == ["base_model.model.up"]
    assert [layer.kind for layer in report.layers] == ["lora.Embedding", "lora.Conv1d", "lora.Linear"]
    torch.testing.assert_close(model(tokens), expected)


@feature("adapters of another dtype than x's (but fp32)", EXACT)
def test_adapters_of_another_dtype(x):
    model = peft_model()
    for part in ("lora_A", "lora_B"):
        getattr(model.base_model.model.up, part).bfloat16()
    lora_kernels.apply_lora_kernels_to_model(model)
    with pytest.warns(
        UserWarning, match=r"x is torch.float32, the base weight torch.float32, the adapter torch.bfloat16"
    ):
        model(x)


@feature("`torch.func`, `torch.jit.trace`, forward-mode AD", EXACT)
def test_other_tracers(x):
    model = peft_model().eval()
    with torch.no_grad():
        expected = model(x)
    lora_kernels.apply_lora_kernels_to_model(model)
    with pytest.warns(UserWarning, match="look inside"):
        torch.testing.assert_close(torch.vmap(model)(x), expected)
    assert torch.func.jvp(model, (x,), (x,))[1].shape == expected.shape
    torch.testing.assert_close(torch.jit.trace(model.base_model.model, x, check_trace=False)(x), expected)


def test_one_warning_for_each_reason(x):
    model = peft_model(config(["up", "down", "head"], use_dora=True, fan_in_fan_out=True))
    with pytest.warns(UserWarning) as caught:
        lora_kernels.apply_lora_kernels_to_model(model)
        model(x), model(x)
    assert [str(w.message) for w in caught] == ["lora_kernels: not fused, lora.Linear: DoraLinearVariant has no kernel"]


def test_strict(x, monkeypatch):
    model = peft_model()
    monkeypatch.setenv("LORA_KERNELS_STRICT", "1")
    lora_kernels.apply_lora_kernels_to_model(model)
    model(x)
    model.base_model.model.up.lora_A.default.register_forward_hook(lambda *_: None)
    with pytest.raises(RuntimeError, match=r"lora_A has a hook.*LORA_KERNELS_STRICT=1"):
        model(x)
    with pytest.raises(RuntimeError, match="DoraLinearVariant"):
        lora_kernels.apply_lora_kernels_to_model(peft_model(config(use_dora=True)))


def test_bad_input():
    with pytest.raises(TypeError, match=r"model: got dict, expected a torch.nn.Module"):
        lora_kernels.apply_lora_kernels_to_model({})
    with pytest.raises(ValueError, match="model: has no LoRA layer"):
        lora_kernels.apply_lora_kernels_to_model(Net())


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found(x, fault, judge):
    model = peft_model()
    lora_kernels.apply_lora_kernels_to_model(model)
    with planted(fault), pytest.raises(AssertionError, match=r"dlora_A|is off by"):
        step(model, x)
    assert judge.wrong
