"""One layer of a prefill: long sequences, each with its own adapter."""

from dataclasses import dataclass

import torch

from benchmarks.problems import Batched
from benchmarks.runner import Suite


@dataclass(frozen=True)
class Prefill(Batched):
    """The rows of a sequence lie side by side."""

    def slots(self, device):
        return torch.arange(self.m, device=device).mul(self.distinct).div(self.m, rounding_mode="floor").int()


LAYERS = ((4096, 6144), (4096, 4096), (4096, 28672), (14336, 4096), (8192, 8192))  # (K, N)
GPU = (
    Prefill(4096, 4096, 4096, 1),
    Prefill(4096, 4096, 4096, 8),
    Prefill(4096, 28672, 4096, 8),
    *(
        Prefill(m, n, k, sequences, ranks)
        for k, n in LAYERS for m in (1024, 4096, 8192) for sequences in (1, 8, 32) for ranks in ((16,), (64,))
    ),
)  # fmt: skip

SUITE = Suite("prefill", "Prefill, one layer", {"cuda": tuple(dict.fromkeys(GPU)), "cpu": ()}, quick={"cuda": 3},
              without=("gathered bmm", "PEFT adapter_names"))  # fmt: skip
