"""Chained cuBLAS (on a CPU: oneDNN or MKL): the adapter's term first, then the base GEMM onto it with beta = 1.

It is our eager backend, called as such: the rival inside the house.
"""

import torch

from benchmarks.providers import Provider, ours


def providers(device: torch.device) -> list[Provider]:
    if device.type != "cuda":
        raise NotImplementedError("on a CPU it is ours: eager / chained")
    return [Provider("chained cuBLAS", _linear)]


def _linear(problem, tensors):
    return ours.linear(problem, tensors, "eager", "chained")
