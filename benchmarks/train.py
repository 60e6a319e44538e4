"""One layer of a training step: forward, and forward + backward, against the base layer alone in the same run.

The base layer's backward is dx only, since its weight is frozen. A contender that fails its
correctness gate is not timed.
"""

import dataclasses
import statistics
from dataclasses import dataclass

import torch

from benchmarks import contenders, report
from benchmarks.timing import buffer_sets, device_timer, summary, take_turns
from lora_kernels import testing


@dataclass(frozen=True)
class Shape:
    m: int
    n: int
    k: int
    r: int
    dtype: str = "bfloat16"


GPU_SHAPES = (
    Shape(8192, 4096, 4096, 16),
    Shape(8192, 14336, 4096, 16),
    Shape(8192, 4096, 14336, 16),
    Shape(8192, 4096, 4096, 64),
    Shape(8192, 8192, 8192, 16),
    Shape(8192, 28672, 8192, 16),
    Shape(8192, 1024, 4096, 16),
    Shape(2048, 4096, 4096, 16),
)
CPU_SHAPES = (
    Shape(256, 1024, 1024, 16, "float32"),
    Shape(256, 1024, 1024, 16),
    Shape(512, 2048, 2048, 16, "float32"),
    Shape(512, 2048, 2048, 16),
)


def main(full: bool = False) -> None:
    device = report.local_device()
    gpu = device.type == "cuda"
    shapes = GPU_SHAPES if gpu else CPU_SHAPES
    rows = []
    for shape in shapes if full else shapes[:4] if gpu else shapes[:2]:
        rows += run(shape, device, repeats=60 if full else 25)
    method = (
        "a CUDA graph's replay over buffer sets larger than L2" if gpu else "wall clock, caches warm, eager backend"
    ) + "; contenders take turns in random order; ratio: median over rounds of time / base layer's time in that round"
    path = report.write("train", method, rows, device)
    columns = ["m × n × k, r, dtype", "contender", *(f"{what} {unit}" for what in PASSES for unit in ("µs", "/ base"))]
    report.show(f"Training, one layer: {'GPU' if gpu else 'CPU, eager backend'}", path, columns, _table(rows))


def run(shape: Shape, device: torch.device, repeats: int) -> list[dict]:
    """Gate, then time, every contender for one shape; a row for each pass."""
    gates = {name: gate(shape, device, *choice) for name, choice in contenders.strategies(device).items()}
    calls = {name: call for name, call in contenders.all_of(device).items() if gates.get(name, "passed") == "passed"}
    sets = _tensors(shape, device)
    common = {"shape": dataclasses.asdict(shape), "buffer_sets": len(sets)}
    rows = [
        {**common, "pass": "none", "contender": name, "gate": verdict}
        for name, verdict in gates.items()
        if verdict != "passed"
    ]
    for what, step in PASSES.items():
        timers = {name: device_timer([step(call, tensors) for tensors in sets], device) for name, call in calls.items()}
        samples = take_turns(timers, repeats)
        for name, times in samples.items():
            ratio = statistics.median(t / b for t, b in zip(times, samples[contenders.BASE], strict=True))
            rows.append({**common, "pass": what, "contender": name, "gate": gates.get(name, "is the yardstick"),
                         "ratio_to_base": round(ratio, 4), **summary(times)})  # fmt: skip
    return rows


def gate(shape: Shape, device: torch.device, backend: str, strategy: str) -> str:
    """ "passed", or why this strategy is not timed: it cannot run the shape, or it misses the error budget."""
    m, n, k, r, dtype = dataclasses.astuple(shape)
    case = testing.Case(m, n, k, r, getattr(torch, dtype), scaling=contenders.SCALING)
    try:
        testing.check(case, backend, strategy, device)
    except NotImplementedError as error:
        return f"cannot run: {error}"
    except AssertionError as error:
        return f"failed: {error}"
    return "passed"


def _tensors(shape, device):
    m, n, k, r, dtype = dataclasses.astuple(shape)
    dtype = getattr(torch, dtype)
    sets = buffer_sets(dtype.itemsize * (m * k + n * k + m * n), device)
    generator = torch.Generator(device).manual_seed(0)

    def normal(*size, scale=1.0):
        return (torch.randn(size, generator=generator, device=device) * scale).to(dtype)

    return [
        (normal(m, k).requires_grad_(), normal(n, k, scale=k**-0.5), normal(r, k, scale=k**-0.5).requires_grad_(),
         normal(n, r, scale=r**-0.5).requires_grad_(), normal(m, n))
        for _ in range(sets)
    ]  # fmt: skip


def _forward(call, tensors):
    *inputs, _ = tensors
    return lambda: call(*inputs)


def _forward_backward(call, tensors):
    x, weight, lora_a, lora_b, dy = tensors
    wanted = (x,) if call is contenders.base else (x, lora_a, lora_b)
    return lambda: torch.autograd.grad(call(x, weight, lora_a, lora_b), wanted, dy)


PASSES = {"forward": _forward, "forward + backward": _forward_backward}


def _table(rows):
    lines = {}
    for row in rows:
        shape = "{m} × {n} × {k}, {r}, {dtype}".format(**row["shape"])
        line = lines.setdefault((shape, row["contender"]), [shape, row["contender"]])
        line += [f"{row['median_us']:.0f}", f"{row['ratio_to_base']:.3f}"] if "median_us" in row else [row["gate"]]
    return list(lines.values())
