"""LoRA layers of loralib, LitGPT, torchtune, DeepSpeed and NeMo: every fused call against the library's own and fp64."""

import contextlib
import copy
import io
import os
import pickle
import sys

import pytest
import torch
from conftest import DEVICE
from features import EXACT, FUSED, feature
from peft_judge import judge
from peft_judge.cases import K, assert_compiles_to_one_operator
from torch import nn

import lora_kernels
from lora_kernels.integrations import linears

pytest_plugins = ["peft_judge.cases"]
pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("as_before")]
N, R = 48, 4
HEADS = {"head_size": 8, "n_head": 4, "n_query_groups": 1}  # N = 8 (4 + 1 + 1)


def loralib_linear(p=0.0, **settings):
    loralib = pytest.importorskip("loralib")
    return loralib.Linear(K, N, r=R, lora_alpha=6, lora_dropout=p, **settings)


def loralib_merged(p=0.0, enable=(True, False, True), **settings):
    loralib = pytest.importorskip("loralib")
    return loralib.MergedLinear(K, N, r=R, lora_alpha=6, lora_dropout=p, enable_lora=list(enable), **settings)


def litgpt_linear(p=0.0, **settings):
    lora = pytest.importorskip("litgpt.lora")
    return frozen(lora.LoRALinear(K, N, r=R, lora_alpha=6, lora_dropout=p, **settings))


def litgpt_qkv(p=0.0, enable=(True, False, True), **heads):
    lora = pytest.importorskip("litgpt.lora")
    return frozen(lora.LoRAQKVLinear(K, N, **HEADS | heads, r=R, lora_alpha=6, lora_dropout=p, enable_lora=enable))


def torchtune_lora():
    quantization = pytest.importorskip("torchao.quantization")
    # torchtune 0.6.1 looks for NF4Tensor where torchao 0.18 no longer has it.
    sys.modules.setdefault("torchao.dtypes.nf4tensor", sys.modules[quantization.NF4Tensor.__module__])
    return pytest.importorskip("torchtune.modules.peft.lora")


def torchtune_linear(p=0.0, **settings):
    lora = torchtune_lora()
    return frozen(lora.LoRALinear(K, N, R, 6.0, dropout=p, **settings))


def deepspeed_linear(p=0.0):
    os.environ.setdefault("DS_ACCELERATOR", DEVICE)
    linear = pytest.importorskip("deepspeed.linear.optimized_linear")
    config = pytest.importorskip("deepspeed.linear.config").LoRAConfig(lora_r=R, lora_alpha=6, target_mods=["0"])
    return linear.LoRAOptimizedLinear(K, N, lora_config=config, device=DEVICE, dtype=torch.float32)


def nemo():
    return pytest.importorskip("nemo_automodel.components._peft.lora")


def nemo_linear(p=0.0, **settings):
    settings = {"dropout_position": "pre", "use_triton": False} | settings
    return frozen(nemo().patch_linear_module(nn.Linear(K, N), dim=R, alpha=6, dropout=p, **settings))


def frozen(layer):
    for name, parameter in layer.named_parameters():
        parameter.requires_grad_("lora" in name or "bias" in name)
    return layer


LAYERS = {
    "loralib": loralib_linear,
    "loralib, fan_in_fan_out": lambda p=0.0: loralib_linear(p, fan_in_fan_out=True, bias=False),
    "loralib, merged": loralib_merged,
    "loralib, merged, all": lambda p=0.0: loralib_merged(p, (True, True), fan_in_fan_out=True),
    "litgpt": litgpt_linear,
    "litgpt, qkv": litgpt_qkv,
    "litgpt, qkv, all": lambda p=0.0: litgpt_qkv(p, True, head_size=8, n_head=2, n_query_groups=2),
    "torchtune": torchtune_linear,
    "torchtune, bias": lambda p=0.0: torchtune_linear(p, use_bias=True),
    "deepspeed": deepspeed_linear,
    "nemo_automodel": nemo_linear,
    "nemo_automodel, saving h": lambda p=0.0: nemo_linear(p, use_memory_efficient_lora=False),
}
NO_PICKLE = ("loralib", "litgpt", "nemo_automodel")  # their own
WITH_DROPOUT = [name for name in LAYERS if name != "deepspeed"]


