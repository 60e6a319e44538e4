"""Fine-tune a small character model on another text with LoRA, on a CPU, in seconds.

The model first learns Python's reference manual with all of its weights; then only the adapters (8 %) learn the source
code of the standard library, and the base model stays what it was.
"""

import argparse
import pydoc_data.topics

import torch
from torch import nn

import lora_kernels

CONTEXT, WIDTH = 32, 128


class CharModel(nn.Module):
    """Predicts the next character from the 32 before it."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(128, 16)
        self.up = nn.Linear(16 * CONTEXT, WIDTH)
        self.mix = nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, 128)

    def forward(self, ids):
        h = self.up(self.embed(ids).flatten(-2)).relu()
        return self.head(h + self.mix(h).relu())


def train(model, text, steps, learning_rate):
    """Train what is trainable; returns the mean loss of the first and of the last ten steps."""
    ids = torch.tensor(list(text.encode("ascii", "replace")))
    optimizer = torch.optim.AdamW(lora_kernels.trainable_parameters(model).parameters, lr=learning_rate)
    losses = []
    for _ in range(steps):
        windows = ids.unfold(0, CONTEXT + 1, 1)[torch.randint(len(ids) - CONTEXT, (256,))]
        loss = nn.functional.cross_entropy(model(windows[:, :-1]), windows[:, -1])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return sum(losses[:10]) / 10, sum(losses[-10:]) / 10


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=200)
    steps = parser.parse_args().steps
    torch.manual_seed(0)
    with open(argparse.__file__, encoding="utf-8") as file:
        code = file.read()

    model = CharModel()
    first, last = train(model, "\n".join(pydoc_data.topics.topics.values()), steps, 3e-3)
    print(f"base model on the manual: loss {first:.2f} -> {last:.2f}")

    lora_kernels.apply_lora(model, ["up", "mix", "head"], r=8, lora_alpha=16)
    print(lora_kernels.trainable_parameters(model))
    first, last = train(model, code, steps, 3e-3)
    print(f"adapter on source code:   loss {first:.2f} -> {last:.2f}")


if __name__ == "__main__":
    main()
