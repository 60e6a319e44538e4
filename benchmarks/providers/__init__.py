"""What is compared: each way to run a LoRA layer in one small file, imported from where its users get it.

A file has `providers(device)`, a list. It raises ImportError, or NotImplementedError with the reason, where there are none.
"""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module

import torch

MODULES = (
    "base", "eager", "compiled", "peft", "addmm", "cublas", "gathered", "dense", "bitsandbytes", "ours",
    "vllm", "sglang", "nemo", "axolotl", "unsloth",
)  # fmt: skip
BASE, OURS = "base only", "ours"


@dataclass(frozen=True)
class Provider:
    """One way to run a LoRA layer. An operation that it does not have is None.

    An operation takes a problem and its tensors (benchmarks/problems.py), does what users do once, such as to build a
    module or a batch's metadata, and returns the step that is timed. It raises NotImplementedError with the reason where
    the problem is none of its own. Steps may be called again and again, within a CUDA graph too.

    linear   -> `f(x [M,K]) -> y [M,N]`, differentiable, and the parameters that it trains, A and B
    batched  -> `f(x [M,K]) -> y [M,N]`, every row with its own adapter; inference only
    merge    -> `f() -> weight + scaling B A`
    block    takes the problems and tensors of q, k, v, o, gate, up and down -> functions of x for `(q, k, v)`, o and the MLP,
             and the parameters that they train; where it is None a block is made of `linear`
    quantized, quantized_batched -> as linear and batched, over the `quantized` weight of the tensors

    With a backend and a strategy of ours the gate is the whole of `testing.check` as well.
    """

    name: str
    linear: Callable | None = None
    batched: Callable | None = None
    merge: Callable | None = None
    block: Callable | None = None
    quantized: Callable | None = None
    quantized_batched: Callable | None = None
    backend: str | None = None
    strategy: str | None = None

    @property
    def is_ours(self) -> bool:
        return self.name.startswith(OURS)

    @property
    def is_base(self) -> bool:
        return self.name == BASE

    def __str__(self):
        return self.name


def load(device: torch.device, without: tuple[str, ...] = ()) -> tuple[list[Provider], dict[str, str]]:
    """The providers that work on `device`, the base layer first, and by file's name why the others do not."""
    found, missing = [], {}
    for name in MODULES:
        if name in without:
            missing[name] = "left out on request"
            continue
        try:
            found += import_module(f"benchmarks.providers.{name}").providers(device)
        except Exception as error:  # other people's packages raise anything when they are imported without a GPU
            missing[name] = reason(error)
    return found, missing


def needs_gpu(device: torch.device) -> None:
    """Raise NotImplementedError on a CPU, before a big package is imported for nothing."""
    if device.type != "cuda":
        raise NotImplementedError("needs a GPU")


def reason(error: BaseException) -> str:
    """An exception in one line."""
    first, *_ = str(error).strip().splitlines() or [""]
    expected = isinstance(error, (NotImplementedError, ModuleNotFoundError))
    return first if expected and first else f"{type(error).__name__}: {first}"[:200]
