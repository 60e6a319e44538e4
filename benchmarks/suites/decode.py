"""One layer of a decode step: few rows, many adapters."""

from benchmarks.problems import Batched
from benchmarks.runner import Suite

MODELS = {  # (K, N): q+k+v, o, gate+up, down
    "Llama-3-8B": ((4096, 6144), (4096, 4096), (4096, 28672), (14336, 4096)),
    "Llama-3-70B": ((8192, 10240), (8192, 8192), (8192, 57344), (28672, 8192)),
    "Qwen2.5-7B": ((3584, 4608), (3584, 3584), (3584, 37888), (18944, 3584)),
}
ROWS = (1, 8, 32, 64, 128, 256)
RANKS = ((16,), (64,), (8, 16, 16, 64))


def distinct(m: int) -> list[int]:
    """From one adapter to one for each row."""
    return sorted({1, min(8, m), m // 2 or 1, m})


HEADLINE = tuple(
    Batched(m, 4096, 4096, d) for m, d in ((1, 1), (32, 1), (32, 8), (32, 32), (128, 1), (128, 16), (128, 128))
)
GPU = (
    *HEADLINE,
    *(Batched(m, 4096, 4096, d, ranks) for ranks in RANKS for m in ROWS for d in distinct(m)),
    *(
        Batched(m, n, k, d, ranks)
        for layers in MODELS.values() for k, n in layers for ranks in RANKS for m, d in ((1, 1), (64, 8), (64, 64))
    ),
)  # fmt: skip

SUITE = Suite("decode", "Decoding, one layer", {"cuda": tuple(dict.fromkeys(GPU)), "cpu": ()}, quick={"cuda": 7})
