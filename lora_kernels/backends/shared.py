"""Layers that read the same x: one shrink for all their adapters, one pass over x for all dA, one dx that they add to.

Adapters with dropout see an x of their own each, and a strategy that makes h inside its GEMM needs no shrink: such layers
run one by one, and add to the same dx. So do those of the compiled CPU kernels, which make h and y in one call.
"""

import contextlib
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

from lora_kernels.backends import eager, triton, triton_shared
from lora_kernels.backends.dequantized import dense
from lora_kernels.backends.operands import with_clean_rows
from lora_kernels.formats import QuantizedWeight

MAX_RANK = 512  # of all shared adapters together
PRODUCTS = {triton: triton_shared, eager: eager}  # the backends whose products can be had one by one


class Layer(NamedTuple):
    """A linear layer, and its adapter with dispatch's plan for it, which is None where there is no adapter."""

    weight: Tensor | QuantizedWeight
    bias: Tensor | None
    lora_a: Tensor | None
    lora_b: Tensor | None
    scaling: float | Tensor
    dropout_p: float
    seed: Tensor | None
    plan: Any


def products(layers):
    """Where the products of `layers` come from: a module, or None where a layer's backend has them in one call only."""
    plans = {layer.plan.backend for layer in layers if layer.plan is not None}
    kinds = {PRODUCTS.get(getattr(backend, "backend", backend)) for backend in plans}  # behind Dequantized
    return kinds.pop() if len(kinds) == 1 else None


def forward(x, layers):
    """`[y [M,N]]` and `[h [M,R]]` of the layers; h is None without an adapter."""
    hs = dict.fromkeys(range(len(layers)))
    together = [i for i in _together(x, layers) if layers[i].plan.strategy in ("extended", "chained")]
    first = layers[together[0]] if together else None
    if len(together) > 1 and all(_same(layers[i].scaling, first.scaling) for i in together):
        a = [layers[i].lora_a for i in together]
        h = products(layers).shrink(x, torch.cat(a), first.scaling)
        hs |= zip(together, (part.contiguous() for part in h.split([len(part) for part in a], 1)), strict=True)
    return tuple(zip(*(_forward(x, layer, hs[i], layers) for i, layer in enumerate(layers)), strict=True))


def _forward(x, layer, h, layers):
    weight, bias, lora_a, lora_b, scaling, dropout_p, seed, plan = layer
    if plan is not None and h is None:
        return plan.forward(x, weight, bias, lora_a, lora_b, scaling, dropout_p, seed)
    with _values(weight, x) as w:
        return linear(with_clean_rows(x), w, bias) if plan is None else products(layers).expand(
            x, w, h, lora_b, bias, plan.strategy
        ), h


def backward(dys, x, hs, layers, needs_x, needs):
    """`dx [M,K]`, and `[(da, db)]` of the layers, None where `needs_x` and the layers' `(needs_a, needs_b)` say so.

    A dy may be None. x may be where no dA is needed, and so may h where no dB is.
    """
    wanted = [dy is not None and (needs_x or any(need)) for dy, need in zip(dys, needs, strict=True)]
    dx, grads = None, [(None, None)] * len(layers)
    if not any(wanted):
        return dx, grads
    together = [i for i in _together(dys[wanted.index(True)], layers) if wanted[i]]
    if len(together) > 1:
        dx = _backward_together(dys, x, hs, layers, needs_x, needs, together, grads)
    for i, (dy, layer) in enumerate(zip(dys, layers, strict=True)):
        if not wanted[i] or (len(together) > 1 and i in together):
            continue
        if layer.plan is None:
            dx = _add_base(dx, dy, layer.weight) if needs_x else None
            continue
        _, _, lora_a, lora_b, scaling, dropout_p, seed, plan = layer
        own, *grads[i] = plan.backward(
            dy, x, hs[i], layer.weight, lora_a, lora_b, scaling, dropout_p, seed, (needs_x, *needs[i])
        )
        dx = own if dx is None else dx.add_(own)
    return dx, grads


def _backward_together(dys, x, hs, layers, needs_x, needs, together, grads):
    """Puts their da and db into `grads` and returns their dx: all terms of the adapters are one product's."""
    kernels, gs = products(layers), []
    needs_a = any(needs[i][0] for i in together)
    for i in together:
        g, db = kernels.dy_products(dys[i], hs[i], layers[i].lora_b, layers[i].scaling, needs_x or needs_a, needs[i][1])
        gs.append(g)
        grads[i] = (None, db)
    if not (needs_x or needs_a):
        return None
    first, *others = together
    g, a = torch.cat(gs, 1), torch.cat([layers[i].lora_a for i in together])
    if needs_a:
        das = kernels.wgrad(x, g, a.dtype).split([len(layers[i].lora_a) for i in together])
        for i, da in zip(together, das, strict=True):
            grads[i] = (da if needs[i][0] else None, grads[i][1])
    if not needs_x:
        return None
    with _values(layers[first].weight, dys[first]) as w:
        dx = kernels.expand(dys[first], w.mT, g, a.mT, None, layers[first].plan.strategy)
    for i in others:
        _add_base(dx, dys[i], layers[i].weight)
    return dx


def _together(x, layers) -> list[int]:
    """The layers whose adapters can be one stack of A."""
    kernels, found = products(layers), []
    if kernels is None or len(x) == 0:
        return found
    for i, layer in enumerate(layers):
        fits = layer.plan is not None and layer.dropout_p == 0.0 and layer.plan.strategy != "one_launch"
        if fits and (not found or layer.lora_a.dtype == layers[found[0]].lora_a.dtype):
            found.append(i)
    return found if sum(len(layers[i].lora_a) for i in found) <= MAX_RANK else []


def _add_base(dx, dy, weight):
    dy = with_clean_rows(dy)
    with _values(weight, dy) as w:
        return dy.mm(w) if dx is None else dx.addmm_(dy, w)


def _values(weight, like):
    """A context with the dense weight."""
    return contextlib.nullcontext(weight) if isinstance(weight, Tensor) else dense(weight, like.dtype)


def _same(one, other) -> bool:
    if isinstance(one, Tensor) or isinstance(other, Tensor):
        return one is other
    return one == other
