"""The CPU's path: decoding with 1 to 32 adapters, warm and cold, and a training step."""

from benchmarks.problems import Batched, Linear
from benchmarks.runner import Suite

CPU = (
    *(Batched(32, 2048, 2048, distinct) for distinct in (32, 16, 8, 4, 2, 1)),
    Batched(32, 2048, 2048, 32, dtype="float32"),
    Linear(512, 2048, 2048, 16),
    Batched(32, 2048, 2048, 32, sets=24),
    Batched(32, 4096, 4096, 32),
    Batched(32, 4096, 4096, 32, dtype="float32"),
    *(Linear(512, 2048, 2048, r) for r in (32, 64, 128)),
    Linear(512, 2048, 2048, 16, "float32"),
    Linear(512, 2048, 2048, 16, dropout=0.05),
    Linear(512, 2048, 2048, 16, "float32", dropout=0.05),
)

SUITE = Suite("cpu", "Decoding and training on the CPU", {"cuda": (), "cpu": CPU}, quick={"cpu": 8})