def model_of(name, *args):
    torch.manual_seed(1)
    model = nn.Sequential(LAYERS[name](*args))
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model


def own(layer, dtype=None):
    """The library's own layer with the same weights."""
    layer = copy.deepcopy(layer)
    linears.unfuse(layer)
    return layer.to(dtype)


def assert_right(model, x):
    """y and all gradients of the one layer are as near to fp64 as the library's own."""
    [layer], (exact,), (theirs,) = model, own(model, torch.float64), own(model)
    assert isinstance(layer, linears.Fused) and not isinstance(theirs, linears.Fused)
    assert_as_near(lambda x: linears.compute(layer.parts(), x), layer, theirs, exact, x)


def assert_as_near(fused, layer, theirs, exact, x):
    """What `fused` makes of x and of `layer`'s parameters is as near to `exact` as what `theirs` does."""
    with judge._recorded_seeds() as seeds:
        ours = judge._results(fused, layer, x, True)
    with judge._same_dropout(seeds):
        wanted = judge._results(theirs, theirs, x, True)
        with torch.autocast(DEVICE, enabled=False):
            truth = judge._results(exact, exact, x.double(), True)
    assert ours.keys() == wanted.keys() == truth.keys() and len(ours) >= 4
    eps = max(torch.finfo(t.dtype).eps for t in (x, ours["y"]))
    for name, actual in ours.items():
        assert (actual.dtype, actual.shape) == (wanted[name].dtype, wanted[name].shape), name
        allowed = judge.FACTOR * judge._error(wanted[name], truth[name]) + judge.FREE_EPS * eps
        assert judge._error(actual, truth[name]) <= allowed, name


@feature("forward and backward, biases, `fan_in_fan_out`", FUSED, "all five")
@feature("`MergedLinear`, `LoRAQKVLinear`: slices with and without adapters, grouped queries", FUSED, "loralib, LitGPT")
@pytest.mark.parametrize("name", LAYERS)
def test_forward_and_backward(name, x):
    model = model_of(name)
    theirs = copy.deepcopy(model)
    report = lora_kernels.apply_lora_kernels_to_model(model)
    assert report.fused == ["0"] and report.layers[0].kind.split(".")[0] == name.split(",")[0]
    assert list(model.state_dict()) == list(theirs.state_dict())
    assert_right(model, x)
    torch.testing.assert_close(model(x), theirs(x))
    lora_kernels.unpatch_peft(model)
    assert type(model[0]) is type(theirs[0])


@feature("dropout in training (other random numbers)", FUSED, "loralib, LitGPT, torchtune, NeMo")
@pytest.mark.parametrize("name", WITH_DROPOUT)
def test_dropout(name, x):
    model = model_of(name, 0.4)
    lora_kernels.apply_lora_kernels_to_model(model)
    assert_right(model, x)
    assert not torch.equal(model(x), model(x))
    model.eval()
    assert torch.equal(model(x), model(x))
    torch.testing.assert_close(model(x), own(model)(x))


@feature("bf16, and autocast", FUSED, "all five")
@pytest.mark.parametrize("how", ["bf16", "autocast"])
@pytest.mark.parametrize("name", LAYERS)
def test_16_bits(name, how, x):
    model = model_of(name)
    lora_kernels.apply_lora_kernels_to_model(model)
    if how == "bf16":
        assert_right(model.bfloat16(), x.bfloat16())
    else:
        with torch.autocast(DEVICE, torch.bfloat16):
            assert_right(model, x)


@feature("save, load in the library alone, and back", FUSED, "all five")
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", LAYERS)
def test_save_and_load(name, training, x):
    model = model_of(name)
    lora_kernels.apply_lora_kernels_to_model(model)
    y = model.train(training)(x)
    torch.manual_seed(9)
    theirs = nn.Sequential(LAYERS[name]())
    theirs.load_state_dict(model.state_dict())
    torch.testing.assert_close(theirs.train(training)(x), y)
    lora_kernels.apply_lora_kernels_to_model(theirs)
    torch.testing.assert_close(theirs(x), y)
    for other in (copy.deepcopy(model), *([] if name.startswith(NO_PICKLE) else [pickled(model)])):
        assert type(other[0]) is type(model[0]) and torch.equal(other(x), y)


