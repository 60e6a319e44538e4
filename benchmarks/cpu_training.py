"""A training step of one layer on the CPU, forward and backward, as ratios to the base layer alone.

The base layer's backward is dx only. Neighbours in rank and size show what tails cost.
"""

from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F

from benchmarks import contenders, report
from benchmarks.timing import take_turns, wall_timer
from lora_kernels import lora_linear


class Shape(NamedTuple):
    m: int = 512
    n: int = 2048
    k: int = 2048
    r: int = 16
    dtype: str = "bfloat16"
    dropout_p: float = 0.0


TARGET = Shape(dropout_p=0.05)
SHAPES = (
    TARGET,
    Shape(),
    Shape(dtype="float32", dropout_p=0.05),
    TARGET._replace(r=13),
    TARGET._replace(r=17),
    TARGET._replace(n=2047, k=2049),
    Shape(r=64),
    Shape(r=512),
    Shape(256, 1024, 1024),
    Shape(32, 256, 256, 8),
)


def main(full: bool = False) -> None:
    rows = [row for shape in (SHAPES if full else SHAPES[:3]) for row in run(shape, 20 if full else 15)]
    method = "wall clock of forward and backward, contenders take turns; ratios of 10th percentiles and of medians"
    path = report.write("cpu_training", method, rows, torch.device("cpu"))
    table = [
        ["{m} × {n} × {k}, {r}, {dtype}, p = {dropout_p}".format(**row), row["contender"], f"{row['p10_us']:.0f}",
         f"{row['p10_ratio']:.3f}", f"{row['median_ratio']:.3f}"]
        for row in rows
    ]  # fmt: skip
    report.show(
        f"Training, {torch.get_num_threads()} threads",
        path,
        ["layer", "contender", "p10 µs", "× base", "median"],
        table,
    )


def run(shape: Shape, repeats: int) -> list[dict]:
    """A row for every contender."""
    dtype, p = getattr(torch, shape.dtype), shape.dropout_p
    x, dy = (torch.randn(shape.m, width).to(dtype) for width in (shape.k, shape.n))
    weight, a, b = (
        (torch.randn(rows, columns) * columns**-0.5).to(dtype)
        for rows, columns in ((shape.n, shape.k), (shape.r, shape.k), (shape.n, shape.r))
    )
    trained = [t.requires_grad_() for t in (x, a, b)]
    calls = {
        contenders.BASE: lambda: F.linear(x, weight),
        contenders.COMPOSED: lambda: contenders.composed(x, weight, a, b) if p == 0.0 else _dropped(x, weight, a, b, p),
    }
    calls |= {
        f"{name} / chained": partial(lora_linear, x, weight, a, b, contenders.SCALING, dropout_p=p, backend=name)
        for name in ("cpu", "eager")
    }
    timers = {
        name: wall_timer([partial(_step, call, trained[:1] if name == contenders.BASE else trained, dy)])
        for name, call in calls.items()
    }
    samples = {name: sorted(times) for name, times in take_turns(timers, repeats).items()}
    return [
        {**shape._asdict(), "contender": name, **_figures(samples[name], samples[contenders.BASE])} for name in timers
    ]


def _dropped(x, weight, a, b, dropout_p):
    return F.linear(x, weight) + F.linear(F.linear(F.dropout(x, dropout_p), a), b) * contenders.SCALING


def _step(call, trained, dy):
    torch.autograd.grad(call(), trained, dy)


def _figures(samples, base):
    p10, median = len(samples) // 10, len(samples) // 2
    return {
        "p10_us": round(samples[p10] * 1e6, 1),
        "p10_ratio": round(samples[p10] / base[p10], 3),
        "median_ratio": round(samples[median] / base[median], 3),
    }
