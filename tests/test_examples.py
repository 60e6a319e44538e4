"""Every example runs as it stands, and does what it says."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
ARGUMENTS = {"finetune_tiny.py": ["--steps", "40"]}


def run(name, *launcher):
    root = str(EXAMPLES.parent)
    environment = os.environ | {"PYTHONPATH": root, "LORA_KERNELS_BACKEND": "eager"}
    command = [sys.executable, *launcher, str(EXAMPLES / name), *ARGUMENTS.get(name, [])]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.name)
def test_short(path):
    assert len(path.read_text().splitlines()) < 80


def test_finetune_tiny():
    said = run("finetune_tiny.py")
    for first, last in re.findall(r"loss ([\d.]+) -> ([\d.]+)", said):
        assert float(last) < float(first)
    assert said.count("->") == 2 and "parameters train" in said


def test_share_with_peft():
    pytest.importorskip("peft")
    there, back, effect = map(float, re.findall(r"\d\.\de[+-]\d\d", run("share_with_peft.py")))
    assert max(there, back) < 1e-5 < effect


def test_peft_dropin():
    pytest.importorskip("peft")
    said = run("peft_dropin.py")
    apart, reloaded = map(float, re.findall(r"\d\.\de[+-]\d\d", said))
    assert "2 of 2 adapted layers run fused" in said and max(apart, reloaded) < 1e-5
    rows = [float(norm) for norm in re.search(r"mixed batch: (.*)", said)[1].split(", ")]
    assert len(set(rows)) == 3


def test_fsdp2_finetune():
    pytest.importorskip("peft")
    said = run("fsdp2_finetune.py", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    first, last = map(float, re.search(r"on 2 processes ([\d.]+) -> ([\d.]+)", said).groups())
    assert "4 of 4 adapted layers run fused" in said and last < first / 2
    assert float(re.search(r"\d\.\de[+-]\d\d", said)[0]) < 1e-4
