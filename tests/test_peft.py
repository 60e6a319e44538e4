# ruff: noqa: E402
"""PEFT's models run fused, and go on being PEFT's: each test is a row of docs/integrations.md."""

import copy
import io
import pickle
import warnings

import pytest
import torch
from torch import nn

peft = pytest.importorskip("peft")

from conftest import DEVICE
from features import FUSED, feature
from peft import PeftModel, get_peft_model
from peft.tuners.lora.layer import Linear
from peft_judge.cases import AT_16_BITS, CLOSE, K, Net, assert_same, config, peft_model, step

import lora_kernels
from lora_kernels.integrations.peft import FusedLinear

pytest_plugins = ["peft_judge.cases"]
pytestmark = pytest.mark.usefixtures("as_before", "judge")


@feature("forward and backward", FUSED)
def test_forward_and_backward(x):
    model = peft_model()
    report = lora_kernels.apply_lora_kernels_to_model(model)
    assert report.fused == ["base_model.model.up"] and not report.skipped
    assert str(report).splitlines()[0] == "1 of 1 adapted layers run fused"
    assert_same(model, x)


@feature("transformers' `Conv1D` (`fan_in_fan_out`)", FUSED)
def test_conv1d(x):
    model = peft_model(config(["down"], fan_in_fan_out=True))
    lora_kernels.apply_lora_kernels_to_model(model)
    assert_same(model, x)


@feature("rsLoRA, `rank_pattern`, `alpha_pattern`", FUSED)
def test_rslora_and_patterns(x):
    model = peft_model(
        config(["up", "down"], use_rslora=True, rank_pattern={"down": 7}, alpha_pattern={"up": 3}, fan_in_fan_out=True)
    )
    lora_kernels.apply_lora_kernels_to_model(model)
    assert_same(model, x)


@feature('a trained bias of the base layer (`bias="lora_only"`)', FUSED)
def test_trained_bias(x):
    model = peft_model(config(bias="lora_only"))
    lora_kernels.apply_lora_kernels_to_model(model)
    assert "base_model.model.up.base_layer.bias" in step(model, x)[1]
    assert_same(model, x)


@feature("`lora_bias`, of several adapters too", FUSED)
@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16])
def test_lora_bias(x, base):
    model = peft_model(config(["up", "down"], lora_bias=True, fan_in_fan_out=True), Net().to(base))
    model.add_adapter("other", config(["up"], lora_bias=True, lora_dropout=0.3))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter)
    model.base_model.model.up.base_layer.bias = None
    lora_kernels.apply_lora_kernels_to_model(model)
    for active in ("default", "other", ["default", "other"]):
        model.base_model.set_adapter(active)
        model.train(active == "other")
        if active == "other":  # other random numbers than PEFT's
            step(model, x.to(base))
        else:
            assert_same(model, x.to(base), CLOSE if base == torch.float32 else AT_16_BITS)


@feature("dropout in training (other random numbers than PEFT's)", FUSED)
def test_dropout(x, judge):
    model = peft_model(config(lora_dropout=0.4)).train()
    lora_kernels.apply_lora_kernels_to_model(model)
    first, second = (step(model, x)[0] for _ in range(2))
    assert not torch.equal(first, second)
    torch.manual_seed(3)
    again = model(x)
    torch.manual_seed(3)
    assert torch.equal(again, model(x))
    with torch.no_grad():
        layer = model.base_model.model.up
        many = layer(x[:1, :1].expand(1, 4000, K))
        layer.eval()
        torch.testing.assert_close(many.mean(1), layer(x[:1, 0]), rtol=0.1, atol=0.1)


@feature("bf16 base, fp32 adapters", FUSED)
def test_bf16_base_with_fp32_adapters(x):
    model = peft_model(base=Net().bfloat16())
    assert model.base_model.model.up.lora_A.default.weight.dtype == torch.float32
    lora_kernels.apply_lora_kernels_to_model(model)
    assert_same(model, x.bfloat16(), AT_16_BITS)


@feature("autocast", FUSED)
@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16])
def test_autocast(x, base):
    model = peft_model(base=Net().to(base))
    lora_kernels.apply_lora_kernels_to_model(model)
    with torch.autocast(DEVICE, torch.bfloat16):
        assert model(x).dtype == torch.bfloat16
        assert_same(model, x, AT_16_BITS)


