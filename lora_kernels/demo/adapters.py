"""Thirty more adapters from the two that were trained: each with a rank and a character of its own."""

import copy
import math
from pathlib import Path

import torch

from lora_kernels import AdapterPool, apply_lora, load_adapter, save_adapter
from lora_kernels.adapters.checkpoint import read_adapter
from lora_kernels.modules import lora_layers

RANKS = (2, 3, 4, 6, 8, 8, 12, 16, 24, 64)
STRENGTH = 1.5  # of a mixture, beside the trained updates
NOISE = 0.3  # of its random directions, beside the others


def make_adapters(model, trained: list[Path], directory: Path, count: int) -> list[Path]:
    """Write `count` adapters below `directory`, in the model's dtype.

    Each has the leading singular directions of a mixture `u W_docs + v W_code` of the two trained updates, with (u, v)
    on a circle, up to half of its rank; random directions make up the rest.
    """
    factors, paths = _factors(trained), []
    adapted = {r: apply_lora(sharing_weights(model), r=r, lora_alpha=r, lora_dtype=model.dtype) for r in {*RANKS}}
    for i in range(count):
        rank, turn = RANKS[i % len(RANKS)], math.tau * i / count
        weights = STRENGTH * math.cos(turn), STRENGTH * math.sin(turn)
        for name, layer in lora_layers(adapted[rank]).items():
            a, b = _mixture(*factors[name], weights, rank)
            layer.lora_A.weight.data.copy_(a)
            layer.lora_B.weight.data.copy_(b)
        paths.append(save_adapter(adapted[rank], directory / f"mix-{i:02}"))
    return paths


def _factors(trained) -> dict[str, tuple]:
    """Per layer Q_B, R_B, R_A, Q_A with `Q_B R_B diag(w) R_A' Q_A'` the mixture of the updates."""
    (_, first, settings), (_, second, _) = map(read_adapter, trained)
    factors = {}
    for name in first:
        a = torch.cat((first[name][0], second[name][0])).float()
        b = torch.cat((first[name][1], second[name][1]), 1).float()
        factors[name] = (*torch.linalg.qr(b * settings[name].scaling), *reversed(torch.linalg.qr(a.mT)))
    return factors


def _mixture(q_b, r_b, r_a, q_a, weights, rank):
    """`A [rank, K]` and `B [N, rank]`."""
    each = torch.tensor(weights).repeat_interleave(r_b.shape[1] // len(weights))
    u, s, vh = torch.linalg.svd(r_b * each @ r_a.mT)
    kept = min(rank // 2, len(s))
    root = s[:kept].sqrt()
    random_a = torch.randn(rank - kept, q_a.shape[0]) / math.sqrt(q_a.shape[0])
    random_b = torch.randn(q_b.shape[0], rank - kept) / math.sqrt(q_b.shape[0] * (rank - kept)) * NOISE * s.norm()
    a = torch.cat((root[:, None] * vh[:kept] @ q_a.mT, random_a))
    return a, torch.cat((q_b @ u[:, :kept] * root, random_b), 1)


def make_pool(model, adapters: dict[str, Path], slots: int, rows: int | None = None) -> AdapterPool:
    """A pool for the layers that the first adapter targets, with all of them loaded."""
    config, *_ = read_adapter(next(iter(adapters.values())))
    pool = AdapterPool.for_model(model, slots, max(RANKS), config["target_modules"], rows)
    for name, directory in adapters.items():
        pool.load(name, directory)
    return pool


def sharing_weights(model):
    """A copy of the model with the same parameters: for a change of layers, at no memory."""
    return copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})


def merged(model, directory):
    """The model with an adapter merged."""
    model = load_adapter(sharing_weights(model), directory)
    for layer in lora_layers(model).values():
        layer.merge()
    return model
