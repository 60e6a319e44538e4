"""What people call on blocks: check the arguments, plan each layer, go to autograd; under a tracer, layer by layer."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import gelu, linear, silu

from lora_kernels import autograd, dispatch, functional, ops
from lora_kernels.backends.shared import Layer
from lora_kernels.blocks import autograd as block_autograd
from lora_kernels.formats import QuantizedWeight

ACTIVATIONS = ("silu", "gelu_tanh")


class Projection(NamedTuple):
    """A linear layer of a block, with an adapter or without: shapes and dtypes as in `lora_linear`."""

    weight: Tensor | QuantizedWeight
    lora_a: Tensor | None = None
    lora_b: Tensor | None = None
    scaling: float | Tensor = 1.0
    bias: Tensor | None = None
    dropout_p: float = 0.0


def lora_projections(
    x: Tensor, projections: Sequence[Projection], *, backend: str | None = None, strategy: str | None = None
) -> tuple[Tensor, ...]:
    """Layers that read the same x (q, k and v; gate and up) as one differentiable operation: `y_i = lora_linear(x, ...)`.

    x            `[..., K]`
    projections  each has a width, rank, scaling, bias and dropout of its own, or no adapter at all
    backend, strategy  as in `lora_linear`, for every projection

    Returns `(y_i [..., N_i], ...)`. Without dropout one shrink makes every h and one pass over x every dA (the compiled CPU
    kernels go layer by layer); dx is added up in place. Masks of dropout, and bits of y in the CPU's kernels, are those
    of `lora_linear` called once for each. Under torch.compile and other tracers each layer is its own operator.
    Raises as `lora_linear` does, naming the projection.

    >>> x, w_q, w_kv = torch.randn(2, 5, 64), torch.randn(64, 64), torch.randn(16, 64)
    >>> adapted = Projection(w_q, torch.randn(8, 64), torch.randn(64, 8), scaling=2.0)
    >>> q, k, v = lora_projections(x, [adapted, Projection(w_kv), Projection(w_kv)])
    >>> q.shape, k.shape
    (torch.Size([2, 5, 64]), torch.Size([2, 5, 16]))
    """
    projections = tuple(projections)
    if not projections:
        raise ValueError("projections: got none, expected at least one Projection")
    if ops.must_trace(x):
        return tuple(_traced(x, projection, backend, strategy) for projection in projections)
    named = {f"projections[{i}]": projection for i, projection in enumerate(projections)}
    rows, layers = _layers(x, named, backend, strategy)
    return tuple(y.view(*x.shape[:-1], y.shape[1]) for y in block_autograd.lora_projections(rows, layers))


def lora_mlp(
    x: Tensor,
    gate: Projection,
    up: Projection,
    down: Projection,
    activation: str = "silu",
    *,
    backend: str | None = None,
    strategy: str | None = None,
) -> Tensor:
    """The gated MLP as one differentiable operation: `y = down(f(gate(x)) ∘ up(x))`.

    x           `[..., K]`
    gate, up    weights `[N, K]`
    down        weight `[K', N]`
    activation  f: "silu" (SwiGLU), or "gelu_tanh" (GeGLU with PyTorch's approximate="tanh")
    backend, strategy  as in `lora_linear`, for every projection

    Returns `y [..., K']`. Saved for backward are x, gate(x), up(x) and every h; the product of the two is computed again.
    gate and up run as in `lora_projections`; dropout, tracers and errors as there.
    Source: Shazeer 2020, arXiv:2002.05202, equation 6.

    >>> gate, up, down = (Projection(torch.randn(n, k)) for n, k in ((96, 64), (96, 64), (64, 96)))
    >>> lora_mlp(torch.randn(2, 5, 64), gate, up, down._replace(lora_a=torch.randn(4, 96), lora_b=torch.zeros(64, 4))).shape
    torch.Size([2, 5, 64])
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation: got {activation!r}, expected one of {', '.join(ACTIVATIONS)}")
    if ops.must_trace(x):
        z, u = (_traced(x, projection, backend, strategy) for projection in (gate, up))
        f = silu(z) if activation == "silu" else gelu(z, approximate="tanh")
        return _traced(f * u, down, backend, strategy)
    rows, layers = _layers(x, {"gate": gate, "up": up, "down": down}, backend, strategy)
    y = block_autograd.lora_mlp(rows, layers, activation)
    return y.view(*x.shape[:-1], y.shape[1])


def _traced(x, projection, backend, strategy):
    """One layer through its registered operator."""
    weight, lora_a, lora_b, scaling, bias, dropout_p = projection
    if lora_a is None:
        return linear(x, weight, bias) if isinstance(weight, Tensor) else functional.quantized_linear(x, weight, bias)
    options = {"bias": bias, "dropout_p": dropout_p, "backend": backend, "strategy": strategy}
    return functional.lora_linear(x, weight, lora_a, lora_b, scaling, **options)


def _layers(x, named, backend, strategy):
    """`x [M,K]`, and the projections as layers that are in order, each with its plan and a seed of its own."""
    if autograd.autocasts(x):
        x, named = _cast(x, named)
    call = None if backend or strategy else _call(x, named)
    plans = functional._known.get(call)
    new, layers = plans is None, []
    plans = {} if new else plans
    rows = x if x.dim() in (0, 2) else x.reshape(-1, x.shape[-1])  # 0 is an error that the check names
    for name, projection in named.items():
        inputs = _product(rows, named) if new and name == "down" else rows
        try:
            if new:
                _check(inputs, projection, backend, strategy)
            functional._check_values(inputs, projection.weight, projection.scaling, projection.dropout_p)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{name}: {error}") from None
        if new:
            plans[name] = _plan(inputs, projection, backend, strategy)
        layers.append(_layer(projection, plans[name], x.device))
    if new and call is not None:
        functional._remember(call, plans)
    return rows, tuple(layers)


def _cast(x, named):
    """x, weights and biases in autocast's dtype, as `lora_linear` does it."""
    dtype = torch.get_autocast_dtype(x.device.type)

    def cast(tensor):
        return tensor.to(dtype) if isinstance(tensor, Tensor) else tensor

    return cast(x), {name: p._replace(weight=cast(p.weight), bias=cast(p.bias)) for name, p in named.items()}


def _call(x, named):
    """What checks and plans depend on, or None where that cannot be told."""
    if not all(isinstance(projection, Projection) for projection in named.values()):
        return None
    each = (
        (name, bool(p.dropout_p), *map(_signature, (p.weight, p.lora_a, p.lora_b, p.bias))) for name, p in named.items()
    )
    return _signature(x), *each, dispatch.settings(x)


def _signature(tensor):
    return None if tensor is None else functional._signature(tensor)


def _product(rows, named):
    """Stands for what `down` reads, which there is not yet."""
    gate, up = (named[name].weight.shape[0] for name in ("gate", "up"))
    if gate != up:
        raise ValueError(f"up: got a weight of {up} rows, expected {gate}, as gate")
    return rows.new_empty(len(rows), gate)


def _check(x, projection, backend, strategy):
    if not isinstance(projection, Projection):
        raise TypeError(f"got {type(projection).__name__}, expected a Projection")
    weight, lora_a, lora_b, _, bias, _ = projection
    if (lora_a is None) != (lora_b is None):
        given, missing = ("lora_b", "lora_a") if lora_a is None else ("lora_a", "lora_b")
        raise TypeError(
            f"{missing}: got None, expected a torch.Tensor, since {given} is there (without adapter: both None)"
        )
    if lora_a is None and isinstance(weight, Tensor | QuantizedWeight) and len(weight.shape) == 2:
        lora_a, lora_b = x.new_empty(1, weight.shape[1]), x.new_empty(weight.shape[0], 1)  # any that are in order
    functional._check(x, weight, lora_a, lora_b, bias, backend, strategy)


def _plan(x, projection, backend, strategy):
    weight, lora_a, lora_b, *_, dropout_p = projection
    return None if lora_a is None else dispatch.plan_for(x, weight, lora_a, lora_b, dropout_p, backend, strategy)


def _layer(projection, plan, device) -> Layer:
    weight, lora_a, lora_b, scaling, bias, dropout_p = projection
    dropout_p = 0.0 if plan is None else dropout_p
    seed = functional.draw_seed(device) if dropout_p > 0.0 else None
    return Layer(weight, bias, lora_a, lora_b, scaling, dropout_p, seed, plan)
