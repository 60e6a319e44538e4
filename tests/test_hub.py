# ruff: noqa: E402
"""Hugging Face's `kernels`: rows of docs/integrations.md. Its own `kernelize` loads, checks and places our layer."""

import copy
import json

import pytest
import torch
from torch import nn

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("as_before")]
kernels = pytest.importorskip("kernels")
pytest.importorskip("peft")
pytest_plugins = ["peft_judge.cases"]

from conftest import DEVICE
from features import EXACT, FUSED, UNSUPPORTED, feature
from peft_judge import judge
from peft_judge.cases import K, assert_compiles_to_one_operator
from test_linears import N, R, assert_as_near

from lora_kernels.integrations import hub, linears

MODES = {
    "training": kernels.Mode.TRAINING,
    "training, compiled": kernels.Mode.TRAINING | kernels.Mode.TORCH_COMPILE,
    "inference": kernels.Mode.INFERENCE,
}


@kernels.use_kernel_forward_from_hub("LoRALinear")
class OfLinears(nn.Module):
    """As most write it."""

    def __init__(self, p=0.0):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(N, K), requires_grad=False)
        self.bias = nn.Parameter(torch.randn(N))
        self.lora_A, self.lora_B = nn.Linear(K, R, bias=False), nn.Linear(R, N, bias=False)
        self.lora_dropout, self.scaling = nn.Dropout(p), 1.5

    def forward(self, x):
        return nn.functional.linear(x, self.weight, self.bias) + self.scaling * self.lora_B(
            self.lora_A(self.lora_dropout(x))
        )


@kernels.use_kernel_forward_from_hub("LoRALinear")
class OfParameters(nn.Linear):
    """As loralib and LitGPT do; no dropout, no bias."""

    def __init__(self):
        super().__init__(K, N, bias=False)
        self.weight.requires_grad_(False)
        self.lora_A, self.lora_B = nn.Parameter(torch.randn(R, K)), nn.Parameter(torch.randn(N, R))
        self.scaling = 0.5

    def forward(self, x):
        return super().forward(x) + self.scaling * x @ self.lora_A.T @ self.lora_B.T


KINDS = {"of linears": OfLinears, "of parameters": OfParameters, "with dropout": lambda: OfLinears(0.4)}


@pytest.fixture
def calls(monkeypatch):
    """The calls that ran fused."""
    seen, original = [], linears.lora_linear
    monkeypatch.setattr(linears, "lora_linear", lambda *a, **k: seen.append(a) or original(*a, **k))
    return seen


def kernelized(layer, mode="training", repository=None):
    """`layer`, and what it was."""
    mapping = {"LoRALinear": {DEVICE: repository or hub.Installed("LoRALinear")}}
    theirs = copy.deepcopy(layer)
    with kernels.use_kernel_mapping(mapping, inherit_mapping=False):
        kernels.kernelize(nn.Sequential(layer), mode=MODES[mode], device=DEVICE, use_fallback=False)
    return layer, theirs


@feature("`kernelize` for training, with or without `torch.compile`, and for inference", FUSED)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", KINDS)
def test_kernelize(kind, mode, x, calls):
    layer, theirs = kernelized(KINDS[kind](), mode)
    assert_as_near(layer, layer, theirs, copy.deepcopy(theirs).double(), x)
    assert len(calls) == 1
    kernels.kernelize(layer, mode=MODES[mode], device=DEVICE)  # without a mapping: its own again
    torch.testing.assert_close(layer.eval()(x), theirs.eval()(x))
    assert len(calls) == 1


@feature("`torch.compile(fullgraph=True)`", f"{FUSED} (one operator)")
def test_compile_fullgraph(x):
    layer, theirs = kernelized(OfLinears(), "training, compiled")
    assert_compiles_to_one_operator(layer, x, theirs(x))


@feature("a repository in the hub's layout, from a folder (`LocalLayerRepository`)", FUSED)
def test_a_local_repository(x, calls, tmp_path):
    variant = tmp_path / "build" / "torch-universal"
    variant.mkdir(parents=True)
    (variant / "__init__.py").write_text("from lora_kernels.integrations import hub as layers\n")
    metadata = {"id": "lora_kernels_1", "name": "lora-kernels", "version": 1, "license": "Apache-2.0",
                "python-depends": [], "backend": {"type": "cuda"}}  # fmt: skip
    (variant / "metadata.json").write_text(json.dumps(metadata))
    repository = kernels.LocalLayerRepository(tmp_path, layer_name="LoRALinear")
    layer, theirs = kernelized(OfLinears(), repository=repository)
    torch.testing.assert_close(layer(x), theirs(x))
    assert len(calls) == 1


@feature("a scaling, weights and dropout that change", FUSED)
def test_nothing_is_remembered(x, calls):
    layer, theirs = kernelized(OfLinears())
    y = layer(x)
    for each in (layer, theirs):
        each.scaling = 4.0
        nn.init.ones_(each.lora_B.weight)
    assert not torch.allclose(layer(x), y)
    torch.testing.assert_close(layer(x), theirs(x))
    assert len(calls) == 3


@feature("`merged` and `disabled`: the layer's own forward", f"{EXACT}; nothing to add")
@pytest.mark.parametrize("state", ["merged", "disabled"])
def test_no_adapter_to_add(state, x, calls):
    layer, theirs = kernelized(OfLinears())
    setattr(layer, state, True)
    assert torch.equal(layer(x), theirs(x)) and not calls
    setattr(layer, state, False)
    torch.testing.assert_close(layer(x), theirs(x))
    assert len(calls) == 1


REASONS = {
    "hook": (lambda layer: layer.lora_A.register_forward_hook(lambda *_: None), "lora_A has a hook"),
    "bias": (lambda layer: setattr(layer, "lora_B", nn.Linear(R, N)), "lora_B has a bias"),
    "trained": (lambda layer: layer.weight.requires_grad_(), "the base weight trains"),
    "scaling": (lambda layer: setattr(layer, "scaling", -1.0), "the scaling is -1.0"),
}


@feature("hooks on parts, a bias of A or B, a trained base weight, a negative scaling", EXACT)
@pytest.mark.parametrize("name", REASONS)
def test_what_is_not_fused(name, x, calls):
    change, reason = REASONS[name]
    layer = OfLinears()
    change(layer)
    layer, theirs = kernelized(layer)
    with pytest.warns(UserWarning, match=f"OfLinears: {reason}"):
        y = layer(x)
    assert torch.equal(y, theirs(x)) and not calls


@feature("layers whose forward takes more than x (PEFT's): `kernelize` refuses them", UNSUPPORTED)
def test_another_signature():
    from peft.tuners.lora import Linear

    with pytest.raises(TypeError, match="different number of arguments"):
        kernels.layer.layer._validate_layer(check_cls=Linear, cls=hub.LoRALinear, repo=hub.Installed("LoRALinear"))


@pytest.mark.parametrize("fault", judge.FAULTS)
def test_a_planted_fault_is_found(fault, x, monkeypatch):
    layer, theirs = kernelized(OfLinears())
    monkeypatch.setattr(linears, "lora_linear", judge.FAULTS[fault])
    with pytest.raises(AssertionError):
        assert_as_near(layer, layer, theirs, copy.deepcopy(theirs).double(), x)
