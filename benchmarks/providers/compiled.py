"""torch.compile of the eager layer."""

import functools

import torch
import torch._functorch.config

from benchmarks.providers import Provider, eager


def providers(device: torch.device) -> list[Provider]:
    torch._functorch.config.donated_buffer = False  # or a graph has no second backward pass, which timing it needs
    return [Provider("torch.compile", lambda problem, tensors: eager.linear(problem, tensors, _compiled(problem)))]


@functools.lru_cache(maxsize=1)
def _compiled(problem):
    """One problem's graph at a time, for all its tensors: sizes would become dynamic, and the cache full."""
    torch.compiler.reset()
    return torch.compile(eager.layer, fullgraph=True, dynamic=False)
