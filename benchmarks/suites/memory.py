"""What a training step of one layer keeps for its backward pass, the most it holds at once, and what stays in the scratch
that layers with quantised weights share; nothing is timed."""

from dataclasses import dataclass

from benchmarks import trace
from benchmarks.problems import BOTH, FORWARD, Linear
from benchmarks.runner import Suite, row_head, verdict_of
from benchmarks.suites.qlora import QuantizedLinear
from lora_kernels import formats


@dataclass(frozen=True)
class Saving(Linear):
    passes = (BOTH,)


@dataclass(frozen=True)
class QuantizedSaving(QuantizedLinear):
    passes = (BOTH,)


@dataclass(frozen=True)
class Memory(Suite):
    def measure(self, problem, what, gates, device, rates, repeats):
        rows, tensors = [], problem.tensors(device)
        frozen = (tensors.weight, *(tensors.quantized.state() if isinstance(problem, QuantizedLinear) else ()))
        for provider, verdict in gates.items():
            figures = {}
            if verdict.is_green:
                formats.release_scratch()
                try:
                    forward = problem.step(provider, tensors, FORWARD)
                    costs = trace.costs(problem.step(provider, tensors, what), device)
                    figures = {
                        "saved_mib": _mib(trace.saved_bytes(forward, frozen)),
                        "peak_mib": _mib(costs.peak),
                        "scratch_mib": _mib(formats.scratch_bytes()),
                        "launches": costs.launches,
                        "x_mib": _mib(tensors.x.nbytes),
                    }
                except Exception as error:
                    verdict = verdict_of(error, device)
            rows.append({**row_head(problem, what, provider, verdict, repeats), **figures})
        return rows


def _mib(count):
    return round(count / 2**20, 3)


GPU = (
    Saving(8192, 4096, 4096, 16), Saving(8192, 14336, 4096, 16), Saving(8192, 4096, 14336, 16),
    Saving(8192, 4096, 4096, 16, dropout=0.1), Saving(8192, 4096, 4096, 128), Saving(16384, 8192, 8192, 16),
    QuantizedSaving(8192, 4096, 4096, 16),
)  # fmt: skip
CPU = (
    Saving(256, 1024, 1024, 16), Saving(256, 1024, 1024, 16, dropout=0.1), QuantizedSaving(256, 1024, 1024, 16),
    Saving(256, 1024, 1024, 16, "float32"),
)  # fmt: skip

SUITE = Memory(
    "memory",
    "Memory of one layer's training step",
    {"cuda": GPU, "cpu": CPU},
    quick={"cuda": 4, "cpu": 3},
    method="saved: storages that autograd keeps, the weight left out; peak: of one step, above what it began with; scratch: "
    "what layers with quantised weights share, and keep",
)
