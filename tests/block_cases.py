"""Blocks under the judge: random problems, their truth from reference.py, the error budget of `testing` for every result."""

import math
from dataclasses import dataclass, replace
from functools import partial

import torch
from conftest import DEVICE

from lora_kernels import Projection, functional, lora_mlp, lora_projections, reference, testing

LEARNS = ("lora_a", "lora_b", "bias")


@dataclass(frozen=True)
class Block:
    """`layers` are (N, rank, bias, dropout_p), rank 0 without an adapter; an `mlp` has (N, ...) of gate and up, and of down."""

    m: int
    k: int
    layers: tuple
    mlp: str | None = None
    dtype: torch.dtype = torch.float32
    lora_dtype: torch.dtype | None = None
    scalings: tuple = (2.0, 2.0, 2.0)
    base: bool = True
    seed: int = 0
    frozen: tuple = ()  # what gets no gradient: of "x", "lora_a", "lora_b", "bias" of all layers, "0.lora_a" of one
    leading: tuple = ()

    def inputs(self):
        """x, the projections, and dy of each result, in fp64 rounded to their dtypes."""
        generator = torch.Generator().manual_seed(self.seed)

        def draw(name, shape, scale, dtype=self.dtype):
            values = torch.randn(shape, generator=generator, dtype=torch.float64) * scale
            frozen = {"weight", "dy", *self.frozen} & {name, name.split(".")[-1]}
            return testing.guarded(values.to(dtype), device=DEVICE).requires_grad_(not frozen)

        projections, lora_dtype = [], self.lora_dtype or self.dtype
        for i, (n, r, bias, dropout_p) in enumerate(self.layers):
            k = self.layers[0][0] if self.mlp and i == 2 else self.k
            weight = draw("weight", (n, k), float(self.base) / math.sqrt(k))
            a = draw(f"{i}.lora_a", (r, k), 1 / math.sqrt(k), lora_dtype) if r else None
            b = draw(f"{i}.lora_b", (n, r), 1 / math.sqrt(r), lora_dtype) if r else None
            bias = draw(f"{i}.bias", (n,), float(self.base)) if bias else None
            projections.append(Projection(weight, a, b, self.scalings[i], bias, dropout_p if r else 0.0))
        widths = [self.layers[-1][0]] if self.mlp else [n for n, *_ in self.layers]
        dys = [draw("dy", (*self.leading, self.m, n), 1.0) for n in widths]
        return draw("x", (*self.leading, self.m, self.k), 1.0), projections, dys


def run(block, x, projections, backend=None, strategy=None):
    """The results, in a tuple."""
    torch.manual_seed(block.seed)
    if block.mlp:
        return (lora_mlp(x, *projections, block.mlp, backend=backend, strategy=strategy),)
    return lora_projections(x, projections, backend=backend, strategy=strategy)


def learning(x, projections):
    """What gets a gradient, by name."""
    named = {"x": x} | {f"{i}.{name}": getattr(p, name) for i, p in enumerate(projections) for name in LEARNS}
    return {name: t for name, t in named.items() if t is not None and t.requires_grad}


def expected(block, x, projections, dys, convert):
    """Results and gradients by name, from the specification, on tensors that `convert` made."""
    torch.manual_seed(block.seed)
    rows, layers = x.detach().reshape(-1, block.k), []
    for p in projections:
        n, k = p.weight.shape
        a, b = (x.new_empty(0, k), x.new_empty(n, 0)) if p.lora_a is None else (p.lora_a, p.lora_b)
        keep = None
        if p.dropout_p > 0.0:
            keep = reference.dropout_keep(functional.draw_seed(x.device), len(rows), k, p.dropout_p, x.device)
        weight, a, b = (convert(t.detach()) for t in (p.weight, a, b))
        bias = None if p.bias is None else convert(p.bias.detach())
        layers.append(reference.Layer(weight, a, b, p.scaling, bias, keep, p.dropout_p))
    rows, flat = convert(rows), [convert(dy.detach().reshape(-1, dy.shape[-1])) for dy in dys]
    if block.mlp:
        ys = [reference.lora_mlp(rows, *layers, block.mlp)]
        dx, grads = reference.lora_mlp_backward(flat[0], rows, *layers, block.mlp)
    else:
        ys = reference.lora_projections(rows, layers)
        dx, grads = reference.lora_projections_backward(flat, rows, layers)
    found = {f"y{i}": y.view(dy.shape) for i, (y, dy) in enumerate(zip(ys, dys, strict=True))}
    found["x"] = dx.view(x.shape)
    return found | {f"{i}.{name}": g for i, of in enumerate(grads) for name, g in zip(LEARNS, of, strict=True)}


def check(block, backend=None, strategy=None):
    """AssertionError where a result or a gradient of the block, or of its W = 0 twin, is over its budget."""
    for twin in (block, replace(block, base=False)):
        x, projections, dys = twin.inputs()
        wanted = learning(x, projections)
        with testing.poisoned_empty():
            runs = []
            for _ in range(1 + twin.base):  # the same bits again
                ys = run(twin, x, projections, backend, strategy)
                grads = torch.autograd.grad(ys, list(wanted.values()), dys) if wanted else ()
                runs.append({f"y{i}": y.detach() for i, y in enumerate(ys)} | dict(zip(wanted, grads, strict=True)))
        truth = expected(twin, x, projections, dys, torch.Tensor.double)
        eager = expected(twin, x, projections, dys, partial(torch.Tensor.to, dtype=twin.dtype))
        for name, actual in runs[0].items():
            assert torch.equal(actual, runs[-1][name]), f"{name}: a second run gave other bits\n{twin}"
            like = actual if name.startswith("y") else wanted[name]
            assert actual.dtype == like.dtype
            kind = {"x": "dx", "lora_a": "da", "lora_b": "db", "bias": "dbias"}.get(name.split(".")[-1], "y")
            n, r = max(n for n, *_ in twin.layers), max(1, *(r for _, r, *_ in twin.layers))
            dropout_p = max(p for *_, p in twin.layers)
            case = testing.Case(
                twin.m, n, max(twin.k, n) if twin.mlp else twin.k, r, twin.dtype, twin.lora_dtype,
                dropout_p=dropout_p, leading=twin.leading, base=twin.base, seed=twin.seed,
            )  # fmt: skip
            theirs = eager[name].to(like.dtype)
            testing.compare(case, kind, actual, truth[name], theirs, torch.zeros_like(truth[name]))


def check_glu(kernels, activation, dtype=torch.float32):
    """AssertionError where what lies between an MLP's layers, or its gradient, is off, far from zero or at the end."""
    far = torch.tensor([-1e4, -200.0, -89.0, 0.0, 89.0, 200.0, 1e4])
    z = torch.cat((torch.linspace(-9, 9, 1500), far)).to(DEVICE, dtype)
    u, dp = (testing.guarded(torch.randn(z.shape).to(dtype), device=DEVICE) for _ in range(2))
    f, slope = reference.activated(z.double(), activation)
    with testing.poisoned_empty():
        p = kernels.glu(z, u, activation)
        dz, du = kernels.glu_backward(testing.guarded(dp, device=DEVICE), z, u, activation)
    for name, actual, exact, size in (
        ("p", p, f * u, z.abs() * u.abs()), ("dz", dz, dp * u * slope, (dp * u).abs()), ("du", du, dp * f, (dp * z).abs()),
    ):  # fmt: skip
        error = ((actual.double() - exact).abs() / (size.double() + 1e-30)).max()
        assert error <= 16 * torch.finfo(dtype).eps, f"{name} is off by {error:.1e}"
