"""One layer of a training step: forward, backward, and both."""

from benchmarks.problems import Linear
from benchmarks.runner import Suite

LAYERS = ((4096, 4096), (5120, 5120), (8192, 8192), (4096, 14336), (14336, 4096), (4096, 1024), (8192, 28672))  # (K, N)
HEADLINE = (
    Linear(8192, 4096, 4096, 16),
    Linear(8192, 14336, 4096, 16),
    Linear(8192, 4096, 14336, 16),
    Linear(8192, 1024, 4096, 16),
)
GPU = (
    *HEADLINE,
    *(Linear(8192, n, k, 16) for k, n in LAYERS),
    *(Linear(8192, n, k, 16, dropout=0.1) for k, n in LAYERS),
    *(Linear(m, n, k, 16) for m in (2048, 4096, 16384) for k, n in LAYERS),
    *(Linear(8192, n, k, r) for r in (8, 32, 64, 128) for k, n in LAYERS),
)
CPU = (
    Linear(256, 1024, 1024, 16, "float32"),
    Linear(256, 1024, 1024, 16),
    Linear(256, 1024, 1024, 16, "float32", dropout=0.1),
    Linear(256, 1024, 1024, 64, "float32"),
    Linear(256, 2816, 1024, 16, "float32"),
)

SUITE = Suite(
    "train", "Training, one layer", {"cuda": tuple(dict.fromkeys(GPU)), "cpu": CPU}, quick={"cuda": 4, "cpu": 2}
)
