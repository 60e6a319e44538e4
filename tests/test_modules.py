"""LoRALinear and apply_lora: the module around the operation, which other tests judge."""

import copy
import math
import pickle

import pytest
import torch
from torch import nn

from lora_kernels import LoRALinear, apply_lora, reference, trainable_parameters

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@pytest.fixture(autouse=True)
def eager(monkeypatch):
    monkeypatch.setenv("LORA_KERNELS_BACKEND", "eager")
    torch.manual_seed(0)


def layer_with_b(*args, **kwargs):
    """A layer whose adapter does something: B starts at zero."""
    layer = LoRALinear(*args, **kwargs)
    nn.init.normal_(layer.lora_B.weight)
    return layer


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.q_proj, self.v_proj = nn.Linear(8, 8), nn.Linear(8, 8)
        self.norm = nn.LayerNorm(8)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(8, 5)

    def get_output_embeddings(self):
        return self.head

    def forward(self, x):
        for layer in self.layers:
            x = layer.norm(x + layer.v_proj(layer.q_proj(x)))
        return self.head(x)


def adapted(model):
    return [name for name, module in model.named_modules() if isinstance(module, LoRALinear)]


def test_starts_as_the_base_layer():
    linear = nn.Linear(12, 7)
    layer = LoRALinear.from_linear(linear, r=3)
    x = torch.randn(2, 5, 12)
    torch.testing.assert_close(layer(x), linear(x))
    assert layer.lora_B.weight.count_nonzero() == 0
    bound = 1 / math.sqrt(12)  # Kaiming-uniform with a = sqrt(5), as nn.Linear and PEFT
    assert 0.5 * bound < layer.lora_A.weight.abs().max() <= bound


@pytest.mark.parametrize("use_rslora, scaling", [(False, 4.0), (True, 8.0)])
def test_forward_and_gradients_are_the_references(use_rslora, scaling):
    layer = layer_with_b(12, 7, r=4, lora_alpha=16, use_rslora=use_rslora, dtype=torch.float64)
    assert layer.scaling == scaling
    x = torch.randn(3, 12, dtype=torch.float64)
    a, b = layer.lora_A.weight, layer.lora_B.weight
    torch.testing.assert_close(layer(x), reference.lora_linear(x, layer.weight, a, b, scaling, layer.bias))
    dy = torch.randn(3, 7, dtype=torch.float64)
    layer(x).backward(dy)
    _, da, db, _ = reference.lora_linear_backward(dy, x, layer.weight, a, b, scaling)
    torch.testing.assert_close(a.grad, da)
    torch.testing.assert_close(b.grad, db)
    assert layer.weight.grad is None and layer.bias.grad is None


def test_bias_trains_when_asked():
    layer = LoRALinear(12, 7, r=4)
    layer.bias.requires_grad_(True)
    layer(torch.randn(3, 12)).sum().backward()
    torch.testing.assert_close(layer.bias.grad, torch.full((7,), 3.0))


def test_dropout_only_in_training():
    layer = layer_with_b(64, 7, r=4, lora_dropout=0.5)
    x = torch.randn(3, 64)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    torch.testing.assert_close(layer(x), layer_without_dropout(layer)(x))


def layer_without_dropout(layer):
    twin = copy.deepcopy(layer).train()
    twin.lora_dropout = 0.0
    return twin


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_adapter_dtype(dtype):
    layer = layer_with_b(12, 7, r=3, dtype=dtype)
    expected = torch.float64 if dtype == torch.float64 else torch.float32
    assert layer.lora_A.weight.dtype == layer.lora_B.weight.dtype == expected
    y = layer(torch.randn(2, 12, dtype=dtype))
    y.sum().backward()
    assert y.dtype == dtype and layer.lora_A.weight.grad.dtype == expected
    assert LoRALinear(4, 4, r=1, dtype=dtype, lora_dtype=dtype).lora_A.weight.dtype == dtype


