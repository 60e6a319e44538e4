"""Merging an adapter into its layer, against copying the weight."""

from dataclasses import dataclass

import torch

from benchmarks.problems import Linear
from benchmarks.runner import Suite
from benchmarks.timing import wall_timer
from lora_kernels import testing


def timer(steps, device):
    """On the host's clock until the device is done: who asks it whether the sum is finite fits in no CUDA graph."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None

    def run_all():
        for step in steps:
            step()
        wait()

    sample = wall_timer([run_all], wait)
    return lambda: sample() / len(steps)


@dataclass(frozen=True)
class Merge(Linear):
    """`weight + scaling B A`; m counts for nothing."""

    operation, passes = "merge", ("merge",)
    case = None

    def __str__(self):
        return f"{self.n} × {self.k}, r {self.r}, {self.dtype}"

    @property
    def bytes_per_set(self):
        return self.itemsize * 2 * self.n * self.k

    def cost(self, what, base):
        n, k, r = self.n, self.k, 0 if base else self.r
        return self.itemsize * (2 * n * k + r * (n + k)), 2 * n * k * r

    def step(self, provider, tensors, what):
        merge = provider.merge(self, tensors)

        def step():
            with torch.no_grad():
                return merge()

        return step

    def judge(self, provider, device):
        tensors = self.tensors(device)
        weight, a, b = (t.detach().double() for t in tensors[1:4])
        truth, bound = weight + self.scaling * b @ a, 2 * torch.finfo(tensors.weight.dtype).eps
        error = testing.errors(self.step(provider, tensors, "merge")(), truth, truth)
        return max(error["rms"][0] / bound, error["max"][0] / (4 * bound))


SIZES = ((4096, 4096), (14336, 4096), (4096, 14336), (8192, 8192), (28672, 8192))
SUITE = Suite(
    "merge",
    "Merging",
    {
        "cuda": tuple(Merge(1, n, k, r) for r in (16, 64) for n, k in SIZES),
        "cpu": (Merge(1, 1024, 1024, 16, "float32"), Merge(1, 2048, 2048, 16), Merge(1, 2048, 2048, 64, "float32")),
    },
    quick={"cuda": 3, "cpu": 2},
    timer=timer,
    method="wall clock until the device is done",
)
