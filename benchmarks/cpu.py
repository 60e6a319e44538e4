"""Batched decoding on the CPU: 32 rows, each with an adapter of its own, as ratios to the base layer alone.

`warm` runs one layer again and again, `cold` a cycle of layers that no cache holds.
"""

from functools import partial
from importlib import util
from itertools import cycle
from typing import NamedTuple

import torch
import torch.nn.functional as F

from benchmarks import contenders, report
from benchmarks.timing import take_turns, wall_timer
from lora_kernels import BatchPlan, LayerAdapters, lora_linear_batched

ROWS, RANK = 32, 16


class Shape(NamedTuple):
    size: int
    dtype: str = "bfloat16"
    layers: int = 1


SHAPES = (Shape(2048), Shape(4096), Shape(2048, "float32"), Shape(2048, layers=24))


def main(full: bool = False) -> None:
    device = torch.device("cpu")
    rows = [row for shape in SHAPES for row in run(shape, repeats=400 if full else 100)]
    method = (
        f"{ROWS} rows, {ROWS} adapters, r = {RANK}; wall clock of one call, contenders take turns; "
        "p10: the 10th percentile, which a busy machine disturbs least"
    )
    path = report.write("cpu", method, rows, device)
    table = [
        [f"{row['size']}² {row['dtype']} {row['cache']}", row["contender"], f"{row['p10_us']:.0f}",
         f"{row['p10_ratio']:.2f}", f"{row['median_us']:.0f}", f"{row['median_ratio']:.2f}"]
        for row in rows
    ]  # fmt: skip
    columns = ["layer", "contender", "p10 µs", "× base", "median µs", "× base"]
    report.show(f"Batched decoding, {torch.get_num_threads()} threads", path, columns, table)


@torch.inference_mode()
def run(shape: Shape, repeats: int) -> list[dict]:
    """A row for every contender."""
    plan = BatchPlan(torch.arange(ROWS, dtype=torch.int32))
    x = torch.randn(ROWS, shape.size).to(getattr(torch, shape.dtype))
    layers = [_layer(shape.size, x.dtype) for _ in range(shape.layers)]
    steps = {contenders.BASE: lambda weight, _: F.linear(x, weight)}
    steps |= {
        f"{backend} / {strategy}": partial(_ours, x, plan, backend, strategy)
        for backend, strategy in (("cpu", "chained"), ("eager", "looped"))
    }
    steps["gather and bmm"] = partial(_gathered, x, plan.slots)
    timers = {name: _timer(step, cycle(layers)) for name, step in steps.items()}
    if util.find_spec("peft") and shape.layers == 1:
        timers["PEFT's adapter_names"] = _timer(_peft(x, *layers[0]), cycle([()]))
    samples = take_turns(timers, repeats)
    return [_row(shape, name, samples[name], samples[contenders.BASE]) for name in timers]


def _layer(size, dtype):
    a, b = ((torch.randn(ROWS * RANK, size) * size**-0.5).to(dtype) for _ in range(2))
    ranks, first_row = torch.full((ROWS,), RANK, dtype=torch.int32), torch.arange(ROWS) * RANK
    adapters = LayerAdapters(a, b, ranks, torch.ones(ROWS), first_row, RANK)
    return (torch.randn(size, size) * size**-0.5).to(dtype), adapters


def _ours(x, plan, backend, strategy, weight, adapters):
    return lora_linear_batched(x, weight, adapters, plan, backend=backend, strategy=strategy)


def _gathered(x, slots, weight, adapters):
    a, b = (t.view(ROWS, RANK, -1)[slots] for t in (adapters.a, adapters.b))
    h = torch.bmm(x[:, None], a.mT) * adapters.scalings[slots, None, None].to(x.dtype)
    return F.linear(x, weight) + torch.bmm(h, b).squeeze(1)


def _peft(x, weight, adapters):
    from peft import LoraConfig
    from peft.tuners.lora import Linear

    base = torch.nn.Linear(*weight.mT.shape, bias=False, dtype=x.dtype)
    base.weight = torch.nn.Parameter(weight, requires_grad=False)
    names = [f"adapter_{i}" for i in range(ROWS)]
    config = LoraConfig(r=RANK, lora_alpha=RANK)
    layer = Linear(base, names[0], config=config, r=RANK, lora_alpha=RANK)
    for name in names[1:]:
        layer.update_layer(name, RANK, lora_alpha=RANK, config=config)
    for name, a, b in zip(names, adapters.a.split(RANK), adapters.b.split(RANK), strict=True):
        layer.lora_A[name].weight.data, layer.lora_B[name].weight.data = a, b.mT.contiguous()
    layer.eval().set_adapter(names)
    return lambda: layer(x, adapter_names=names)


def _timer(step, layers):
    return wall_timer([lambda: step(*next(layers))])


def _row(shape, name, samples, base):
    def at(quantile, times):
        return sorted(times)[int(len(times) * quantile)] * 1e6

    figures = {}
    for label, quantile in (("p10", 0.1), ("median", 0.5)):
        figures |= {
            f"{label}_us": round(at(quantile, samples), 1),
            f"{label}_ratio": round(at(quantile, samples) / at(quantile, base), 3),
        }
    cache = "warm" if shape.layers == 1 else f"cold, {shape.layers} layers"
    return {"size": shape.size, "dtype": shape.dtype, "cache": cache, "contender": name, **figures}