@feature("gradient checkpointing, re-entrant or not, with dropout", FUSED)
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(x, reentrant):
    plain, checkpointed = (
        peft_model(config(lora_dropout=0.3), Net(checkpointing))
        for checkpointing in (None, {"use_reentrant": reentrant})
    )
    gradients = []
    for model in (plain, checkpointed):
        lora_kernels.apply_lora_kernels_to_model(model)
        torch.manual_seed(4)
        model(x.clone().requires_grad_()).square().sum().backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@feature("save, load in PEFT alone, and back", FUSED)
def test_save_and_load(x, tmp_path):
    model = peft_model()
    before = list(model.state_dict())
    lora_kernels.apply_lora_kernels_to_model(model)
    assert list(model.state_dict()) == before
    y = model(x)
    model.save_pretrained(tmp_path)
    theirs = PeftModel.from_pretrained(Net(), tmp_path)
    assert type(theirs.base_model.model.up) is Linear
    torch.testing.assert_close(theirs(x), y)
    with lora_kernels.patch_peft():
        back = PeftModel.from_pretrained(Net(), tmp_path)
    assert type(back.base_model.model.up) is FusedLinear
    assert torch.equal(back(x), y)


@feature("`merge_adapter`, `unmerge_adapter`, `merge_and_unload`", FUSED)
@pytest.mark.parametrize("safe", [True, False])
def test_merge(x, safe):
    model = peft_model(config(["up", "down"], fan_in_fan_out=True))
    lora_kernels.apply_lora_kernels_to_model(model)
    y = model(x)
    model.merge_adapter(safe_merge=safe)
    torch.testing.assert_close(model(x), y)
    model.unmerge_adapter()
    torch.testing.assert_close(model(x), y)
    merged = model.merge_and_unload(safe_merge=safe)
    assert type(merged.up) is nn.Linear
    torch.testing.assert_close(merged(x), y)


@feature("several adapters, switched, deleted", FUSED)
def test_switched_adapters(x):
    model = peft_model()
    lora_kernels.apply_lora_kernels_to_model(model)
    first = model(x)
    model.add_adapter("other", config(r=3))
    model.set_adapter("other")
    assert not torch.allclose(model(x), first)
    assert_same(model, x)
    model.set_adapter("default")
    torch.testing.assert_close(model(x), first)
    model.delete_adapter("other")
    torch.testing.assert_close(model(x), first)


@feature("several adapters active at once", FUSED)
def test_several_active_adapters(x):
    model = peft_model()
    model.add_adapter("other", config(r=3, lora_alpha=1))
    model.add_adapter("third", config(["down"], fan_in_fan_out=True))
    model.base_model.set_adapter(["default", "other", "third"])
    lora_kernels.apply_lora_kernels_to_model(model)
    assert sum("lora_A" in name for name in step(model, x)[1]) == 3
    assert_same(model, x)


@feature("`disable_adapter`", FUSED)
def test_disabled_adapter(x):
    model = peft_model()
    lora_kernels.apply_lora_kernels_to_model(model)
    y = model(x)
    with model.disable_adapter():
        assert torch.equal(model(x), Net()(x))
    assert torch.equal(model(x), y)


