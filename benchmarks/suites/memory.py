"""What a training step of one layer keeps for its backward pass, and the most it holds at once; nothing is timed."""

from dataclasses import dataclass

from benchmarks import trace
from benchmarks.problems import BOTH, FORWARD, Linear
from benchmarks.runner import Suite, row_head, verdict_of


@dataclass(frozen=True)
class Saving(Linear):
    passes = (BOTH,)


@dataclass(frozen=True)
class Memory(Suite):
    def measure(self, problem, what, gates, device, rates, repeats):
        rows, tensors = [], problem.tensors(device)
        for provider, verdict in gates.items():
            figures = {}
            if verdict.is_green:
                try:
                    forward = problem.step(provider, tensors, FORWARD)
                    costs = trace.costs(problem.step(provider, tensors, what), device)
                    figures = {
                        "saved_mib": _mib(trace.saved_bytes(forward, (tensors.weight,))),
                        "peak_mib": _mib(costs.peak),
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
)  # fmt: skip
CPU = (Saving(256, 1024, 1024, 16), Saving(256, 1024, 1024, 16, dropout=0.1), Saving(256, 1024, 1024, 16, "float32"))

SUITE = Memory(
    "memory",
    "Memory of one layer's training step",
    {"cuda": GPU, "cpu": CPU},
    quick={"cuda": 4, "cpu": 2},
    method="saved: storages that autograd keeps, the weight left out; peak: of one step, above what it began with",
)
