"""Modelled cost of the forward strategies: bytes, flops and time, from two ceilings. A model, never a measurement.

Each kernel takes as long as the larger of its bytes over the bandwidth and its flops over the peak.
docs/kernels.md derives the terms.
"""

import math
from typing import NamedTuple

MMA_RANK = 16  # the narrowest MMA: a smaller rank costs as much
EXPAND_ROWS = 64  # of a tile: it meets at most as many adapters
LAUNCH = 2e-6  # seconds between two dependent kernels


class Cost(NamedTuple):
    """What a strategy moves and computes, in bytes, flops and seconds."""

    bytes: float
    flops: float
    seconds: float


class InLoop(NamedTuple):
    """A weight that is dequantised in the K loop: its bytes, and the instructions that this takes, of all threads."""

    bytes: float
    instructions: float


class Ceilings(NamedTuple):
    """A device's attainable rates, in flop/s (half precision), bytes/s, and instructions a thread and second."""

    flops: float
    bandwidth: float
    issue: float = math.inf


def base_cost(m, n, k, itemsize, ceilings) -> Cost:
    """The frozen layer alone, `y [m,n] = x [m,k] Wᵀ`."""
    return _kernel(ceilings, itemsize * (m * k + n * k + m * n), 2 * m * n * k)


def dequantize_cost(n, k, weight_bytes, itemsize, ceilings) -> Cost:
    """A quantised weight of so many bytes, made dense in a scratch."""
    return _kernel(ceilings, weight_bytes + itemsize * n * k, 0)


def forward_cost(strategy, m, n, k, r, itemsize, ceilings, block_n=256, in_loop: InLoop | None = None) -> Cost:
    """The layer with its LoRA term under `strategy`; `block_n` is the width of the GEMM's tile."""
    rank = max(r, MMA_RANK)
    expand_flops = 2 * m * n * rank
    shrink = _kernel(ceilings, itemsize * (m * k + r * k + m * r), 2 * m * k * rank)
    weight_bytes, issued = in_loop or (itemsize * n * k, 0.0)
    gemm_bytes = itemsize * (m * k + m * n) + weight_bytes
    lora_bytes = itemsize * (m * r + n * r)
    if strategy == "extended":
        return add(shrink, _kernel(ceilings, gemm_bytes + lora_bytes, 2 * m * n * k + expand_flops, issued))
    if strategy == "chained":
        expand = _kernel(ceilings, lora_bytes + itemsize * m * n, expand_flops)
        return add(shrink, expand, _kernel(ceilings, gemm_bytes + itemsize * m * n, 2 * m * n * k))
    columns = -(-n // block_n)
    if strategy == "single_pass":
        shrink_flops = 2 * m * k * rank * columns  # every tile of a row recomputes h
        return _kernel(ceilings, gemm_bytes + lora_bytes, 2 * m * n * k + shrink_flops + expand_flops)
    if strategy == "one_launch":
        # A narrow MMA is bound by shared memory, hence the 0.2; that the first wave waits for its h is not modelled.
        ride = max(0.2, rank / 256) * 2 * m * k * min(block_n, n)
        return _kernel(ceilings, gemm_bytes + lora_bytes, 2 * m * n * k + ride + expand_flops)
    raise ValueError(f"strategy: got {strategy!r}, expected extended, chained, single_pass or one_launch")


def batched_cost(strategy, m, n, k, r, distinct, itemsize, ceilings, in_loop: InLoop | None = None) -> Cost:
    """A layer whose rows have `distinct` adapters of rank r between them; h goes through memory in fp32."""
    rank, own = max(r, MMA_RANK), min(distinct, EXPAND_ROWS)
    weight_bytes, issued = in_loop or (itemsize * n * k, 0.0)
    gemm_bytes, h_bytes = itemsize * (m * k + m * n) + weight_bytes, 4 * m * r
    shrink_bytes, expand_bytes = itemsize * (m * k + distinct * r * k) + h_bytes, itemsize * distinct * r * n + h_bytes
    shrink_flops = 2 * m * k * rank
    base = base_cost(m, n, k, itemsize, ceilings)
    if strategy == "one_launch":  # every tile meets every adapter of the batch
        flops = base.flops + shrink_flops + 2 * m * n * rank * distinct
        return _kernel(ceilings, gemm_bytes + shrink_bytes - itemsize * m * k + expand_bytes, flops, issued)
    shrink = _kernel(ceilings, shrink_bytes, shrink_flops)
    if strategy == "extended":
        return add(shrink, _kernel(ceilings, gemm_bytes + expand_bytes, base.flops + 2 * m * n * rank * own))
    if strategy == "chained":
        expand = _kernel(ceilings, expand_bytes + 2 * itemsize * m * n, 2 * m * n * rank * own)
        # Side by side they save a launch: of bandwidth and tensor cores there is only one.
        together = _kernel(ceilings, base.bytes + shrink.bytes, base.flops + shrink.flops)
        return add(together, expand)
    raise ValueError(f"strategy: got {strategy!r}, expected one_launch, extended or chained")


def _kernel(ceilings, moved, flops, issued=0.0):
    seconds = max(moved / ceilings.bandwidth, flops / ceilings.flops, issued / ceilings.issue)
    return Cost(moved, flops, seconds + LAUNCH)


def add(*costs):
    return Cost(*map(sum, zip(*costs, strict=True)))