@feature("`adapter_names`: a batch of mixed adapters (inference)", FUSED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mixed_batch(x, dtype, judge):
    model = peft_model(base=Net().to(dtype)).eval()
    model.add_adapter("other", config(["up", "down"], r=3, lora_alpha=1, fan_in_fan_out=True))
    lora_kernels.apply_lora_kernels_to_model(model)
    names = ["other", "__base__", "default", "other"]
    x = torch.randn(4, 5, K, dtype=dtype)
    with torch.inference_mode():
        y = model(x, adapter_names=names)
        assert judge.mixed == 2
        base = Net().to(dtype)(x)
        torch.testing.assert_close(y[1], base[1])
        model.base_model.model.up.scaling["other"] *= 2  # nothing is remembered
        model.base_model.model.up.lora_A["other"].weight.data.mul_(2)
        assert not torch.allclose(model(x, adapter_names=names)[0], y[0])
        torch.testing.assert_close(model(x, adapter_names=names)[2], y[2])
    with pytest.raises(ValueError, match="Length of `adapter_names`"):
        model(x, adapter_names=names[:2])


@feature("hot swap, and a scaling that changes (float, tensor, negative, trained)", FUSED)
def test_hotswap_and_changing_scaling(x, tmp_path):
    from peft.utils.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap

    torch.manual_seed(6)
    get_peft_model(Net(), config(r=3, lora_alpha=9)).save_pretrained(tmp_path)
    model = peft_model()
    lora_kernels.apply_lora_kernels_to_model(model)
    layer = model.base_model.model.up
    base = Net()(x)
    model(x)
    for scale in (2.0, 0.0, -1.5):
        layer.set_scale("default", scale)
        assert_same(model, x)
    layer.set_scale("default", 0.0)
    assert torch.equal(model(x), base)
    layer.scaling["default"] = torch.tensor(0.7, requires_grad=True)
    model(x).sum().backward()
    assert layer.scaling["default"].grad != 0
    layer.unscale_layer()
    with warnings.catch_warnings(action="ignore"):
        prepare_model_for_compiled_hotswap(model, target_rank=8)
    assert isinstance(layer.scaling["default"], torch.Tensor)
    assert_same(model, x)
    hotswap_adapter(model, tmp_path, "default")
    torch.testing.assert_close(model(x), PeftModel.from_pretrained(Net(), tmp_path)(x))


@feature("`modules_to_save`", FUSED)
def test_modules_to_save(x):
    model = peft_model(config(modules_to_save=["head"]))
    lora_kernels.apply_lora_kernels_to_model(model)
    assert any("modules_to_save" in name for name in step(model, x)[1])
    assert_same(model, x)


@feature("hooks on the layer", FUSED)
def test_hooks_on_the_layer(x):
    model = peft_model()
    lora_kernels.apply_lora_kernels_to_model(model)
    seen = []
    layer = model.base_model.model.up
    layer.register_forward_hook(lambda module, inputs, output: seen.append("forward"))
    layer.register_full_backward_hook(lambda module, *_: seen.append("backward"))
    model(x.requires_grad_()).sum().backward()
    assert seen == ["forward", "backward"]


@feature("`deepcopy` and `pickle`", FUSED)
def test_deepcopy_and_pickle(x):
    model = peft_model()
    lora_kernels.apply_lora_kernels_to_model(model)
    y = model(x)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    for other in (
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        torch.load(io.BytesIO(buffer.getvalue()), weights_only=False),
    ):
        layer = other.base_model.model.up
        assert type(layer) is FusedLinear and torch.equal(other(x), y)
        layer.lora_B.default.weight.data.zero_()
        assert torch.equal(model(x), y)


@feature("`torch.compile(fullgraph=True)`, forward and backward", f"{FUSED} (one operator)")
def test_compile_fullgraph(x):
    """What is compiled cannot be judged call by call."""
    model = peft_model(config(["up", "down"], fan_in_fan_out=True))
    model.add_adapter("other", config(r=3))
    lora_kernels.apply_lora_kernels_to_model(model)
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(model, fullgraph=True, backend=backend)
    for active in ("default", "other", ["default", "other"]):
        model.base_model.set_adapter(active)
        (y, gradients), (expected, expected_gradients) = step(compiled, x), step(model, x)
        torch.testing.assert_close(y, expected)
        for got, wanted in zip(gradients.values(), expected_gradients.values(), strict=True):
            torch.testing.assert_close(got, wanted)
        fused = [str(node.target) for node in graphs[-1].graph.nodes]
        assert any(name.startswith("lora_kernels.lora_linear") for name in fused), fused


@feature("adapters added later, to other layers too", FUSED)
def test_adapters_added_later(x):
    model = peft_model()
    lora_kernels.apply_lora_kernels_to_model(model)
    model.add_adapter("wide", config(["up", "down"], fan_in_fan_out=True))
    model.set_adapter("wide")
    assert isinstance(model.base_model.model.down, FusedLinear)
    assert_same(model, x)
    assert type(peft_model().base_model.model.up) is Linear


@feature("`inject_adapter_in_model`, `PeftMixedModel`, under `patch_peft`", FUSED)
def test_patch_peft(x):
    with lora_kernels.patch_peft():
        with lora_kernels.patch_peft():
            pass
        models = [
            peft_model(),
            peft.inject_adapter_in_model(config(), Net()),
            peft.PeftMixedModel(Net(), config(), "default"),
        ]
    lora_kernels.patch_peft()
    models.append(peft_model())
    lora_kernels.unpatch_peft()
    for model in models:
        assert sum(type(module) is FusedLinear for module in model.modules()) == 1
        model(x)
    assert type(peft_model().base_model.model.up) is Linear


@feature("a result that is changed in place", FUSED)
def test_in_place_consumer(x):
    model = peft_model()
    lora_kernels.apply_lora_kernels_to_model(model)
    y = model.base_model.model.up(x)
    y += 1
    y.sum().backward()


def test_repr_names_peft_s_layer():
    model = peft_model()
    theirs = repr(model)
    lora_kernels.apply_lora_kernels_to_model(model)
    assert repr(model).replace("fused by lora_kernels", "") != theirs != repr(model)
    assert {status.module_type for status in model.get_layer_status()} == {"lora.Linear"}
