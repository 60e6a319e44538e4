"""Which backend and which strategy run a problem, and why."""

import functools
import os
from typing import Any, NamedTuple

import torch

from lora_kernels.backends import BACKENDS


class Problem(NamedTuple):
    """Everything a choice may depend on; `device` is a type such as "cuda", `capability` 90 for sm_90, 0 without a GPU."""

    m: int
    n: int
    k: int
    r: int
    dtype: torch.dtype
    lora_dtype: torch.dtype
    dropout: bool
    device: str
    capability: int


class Plan(NamedTuple):
    """A backend (module) and a strategy, with the reason for both."""

    backend: Any
    strategy: str
    why: str

    def forward(self, *args):
        return self.backend.forward(*args, self.strategy)

    def backward(self, *args):
        return self.backend.backward(*args, self.strategy)


def plan_for(x, weight, lora_a, dropout_p, backend=None, strategy=None) -> Plan:
    """The plan for tensors `x [M,K]`, `weight [N,K]`, `lora_a [R,K]`."""
    n, k = weight.shape
    problem = Problem(
        x.shape[0], n, k, lora_a.shape[0], x.dtype, lora_a.dtype, dropout_p > 0.0, x.device.type, _capability(x.device)
    )
    return choose(problem, backend or os.environ.get("LORA_KERNELS_BACKEND"), strategy)


@functools.lru_cache(maxsize=4096)
def choose(problem: Problem, backend: str | None = None, strategy: str | None = None) -> Plan:
    """The first backend that has no reason against `problem`, and for it the strategy asked for, or the best one.

    Raises ValueError for an unknown name, NotImplementedError where what was asked for cannot run `problem`.
    """
    if backend is not None and backend not in BACKENDS:
        raise ValueError(f"backend: got {backend!r}, expected one of {', '.join(BACKENDS)}")
    return Plan(BACKENDS["eager"], "chained", "the only strategy of the eager backend")


@functools.lru_cache(maxsize=64)
def _capability(device: torch.device) -> int:
    if device.type != "cuda":
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def explain(m: int, n: int, k: int, r: int) -> str:
    raise NotImplementedError
