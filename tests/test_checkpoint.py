"""Adapter files: PEFT reads ours, we read PEFT's, and a bad file changes nothing."""

import json
import math

import pytest
import torch
from torch import nn

from lora_kernels import LoRALinear, apply_lora, load_adapter, save_adapter
from lora_kernels.adapters import checkpoint

safetensors = pytest.importorskip("safetensors.torch")

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


@pytest.fixture(autouse=True)
def eager(monkeypatch):
    monkeypatch.setenv("LORA_KERNELS_BACKEND", "eager")
    torch.manual_seed(0)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.q_proj, self.v_proj = nn.Linear(8, 8), nn.Linear(8, 8, bias=False)

    def forward(self, x):
        return x + self.v_proj(self.q_proj(x).relu())


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers, self.head = nn.Sequential(Block(), Block()), nn.Linear(8, 5)
        with torch.random.fork_rng():
            torch.manual_seed(1)  # the base model of every test
            for parameter in self.parameters():
                nn.init.normal_(parameter, std=0.5)

    def forward(self, x):
        return self.head(self.layers(x))


def randomised(model):
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter.data)
    return model


def ours(targets=("q_proj", "v_proj"), **kwargs):
    return randomised(apply_lora(Model(), targets, **({"r": 2, "lora_alpha": 6} | kwargs)))


def assert_same_outputs(model, expected):
    x = torch.randn(3, 8, dtype=torch.float64)
    torch.testing.assert_close(model.eval().double()(x), expected.eval().double()(x))


def snapshot(model):
    values = {name: value.clone() for name, value in model.state_dict().items()}
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    return values, flags, repr(model)


def assert_unchanged(model, before):
    values, flags, text = snapshot(model)
    assert values.keys() == before[0].keys() and flags == before[1] and text == before[2]
    assert all(torch.equal(values[name], before[0][name]) for name in values)


def mixed_ranks():
    model = ours(["q_proj"], r=2, lora_alpha=6)
    apply_lora(model, ["layers.1.v_proj"], r=5, lora_alpha=7)
    apply_lora(model, ["head"], r=3, lora_alpha=6)
    return randomised(model)


MODELS = {
    "plain": ours,
    "rslora": lambda: ours(use_rslora=True),
    "dropout": lambda: ours(lora_dropout=0.25),
    "some": lambda: ours(["layers.1.q_proj"]),
    "mixed": mixed_ranks,
    "bfloat16": lambda: ours(lora_dtype=torch.bfloat16),
}


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_round_trip(make, tmp_path):
    model = make()
    save_adapter(model, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [CONFIG, WEIGHTS]
    loaded = load_adapter(Model(), tmp_path)
    assert repr(loaded) == repr(model)
    trained = {name for name, parameter in loaded.named_parameters() if parameter.requires_grad}
    assert trained == {name for name in loaded.state_dict() if "lora_" in name}
    assert_same_outputs(loaded, model)


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_peft_loads_ours(make, tmp_path):
    peft = pytest.importorskip("peft")
    model = make()
    save_adapter(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(Model(), tmp_path)
    x = torch.randn(3, 8)
    assert (theirs(x) - Model()(x)).abs().max() > 0.01
    assert_same_outputs(theirs, model)


@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"use_rslora": True, "lora_dropout": 0.25},
        {"target_modules": r"layers\.[01]\.q_proj"},
        {"target_modules": "all-linear", "exclude_modules": ["head"]},
        {
            "rank_pattern": {"v_proj": 5},
            "alpha_pattern": {"layers.0.q_proj": 3, "^layers.1.v_proj": 9, r"1\.q_proj": 2},
        },
        {"rank_pattern": {"1.q_proj": 3, "layers.1.q_proj": 5}, "alpha_pattern": {"layers.1.q_proj": 3, "q_proj": 5}},
        {"alpha_pattern": {"0.q_proj": 3, r"0\.q_proj": 5}},
        {"init_lora_weights": "gaussian"},
    ],
    ids=str,
)
@pytest.mark.parametrize("into", ["plain", "adapted"])
def test_we_load_pefts(kwargs, into, tmp_path):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(**({"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj"]} | kwargs))
    theirs = randomised(peft.get_peft_model(Model(), config))
    theirs.save_pretrained(tmp_path)
    model = load_adapter(Model(), tmp_path)
    if into == "adapted":
        model = load_adapter(randomised(model), tmp_path)
    assert_same_outputs(model, theirs)
    assert model.layers[0].q_proj.lora_dropout == kwargs.get("lora_dropout", 0.0)


