# ruff: noqa: E402
"""diffusers: rows of docs/integrations.md. Its models hold PEFT's layers, and scale them for one call at a time."""

import pytest
import torch
from torch import nn

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("as_before", "judge")]
diffusers = pytest.importorskip("diffusers")
pytest.importorskip("peft")
pytest_plugins = ["peft_judge.cases"]

from conftest import DEVICE
from features import EXACT, FUSED, feature
from peft_judge import judge as faults
from peft_judge.cases import CLOSE, assert_same, config

import lora_kernels

TARGETS = ("to_q", "to_k", "to_v", "to_out.0")
KINDS = ("unet", "flux")


def unet():
    blocks = ("DownBlock2D", "CrossAttnDownBlock2D"), ("CrossAttnUpBlock2D", "UpBlock2D")
    return diffusers.UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=(8, 16), norm_num_groups=4,
        down_block_types=blocks[0], up_block_types=blocks[1], cross_attention_dim=24, attention_head_dim=8,
    )  # fmt: skip


def flux():
    return diffusers.FluxTransformer2DModel(
        in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=24, pooled_projection_dim=12, axes_dims_rope=(4, 4, 8),
    )  # fmt: skip


class Denoiser(nn.Module):
    """A model of diffusers as a function of x alone; `scale` is what a pipeline passes on with a call."""

    def __init__(self, kind, *adapters, targets=TARGETS):
        super().__init__()
        torch.manual_seed(1)
        self.model, self.scale = {"unet": unet, "flux": flux}[kind](), None
        self.text, self.pooled = torch.randn(2, 5, 24), torch.randn(2, 12)
        self.ids = {"img_ids": torch.randn(64, 3), "txt_ids": torch.zeros(5, 3)}
        for rank, name in enumerate(adapters, 3):
            self.model.add_adapter(config(targets, r=rank), adapter_name=name)

    def forward(self, x):
        scaled = None if self.scale is None else {"scale": self.scale}
        if isinstance(self.model, diffusers.UNet2DConditionModel):
            return self.model(x, 3, self.text, cross_attention_kwargs=scaled).sample
        x, time = x.flatten(2).mT, torch.full((2,), 0.5)
        return self.model(x, self.text, self.pooled, time, **self.ids, joint_attention_kwargs=scaled).sample


@pytest.fixture
def x():
    return torch.randn(2, 4, 8, 8, device=DEVICE)


def fused(*args, **settings):
    model = Denoiser(*args, **settings)
    report = lora_kernels.apply_lora_kernels_to_model(model)
    assert len(report.fused) == len(report.layers) > 0
    return model


@feature("`UNet2DConditionModel`, `FluxTransformer2DModel`: forward and backward", FUSED)
@pytest.mark.parametrize("kind", KINDS)
def test_forward_and_backward(kind, x):
    assert_same(fused(kind, "one"), x)


@feature("`scale` in `cross_attention_kwargs` or `joint_attention_kwargs`, another one in each call", FUSED)
@pytest.mark.parametrize("kind", KINDS)
def test_a_scale_for_each_call(kind, x):
    model, results = fused(kind, "one"), []
    for model.scale in (1.0, 0.25, 2.0, 0.0, -1.0):
        assert_same(model, x)
        results.append(model(x).detach())
    for model.scale, expected in zip((0.25, 1.0), (results[1], results[0]), strict=True):
        assert torch.equal(model(x), expected)
    assert len({result.norm().item() for result in results}) == 5
    model.scale = None
    assert torch.equal(model(x), results[0])
    model.model.disable_adapters()
    CLOSE(model(x), results[3])


@feature("`set_adapters` with weights, and a `scale` on top", FUSED)
@pytest.mark.parametrize("kind", KINDS)
def test_weighted_adapters(kind, x):
    model, results = fused(kind, "one", "two"), []
    for weights in ([0.3, 0.7], [1.0, -0.5]):
        model.model.set_adapters(["one", "two"], weights)
        for model.scale in (None, 0.5):
            assert_same(model, x)
            results.append(model(x).norm().item())
    assert len(set(results)) == 4
    model.model.delete_adapters("two")
    model.model.set_adapters("one", 0.3)
    assert_same(model, x)


@feature("`fuse_lora` and `unfuse_lora` (which merge)", FUSED)
def test_merge(x, judge):
    model = fused("unet", "one").eval()
    y, calls = model(x), judge.calls
    model.model.fuse_lora(lora_scale=1.0)
    CLOSE(model(x), y)
    assert judge.calls == calls
    model.model.unfuse_lora()
    CLOSE(model(x), y)
    assert judge.calls == 2 * calls


@feature("`save_lora_adapter`, `load_lora_adapter`, under `patch_peft()` too", FUSED)
def test_save_and_load(x, tmp_path):
    model = fused("unet", "one")
    model.model.save_lora_adapter(tmp_path, adapter_name="one", weight_name="saved.safetensors")
    where = {"weight_name": "saved.safetensors", "prefix": None, "adapter_name": "one"}
    theirs = Denoiser("unet")
    theirs.model.load_lora_adapter(tmp_path, **where)
    CLOSE(theirs(x), model(x))
    with lora_kernels.patch_peft():
        again = Denoiser("unet")
        again.model.load_lora_adapter(tmp_path, **where)
    assert torch.equal(again(x), model(x))
    assert not lora_kernels.apply_lora_kernels_to_model(again).skipped


@feature("`enable_gradient_checkpointing`", FUSED)
def test_gradient_checkpointing(x):
    model = fused("unet", "one").train()
    model.model.enable_gradient_checkpointing()
    assert_same(model, x)


@feature("adapters of convolutions (`Conv2d`)", f"{EXACT}; the model's rest fused")
def test_convolutions(x):
    model = Denoiser("unet", "one", targets=(*TARGETS, "proj_in", "conv1"))
    with pytest.warns(UserWarning, match=r"lora\.Conv2d: no kernel for this class"):
        report = lora_kernels.apply_lora_kernels_to_model(model)
    assert all(name.endswith(("conv1", "proj_in")) for name in report.skipped) and len(report.fused) == 32
    for model.scale in (None, 0.5):
        assert_same(model, x)


@pytest.mark.parametrize("fault", faults.FAULTS)
def test_a_planted_fault_is_found(fault, x):
    model = fused("unet", "one")
    with faults.planted(fault), pytest.raises(AssertionError, match="is off by"):
        model(x)
