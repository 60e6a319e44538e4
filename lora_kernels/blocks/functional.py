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
    names = [f"projections[{i}]" for i in range(len(projections))]
    x, projections = _cast(x, projections)
    call = _call(x, projections, backend, strategy)
    plans = call and functional._known.get(call)
    rows = _rows(x, projections, names, backend, strategy, plans is None)
    if plans is None:
        plans = [_plan(rows, projection, backend, strategy) for projection in projections]
        _remember(call, plans)
    ys = block_autograd.lora_projections(rows, _layers(x, projections, plans))
    return tuple(y.view(*x.shape[:-1], y.shape[1]) for y in ys)


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
    projections = (gate, up, down)
    if ops.must_trace(x):
        z, u = (_traced(x, projection, backend, strategy) for projection in (gate, up))
        f = silu(z) if activation == "silu" else gelu(z, approximate="tanh")
        return _traced(f * u, down, backend, strategy)
    x, projections = _cast(x, projections)
    call = _call(x, projections, backend, strategy)
    plans = call and functional._known.get(call)
    rows = _rows(x, projections[:2], ("gate", "up"), backend, strategy, plans is None)
    product = None
    if plans is None:
        widths = [projection.weight.shape[0] for projection in projections[:2]]
        if widths[0] != widths[1]:
            raise ValueError(f"up: got a weight of {widths[1]} rows, expected {widths[0]}, as gate")
        product = rows.new_empty(len(rows), widths[0])  # stands for the product, which there is not yet
    _rows(product if plans is None else rows, projections[2:], ("down",), backend, strategy, plans is None)
    if plans is None:
        inputs = (rows, rows, product)
        plans = [_plan(t, projection, backend, strategy) for t, projection in zip(inputs, projections, strict=True)]
        _remember(call, plans)
    del product
    y = block_autograd.lora_mlp(rows, _layers(x, projections, plans), activation)
    return y.view(*x.shape[:-1], y.shape[1])


def _traced(x, projection, backend, strategy):
    """One layer through its registered operator."""
    weight, lora_a, lora_b, scaling, bias, dropout_p = projection
    if lora_a is None:
        return linear(x, weight, bias) if isinstance(weight, Tensor) else functional.quantized_linear(x, weight, bias)
    options = {"bias": bias, "dropout_p": dropout_p, "backend": backend, "strategy": strategy}
    return functional.lora_linear(x, weight, lora_a, lora_b, scaling, **options)


def _cast(x, projections):
    """x, weights and biases in autocast's dtype where there is one, as `lora_linear` does it."""
    if not (isinstance(x, Tensor) and autograd.autocasts(x)):
        return x, projections
    dtype = torch.get_autocast_dtype(x.device.type)

    def cast(tensor):
        return tensor.to(dtype) if isinstance(tensor, Tensor) and tensor.is_floating_point() else tensor

    return cast(x), tuple(p._replace(weight=cast(p.weight), bias=cast(p.bias)) for p in projections)


def _call(x, projections, backend, strategy):
    """What checks and plans depend on, or None where that cannot be told."""
    if backend or strategy or not all(isinstance(projection, Projection) for projection in projections):
        return None
    signature = functional._signature
    tensors = (signature(t) for p in projections for t in (p.weight, p.lora_a, p.lora_b, p.bias) if t is not None)
    which = tuple((p.lora_a is None, p.lora_b is None, p.bias is None, bool(p.dropout_p)) for p in projections)
    return signature(x), *tensors, which, dispatch.settings(getattr(x, "dtype", None))


def _remember(call, plans):
    if call is not None:
        functional._remember(call, plans)


def _rows(x, projections, names, backend, strategy, new):
    """`x [M,K]`, once it and its projections are in order; a call that is not `new` had the shapes and dtypes checked."""
    for name, projection in zip(names, projections, strict=True):
        try:
            if new:
                _check(x, projection, backend, strategy)
            functional._check_values(x, projection.weight, projection.scaling, projection.dropout_p)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{name}: {error}") from None
    return x if x.dim() == 2 else x.reshape(-1, x.shape[-1])


def _check(x, projection, backend, strategy):
    if not isinstance(projection, Projection):
        raise TypeError(f"got {type(projection).__name__}, expected a Projection")
    weight, lora_a, lora_b, _, bias, _ = projection
    if (lora_a is None) != (lora_b is None):
        given, missing = ("lora_b", "lora_a") if lora_a is None else ("lora_a", "lora_b")
        raise TypeError(
            f"{missing}: got None, expected a torch.Tensor, since {given} is there (without adapter: both None)"
        )
    if (
        lora_a is None
        and isinstance(x, Tensor)
        and isinstance(weight, Tensor | QuantizedWeight)
        and len(weight.shape) == 2
    ):
        lora_a, lora_b = x.new_empty(1, weight.shape[1]), x.new_empty(weight.shape[0], 1)  # any that is in order
    functional._check(x, weight, lora_a, lora_b, bias, backend, strategy)


def _plan(rows, projection, backend, strategy):
    if projection.lora_a is None:
        return None
    return dispatch.plan_for(
        rows, projection.weight, projection.lora_a, projection.lora_b, projection.dropout_p, backend, strategy
    )


def _layers(x, projections, plans):
    return tuple(
        Layer(
            p.weight, p.bias, p.lora_a, p.lora_b, p.scaling, p.dropout_p if plan else 0.0,
            functional.draw_seed(x.device) if plan and p.dropout_p > 0.0 else None, plan,
        )
        for p, plan in zip(projections, plans, strict=True)
    )  # fmt: skip