def pickled(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    assert type(pickle.loads(pickle.dumps(model))[0]) is type(model[0])
    return torch.load(buffer, weights_only=False)


@feature("`eval()` and `train()` leave the weights alone (loralib's own merge)", FUSED, "loralib")
@pytest.mark.parametrize("name", [name for name in LAYERS if "loralib" in name])
def test_eval_does_not_merge(name, x):
    model = model_of(name)
    y, weight = model(x), model[0].weight.clone()
    model.eval()
    assert model[0].merged and not torch.equal(model[0].weight, weight)
    report = lora_kernels.apply_lora_kernels_to_model(model)
    assert report.fused == ["0"] and not model[0].merged and not model.training
    torch.testing.assert_close(model[0].weight, weight)
    weight = model[0].weight.clone()
    for mode in (True, False, True):
        assert model.train(mode) is model and model[0].training is mode
        assert torch.equal(model[0].weight, weight) and not model[0].merged
        torch.testing.assert_close(model(x), y)
    assert_right(model, x)


@feature("`merge()`", FUSED, "LitGPT")
@pytest.mark.parametrize("name", [name for name in LAYERS if "litgpt" in name])
def test_merge(name, x):
    model = model_of(name)
    lora_kernels.apply_lora_kernels_to_model(model)
    y = model(x)
    model[0].merge()
    torch.testing.assert_close(model(x), y)
    assert model[0].merged and torch.equal(model(x), own(model)(x))


@feature("`disabled`, and a scaling that changes", FUSED, "torchtune")
def test_disabled(x):
    model = model_of("torchtune")
    lora_kernels.apply_lora_kernels_to_model(model)
    y = model(x)
    model[0].disabled = True
    assert torch.equal(model(x), nn.functional.linear(x, model[0].weight))
    model[0].disabled, model[0].alpha = False, 12.0
    assert not torch.allclose(model(x), y)
    assert_right(model, x)


@feature("`torch.compile(fullgraph=True)`", f"{FUSED} (one operator)", "all five")
@pytest.mark.parametrize("name", LAYERS)
def test_compile_fullgraph(name, x):
    model = model_of(name)
    lora_kernels.apply_lora_kernels_to_model(model)
    assert_compiles_to_one_operator(model, x, model(x))


NOT_FUSED = {
    "trained weight": ("loralib", lambda layer: layer.weight.requires_grad_(), "the base weight trains"),
    "scaling": ("litgpt", lambda layer: setattr(layer, "scaling", -1.0), "the scaling is -1.0"),
    "hook": ("torchtune", lambda layer: layer.lora_a.register_forward_hook(lambda *_: None), "lora_a has a hook"),
    "parametrised": ("litgpt", lambda layer: nn.utils.parametrizations.weight_norm(layer.linear), "the base layer is"),
    "dtype": ("loralib, merged", lambda layer: layer.double(), "x is torch.float32"),
}


@feature("hooks on parts, parametrised or trained base weights, another dtype, a negative scaling", EXACT, "all five")
@pytest.mark.parametrize("name", NOT_FUSED)
def test_what_is_not_fused(name, x):
    layer, change, reason = NOT_FUSED[name]
    model = model_of(layer)
    change(model[0])
    theirs = copy.deepcopy(model)
    with pytest.warns(UserWarning, match=reason), contextlib.suppress(RuntimeError):
        lora_kernels.apply_lora_kernels_to_model(model)
        model(x)
    if name == "dtype":
        with pytest.raises(RuntimeError, match="dtype"):
            theirs(x)
    else:
        assert torch.equal(model(x), theirs(x))


@feature("torchtune's `QATLoRALinear`, DeepSpeed's quantised base", EXACT, "torchtune, DeepSpeed")
def test_other_classes(x):
    lora = torchtune_lora()
    model = nn.Sequential(lora.QATLoRALinear(K, N, R, 6.0))
    expected = model(x)
    with pytest.warns(UserWarning, match="torchtune.QATLoRALinear: no kernel for this class"):
        report = lora_kernels.apply_lora_kernels_to_model(model)
    assert report.skipped == {"0": "no kernel for this class"} and torch.equal(model(x), expected)
    deepspeed_model = model_of("deepspeed")
    deepspeed_model[0].quantization_config = object()
    with pytest.warns(UserWarning, match="sharded or quantised"):
        lora_kernels.apply_lora_kernels_to_model(deepspeed_model)


@feature("`TritonLinearLoRA`", FUSED, "NeMo")
def test_nemo_triton(x):
    model, theirs = nn.Sequential(nemo_linear(use_triton=True)), nn.Sequential(nemo_linear())
    nn.init.normal_(model[0].lora_B.weight)
    theirs.load_state_dict(model.state_dict())
    assert lora_kernels.apply_lora_kernels_to_model(model).fused == ["0"]
    torch.testing.assert_close(model(x), theirs(x))
    lora_kernels.unpatch_peft(model)
    assert isinstance(model[0], nemo().TritonLinearLoRA) and not isinstance(model[0], linears.Fused)


@feature("DoRA, dropout after B in training", EXACT, "NeMo")
@pytest.mark.parametrize(
    ("settings", "reason"), [({"use_dora": True}, "DoRA"), ({"dropout_position": "post"}, "dropout after B")]
)
def test_nemo_variants(settings, reason, x):
    model = nn.Sequential(nemo_linear(0.4, **settings))
    nn.init.normal_(model[0].lora_B.weight)
    theirs = copy.deepcopy(model)
    with pytest.warns(UserWarning, match=reason):
        assert reason in lora_kernels.apply_lora_kernels_to_model(model).skipped["0"]
        model(x)
    results = []
    for each in (model, theirs):
        torch.manual_seed(4)
        results.append(each(x))
    assert torch.equal(*results)
    if "dropout" in reason:
        assert lora_kernels.apply_lora_kernels_to_model(model.eval()).fused == ["0"]
        torch.testing.assert_close(model(x), theirs.eval()(x))


@feature("an MLP that NeMo itself runs as one operation (`use_memory_efficient_lora`)", f"{EXACT}; NeMo's own", "NeMo")
def test_nemo_runs_the_whole_mlp(x):
    class MLP(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate_proj, self.up_proj = nn.Linear(K, N, bias=False), nn.Linear(K, N, bias=False)
            self.down_proj, self.act_fn = nn.Linear(N, K, bias=False), nn.SiLU()

        def forward(self, x):
            return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))

    for whole in (True, False):
        model = nn.Sequential(MLP())
        settings = nemo().PeftConfig(match_all_linear=True, dim=R, use_memory_efficient_lora=whole)
        assert nemo().apply_lora_to_linear_modules(model, settings) == 3
        y = model(x)
        with contextlib.nullcontext() if not whole else pytest.warns(UserWarning, match="NeMo runs the whole MLP"):
            report = lora_kernels.apply_lora_kernels_to_model(model)
        assert len(report.skipped if whole else report.fused) == 3
        torch.testing.assert_close(model(x), y)


def test_a_layer_without_an_adapter_is_not_reported(x):
    loralib = pytest.importorskip("loralib")
    model = nn.Sequential(loralib.Linear(K, N), *model_of("loralib, merged").children())[:1]
    with pytest.raises(ValueError, match="has no LoRA layer of peft, loralib"):
        lora_kernels.apply_lora_kernels_to_model(model)
    assert model(x).shape == (2, 5, N)


@pytest.mark.parametrize("fault", judge.FAULTS)
@pytest.mark.parametrize("name", LAYERS)
def test_a_planted_fault_is_found(name, fault, x, monkeypatch):
    model = model_of(name)
    lora_kernels.apply_lora_kernels_to_model(model)
    monkeypatch.setattr(linears, "lora_linear", judge.FAULTS[fault])
    with pytest.raises(AssertionError):
        assert_right(model, x)
