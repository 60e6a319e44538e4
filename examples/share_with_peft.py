"""An adapter trained here runs in PEFT, and back: the files are the same."""

import tempfile

import torch
from peft import PeftModel
from torch import nn

import lora_kernels


def base_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 8))


def main():
    ours = lora_kernels.apply_lora(base_model(), ["0", "2"], r=4, lora_alpha=8)
    x, target = torch.randn(64, 32), torch.randn(64, 8)
    optimizer = torch.optim.AdamW(lora_kernels.trainable_parameters(ours).parameters, lr=1e-2)
    for _ in range(20):
        optimizer.zero_grad()
        nn.functional.mse_loss(ours(x), target).backward()
        optimizer.step()

    with tempfile.TemporaryDirectory() as directory:
        lora_kernels.save_adapter(ours, directory)
        theirs = PeftModel.from_pretrained(base_model(), directory)
    print(f"ours to PEFT: largest difference {(theirs(x) - ours(x)).abs().max():.1e}")

    with tempfile.TemporaryDirectory() as directory:
        theirs.save_pretrained(directory)
        back = lora_kernels.load_adapter(base_model(), directory)
    print(f"PEFT to ours: largest difference {(back(x) - theirs(x)).abs().max():.1e}")
    print(f"the adapter changed the base model's output by {(ours(x) - base_model()(x)).abs().max():.1e}")


if __name__ == "__main__":
    main()