def test_loads_into_existing_layers(tmp_path):
    save_adapter(ours(lora_alpha=6), tmp_path)
    model = ours(lora_alpha=1, lora_dropout=0.5)
    layers = [module for module in model.modules() if isinstance(module, LoRALinear)]
    load_adapter(model, tmp_path)
    assert [module for module in model.modules() if isinstance(module, LoRALinear)] == layers
    assert layers[0].lora_alpha == 6 and layers[0].lora_dropout == 0.0


def test_bf16_base_gets_fp32_adapters(tmp_path):
    save_adapter(ours(), tmp_path)
    model = load_adapter(Model().bfloat16(), tmp_path)
    assert model.layers[0].q_proj.lora_A.weight.dtype == torch.float32
    assert model.layers[0].q_proj.weight.dtype == torch.bfloat16


def test_a_shared_layer(tmp_path):
    def make():
        linear = nn.Linear(8, 8)
        return nn.Sequential(linear, nn.ReLU(), linear)

    save_adapter(randomised(apply_lora(make(), ["0"], r=2)), tmp_path)
    model = load_adapter(make(), tmp_path)
    assert model[0] is model[2] and isinstance(model[0], LoRALinear)


def test_save_replaces_and_keeps_other_files(tmp_path):
    (tmp_path / "README.md").write_text("mine")
    save_adapter(ours(r=4), tmp_path)
    save_adapter(ours(r=2), tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["README.md", CONFIG, WEIGHTS]
    assert load_adapter(Model(), tmp_path).layers[0].q_proj.r == 2


def test_a_failed_save_leaves_the_old_files(tmp_path, monkeypatch):
    save_adapter(ours(), tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    monkeypatch.setattr(checkpoint.json, "dumps", lambda *args, **kwargs: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        save_adapter(ours(), tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_saving_merged_layers_saves_the_adapter(tmp_path):
    model = ours().double()
    for layer in (model.layers[0].q_proj, model.layers[1].v_proj):
        layer.merge()
    save_adapter(model, tmp_path)
    assert_same_outputs(load_adapter(Model().double(), tmp_path), model)


def test_save_errors(tmp_path):
    with pytest.raises(ValueError, match="no LoRALinear layer"):
        save_adapter(Model(), tmp_path)
    with pytest.raises(ValueError, match="is a LoRALinear itself"):
        save_adapter(LoRALinear(8, 8, r=2), tmp_path)
    model = ours()
    model.layers[0].q_proj.use_rslora = True
    with pytest.raises(ValueError, match="differ in use_rslora"):
        save_adapter(model, tmp_path)
    assert not list(tmp_path.iterdir())


def edit_config(directory, **fields):
    path = directory / CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


Q = "base_model.model.layers.0.q_proj"
BAD_CONFIGS = [
    ({"peft_type": "ADALORA"}, NotImplementedError, "peft_type is 'ADALORA'"),
    ({"peft_type": None}, NotImplementedError, "peft_type is None"),
    ({"bias": "all"}, NotImplementedError, "bias is 'all'"),
    ({"use_dora": True}, NotImplementedError, "use_dora is True"),
    ({"lora_bias": True}, NotImplementedError, "lora_bias is True"),
    ({"fan_in_fan_out": True}, NotImplementedError, "fan_in_fan_out is True"),
    ({"modules_to_save": ["head"]}, NotImplementedError, "modules_to_save is "),
    ({"layers_to_transform": [0]}, NotImplementedError, "layers_to_transform is "),
    ({"layer_replication": [[0, 1]]}, NotImplementedError, "layer_replication is "),
    ({"trainable_token_indices": [3]}, NotImplementedError, "trainable_token_indices is "),
    ({"target_parameters": ["w"]}, NotImplementedError, "target_parameters is "),
    ({"init_lora_weights": "pissa"}, NotImplementedError, "init_lora_weights is 'pissa'"),
    ({"init_lora_weights": ["x"]}, NotImplementedError, "init_lora_weights is "),
    ({"of_the_future": 1}, NotImplementedError, "of_the_future is 1"),
    ({"alpha_pattern": {"(a+)+$": 3}}, NotImplementedError, "alpha_pattern has .* only plain names"),
    ({"alpha_pattern": [1]}, ValueError, "alpha_pattern is "),
    ({"alpha_pattern": {"q_proj": "3"}}, ValueError, r"layers\.0\.q_proj': lora_alpha: got str"),
    ({"rank_pattern": {"q_proj": 10**9}}, ValueError, r"layers\.0\.q_proj': r: got 1000000000"),
    ({"rank_pattern": {"q_proj": 3}}, ValueError, r"q_proj has lora_A \[2, 8\] .*expected \[3, 8\]"),
    ({"r": 3}, ValueError, r"q_proj has lora_A \[2, 8\] .*expected \[3, 8\]"),
    ({"r": None}, ValueError, "r: got NoneType"),
    ({"r": True}, ValueError, "r: got bool"),
    ({"r": -1}, ValueError, "r: got -1"),
    ({"lora_alpha": math.nan}, ValueError, "lora_alpha: got nan"),
    ({"lora_alpha": 10**400}, ValueError, "too large"),
    ({"lora_alpha": [8]}, ValueError, "lora_alpha: got list"),
    ({"lora_dropout": 1.5}, ValueError, r"lora_dropout: got 1\.5"),
    ({"use_rslora": "yes"}, ValueError, "use_rslora is 'yes'"),
    ({"target_modules": None}, ValueError, "target_modules is None"),
    ({"target_modules": [1]}, ValueError, r"target_modules is \[1\]"),
    ({"target_modules": ["q_proj", "v_proj", "head"]}, ValueError, "no tensors for head"),
]


@pytest.mark.parametrize("fields, error, message", BAD_CONFIGS, ids=[str(row[0])[:40] for row in BAD_CONFIGS])
@pytest.mark.parametrize("make", [Model, ours], ids=["plain", "adapted"])
def test_bad_config_changes_nothing(make, fields, error, message, tmp_path):
    save_adapter(ours(), tmp_path)
    edit_config(tmp_path, **fields)
    model = make()
    before = snapshot(model)
    with pytest.raises(error, match=message):
        load_adapter(model, tmp_path)
    assert_unchanged(model, before)


BAD_TENSORS = [
    ({f"{Q}.lora_A.weight": torch.zeros(2, 9)}, r"q_proj has lora_A \[2, 9\]"),
    ({f"{Q}.lora_B.weight": torch.zeros(2, 8)}, r"lora_B \[2, 8\], expected .* \[8, 2\]"),
    ({f"{Q}.lora_B.weight": torch.zeros(8, 2, 1)}, r"lora_B \[8, 2, 1\]"),
    ({f"{Q}.lora_A.weight": torch.zeros(2, 8, dtype=torch.int64)}, r"is torch\.int64"),
    ({f"{Q}.lora_A.weight": None}, r"layers\.0\.q_proj' has only one of lora_A and lora_B"),
    ({f"{Q}.lora_A.weight": None, f"{Q}.lora_B.weight": None}, r"no tensors for layers\.0\.q_proj"),
    ({f"{Q}.lora_A.bias": torch.zeros(2)}, r"holds 'base_model.*lora_A\.bias', expected only"),
    ({f"{Q}.lora_magnitude_vector": torch.zeros(8)}, "lora_magnitude_vector', expected only"),
    ({"layers.0.q_proj.weight": torch.zeros(8, 8)}, r"holds 'layers\.0\.q_proj\.weight', expected only"),
    ({"base_model.model.x.lora_A.weight": torch.zeros(2, 8), "base_model.model.x.lora_B.weight": torch.zeros(8, 2)},
     "no nn.Linear 'x'"),
    ({f"{Q}.lora_A.lora_A.weight": torch.zeros(2, 8), f"{Q}.lora_A.lora_B.weight": torch.zeros(2, 2)},
     r"no nn.Linear 'layers\.0\.q_proj\.lora_A'"),
]  # fmt: skip


@pytest.mark.parametrize("tensors, message", BAD_TENSORS, ids=[row[1][:30] for row in BAD_TENSORS])
@pytest.mark.parametrize("make", [Model, ours], ids=["plain", "adapted"])
def test_bad_tensors_change_nothing(make, tensors, message, tmp_path):
    save_adapter(ours(), tmp_path)
    edited = {**safetensors.load_file(tmp_path / WEIGHTS), **tensors}
    safetensors.save_file({name: tensor for name, tensor in edited.items() if tensor is not None}, tmp_path / WEIGHTS)
    model = make()
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        load_adapter(model, tmp_path)
    assert_unchanged(model, before)


def test_wrong_model_changes_nothing(tmp_path):
    save_adapter(ours(["layers.0.q_proj"]), tmp_path)
    merged = ours(["layers.0.q_proj"])
    merged.layers[0].q_proj.merge()
    for model, error, message in (
        (ours(["layers.0.q_proj"], r=3), ValueError, "expected|rank 3"),
        (ours(["layers.0.q_proj", "head"]), ValueError, "no tensors for head"),
        (merged, RuntimeError, "is merged"),
        (nn.Sequential(nn.Linear(8, 8)), ValueError, r"no nn\.Linear 'layers\.0\.q_proj'"),
    ):
        before = snapshot(model)
        with pytest.raises(error, match=message):
            load_adapter(model, tmp_path)
        assert_unchanged(model, before)


def test_one_layer_under_two_names_takes_one_adapter(tmp_path):
    save_adapter(randomised(apply_lora(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), ["0", "1"], r=2)), tmp_path)
    linear = nn.Linear(8, 8)
    model = nn.Sequential(linear, linear)
    before = snapshot(model)
    with pytest.raises(ValueError, match="one layer under two names"):
        load_adapter(model, tmp_path)
    assert_unchanged(model, before)


def test_missing_and_broken_files(tmp_path):
    with pytest.raises(FileNotFoundError, match=CONFIG):
        load_adapter(Model(), tmp_path)
    save_adapter(ours(), tmp_path)
    weights = tmp_path / WEIGHTS
    good = weights.read_bytes()
    for bad in (b"", b"\x80\x04pickle", good[:-1], good[:100], b"\xff" * 200, good[:8] + b"[" * 5000):
        weights.write_bytes(bad)
        with pytest.raises(ValueError, match="not a safetensors file"):
            load_adapter(Model(), tmp_path)
    weights.unlink()
    with pytest.raises(FileNotFoundError, match=WEIGHTS):
        load_adapter(Model(), tmp_path)
    (tmp_path / "adapter_model.bin").write_bytes(b"")
    with pytest.raises(ValueError, match=r"pickle .*safe_serialization=True"):
        load_adapter(Model(), tmp_path)
    for bad in (b"{", b"\xff", b"[]", b"[" * 100_000):
        (tmp_path / CONFIG).write_bytes(bad)
        with pytest.raises(ValueError, match=r"not valid JSON|got a list"):
            load_adapter(Model(), tmp_path)


def test_a_hostile_regular_expression_is_not_run(tmp_path):
    save_adapter(ours(["q_proj"]), tmp_path)
    edit_config(tmp_path, target_modules="(.*)*" * 20 + "$x")  # matching this would take longer than the universe has
    assert load_adapter(Model(), tmp_path).layers[1].q_proj.r == 2
