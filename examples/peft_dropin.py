"""A PEFT model, and one line more: it trains as before, saves as before, and serves several adapters in one batch."""

import tempfile

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

import lora_kernels


def base_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 8))


def config(rank):
    return LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=["0", "2"])


def train(model, steps=20):
    generator = torch.Generator().manual_seed(1)
    x, target = (torch.randn(64, size, generator=generator) for size in (32, 8))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(x), target)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def main():
    theirs = train(get_peft_model(base_model(), config(4)))

    model = get_peft_model(base_model(), config(4))
    print(lora_kernels.apply_lora_kernels_to_model(model))  # the one line
    ours = train(model)
    apart = max(abs(a - b) for a, b in zip(theirs, ours, strict=True))
    print(f"loss {ours[0]:.4f} -> {ours[-1]:.4f}, at most {apart:.1e} from PEFT's own")

    model.add_adapter("other", config(2))  # runs fused as well
    model.set_adapter("other")
    train(model)

    model.eval()
    x = torch.randn(3, 32)
    with torch.inference_mode():
        y = model(x, adapter_names=["default", "other", "__base__"])
        print(f"rows of a mixed batch: {', '.join(f'{row.norm():.3f}' for row in y)}")

    with tempfile.TemporaryDirectory() as directory:
        model.save_pretrained(directory)
        plain = PeftModel.from_pretrained(base_model(), directory).eval()
    print(f"loaded in PEFT alone: at most {(plain(x[:1]) - y[:1]).abs().max():.1e} apart")


if __name__ == "__main__":
    main()