def test_from_linear_shares_the_base():
    linear = nn.Linear(12, 7).eval()
    layer = LoRALinear.from_linear(linear, r=3)
    assert layer.weight is linear.weight and layer.bias is linear.bias and not layer.training
    assert not layer.weight.requires_grad and not layer.bias.requires_grad
    assert LoRALinear.from_linear(nn.Linear(12, 7, bias=False), r=3).bias is None


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_merge_and_unmerge(dtype):
    layer = layer_with_b(33, 17, r=3, lora_alpha=5, dtype=dtype)
    x = torch.randn(4, 33, dtype=dtype)
    unmerged, weight, state = layer(x), layer.weight.clone(), list(layer.state_dict())
    layer.merge()
    wide = layer.weight.double() + layer.scaling * (layer.lora_B.weight.double() @ layer.lora_A.weight.double())
    summed_in = torch.finfo(torch.promote_types(dtype, torch.float32))  # rounded once: half an ulp is eps / 2
    torch.testing.assert_close(
        layer.merged_weight.double(), wide, atol=8 * summed_in.eps, rtol=0.51 * torch.finfo(dtype).eps
    )
    assert torch.equal(layer(x), nn.functional.linear(x, layer.merged_weight, layer.bias))
    torch.testing.assert_close(layer(x), unmerged, atol=64 * torch.finfo(dtype).eps, rtol=64 * torch.finfo(dtype).eps)
    assert list(layer.state_dict()) == state and torch.equal(layer.state_dict()["weight"], weight)
    layer.unmerge()
    assert torch.equal(layer.weight, weight) and torch.equal(layer(x), unmerged)


def test_merging_leaves_a_tied_weight_alone():
    linear = nn.Linear(8, 8)
    before = linear.weight.clone()
    layer = LoRALinear.from_linear(linear, r=2)
    nn.init.ones_(layer.lora_B.weight)
    layer.merge()
    assert torch.equal(linear.weight, before)


def test_merge_errors():
    layer = layer_with_b(8, 8, r=2)
    with pytest.raises(RuntimeError, match=r"unmerge: .*not merged"):
        layer.unmerge()
    layer.merge()
    with pytest.raises(RuntimeError, match=r"merge: .*merged already"):
        layer.merge()
    layer.unmerge()
    layer.lora_A.weight.data[0, 0] = math.nan
    with pytest.raises(ValueError, match="NaN or Inf"):
        layer.merge()
    assert not layer.merged
    layer.lora_A.weight.data = layer.weight.data[:2]
    with pytest.raises(ValueError, match=r"lora_A\.weight shares its storage"):
        layer.merge()


def test_merge_refuses_overflow():
    layer = LoRALinear(8, 8, r=2, dtype=torch.float16)
    layer.lora_A.weight.data.fill_(1e3)
    layer.lora_B.weight.data.fill_(1e3)
    with pytest.raises(ValueError, match=r"NaN or Inf in torch\.float16"):
        layer.merge()


@pytest.mark.parametrize("merged", [False, True])
def test_copies(merged):
    layer = layer_with_b(12, 7, r=3, lora_alpha=5, lora_dropout=0.1).eval()
    if merged:
        layer.merge()
    x = torch.randn(2, 12)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(twin(x), layer(x)) and twin.merged == merged
        assert twin.weight.data_ptr() != layer.weight.data_ptr()
    other = LoRALinear(12, 7, r=3, lora_alpha=5).eval()
    other.load_state_dict(layer.state_dict())
    if merged:
        other.merge()
    assert torch.equal(other(x), layer(x))


def test_state_dict_and_repr():
    layer = LoRALinear(12, 7, r=3, lora_alpha=5)
    assert list(layer.state_dict()) == ["weight", "bias", "lora_A.weight", "lora_B.weight"]
    assert "in_features=12, out_features=7, bias=True, r=3, lora_alpha=5, lora_dropout=0.0" in repr(layer)


def test_to_moves_the_merged_weight():
    layer = layer_with_b(12, 7, r=3)
    layer.merge()
    layer.to(torch.float64)
    assert layer(torch.randn(2, 12, dtype=torch.float64)).dtype == torch.float64


def test_meta_device():
    layer = LoRALinear(12, 7, r=3, device="meta")
    assert {parameter.device.type for parameter in layer.parameters()} == {"meta"}


@pytest.mark.parametrize(
    "kwargs, error, message",
    [
        ({"r": 0}, ValueError, "r: got 0"),
        ({"r": 513}, ValueError, "r: got 513"),
        ({"r": 2.0}, TypeError, "r: got float"),
        ({"r": True}, TypeError, "r: got bool"),
        ({"lora_alpha": math.nan}, ValueError, "lora_alpha: got nan"),
        ({"lora_alpha": -1}, ValueError, "lora_alpha: got -1"),
        ({"lora_alpha": "8"}, TypeError, "lora_alpha: got str"),
        ({"lora_dropout": 1.0}, ValueError, r"lora_dropout: got 1\.0"),
        ({"lora_dropout": -0.1}, ValueError, r"lora_dropout: got -0\.1"),
    ],
)
def test_bad_arguments(kwargs, error, message):
    with pytest.raises(error, match=message):
        LoRALinear(8, 8, **({"r": 2} | kwargs))
    model = Model()
    with pytest.raises(error, match=message):
        apply_lora(model, ["q_proj"], **({"r": 2} | kwargs))
    assert not adapted(model)


def test_from_linear_refuses_subclasses():
    with pytest.raises(TypeError, match="linear: got NonDynamicallyQuantizableLinear"):
        LoRALinear.from_linear(nn.MultiheadAttention(8, 2).out_proj, r=2)


@pytest.mark.parametrize(
    "target_modules, expected",
    [
        (["q_proj"], ["layers.0.q_proj", "layers.1.q_proj"]),
        (["0.q_proj", "head"], ["layers.0.q_proj", "head"]),
        (["layers.1.v_proj"], ["layers.1.v_proj"]),
        (r"layers\.1\..*_proj", ["layers.1.q_proj", "layers.1.v_proj"]),
        ("head", ["head"]),
        ("all-linear", [f"layers.{i}.{name}_proj" for i in (0, 1) for name in "qv"]),
    ],
)
def test_target_modules(target_modules, expected):
    model = Model()
    assert apply_lora(model, target_modules, r=2) is model
    assert adapted(model) == expected
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {f"{name}.lora_{which}.weight" for name in expected for which in "AB"}


@pytest.mark.parametrize("target_modules", [["q_proj"], ["0.q_proj"], r".*\.[qv]_proj", "all-linear"], ids=str)
def test_targets_are_pefts(target_modules):
    peft = pytest.importorskip("peft")
    theirs = peft.inject_adapter_in_model(peft.LoraConfig(target_modules=target_modules, r=2), Model())
    names = [name for name, module in theirs.named_modules() if isinstance(module, peft.tuners.lora.Linear)]
    expected = [name for name in names if name != "head" or target_modules != "all-linear"]  # known to PEFT by type
    assert adapted(apply_lora(Model(), target_modules, r=2)) == expected


@pytest.mark.parametrize(
    "target_modules, error, message",
    [
        (["q_porj"], ValueError, r"\['q_porj'\] match no layer .*did you mean q_proj"),
        (["q_proj", "w"], ValueError, r"\['w'\] match no layer .*called q_proj, v_proj, head"),
        ("q_proj", ValueError, "match no layer .*did you mean q_proj"),
        ([], ValueError, "empty list"),
        (["norm"], TypeError, r"layers\.0\.norm: got LayerNorm"),
    ],
)
def test_bad_targets_change_nothing(target_modules, error, message):
    model = Model()
    with pytest.raises(error, match=message):
        apply_lora(model, target_modules, r=2)
    assert not adapted(model) and all(parameter.requires_grad for parameter in model.parameters())


def test_no_linear_at_all():
    for model in (nn.LayerNorm(8), nn.Linear(8, 8), LoRALinear(8, 8, r=2)):
        with pytest.raises(ValueError, match=r"holds no nn\.Linear"):
            apply_lora(model, r=2)


def test_applied_twice():
    model = apply_lora(Model(), ["q_proj"], r=2)
    with pytest.raises(ValueError, match=r"layers\.0\.q_proj has an adapter already"):
        apply_lora(model, ["q_proj"], r=2)
    apply_lora(model, "all-linear", r=4)
    assert model.layers[0].q_proj.r == 2 and model.layers[0].v_proj.r == 4
    assert len(trainable_parameters(model).parameters) == 8


def test_a_shared_layer_gets_one_adapter():
    linear = nn.Linear(8, 8)
    model = apply_lora(nn.Sequential(linear, nn.ReLU(), linear), ["0"], r=2)
    assert model[0] is model[2] and isinstance(model[0], LoRALinear)


def test_trainable_parameters():
    model = apply_lora(Model(), "all-linear", r=2)
    trainable = trainable_parameters(model)
    assert trainable.count == 4 * (2 * 8 + 8 * 2)
    assert trainable.total == trainable.count + sum(parameter.numel() for parameter in Model().parameters())
    assert str(trainable) == "128 of 493 parameters train (25.96%)"
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = torch.optim.SGD(trainable.parameters, lr=1.0)
    model(torch.randn(4, 8)).square().mean().backward()
    optimizer.step()
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {name for name in before if "lora_B" in name}  # A has no gradient while B is zero
