"""Microseconds of Python per call: tiny tensors and one thread, so that what is left is the way to the kernel.

On a GPU this is the time to enqueue; on a CPU it contains the tiny arithmetic as well.
"""

from dataclasses import dataclass, replace

import torch

from benchmarks.problems import BOTH, INFERENCE, Batched, Linear
from benchmarks.providers import ours
from benchmarks.runner import Suite
from benchmarks.timing import wall_timer

CALLS = 20  # per sample


@dataclass(frozen=True)
class Call(Linear):
    passes = (INFERENCE, BOTH)


def timer(steps, device):
    """Seconds of a call, many in a row on one thread: a thread pool's wake-up is not the price of our Python."""
    sample = wall_timer(steps * CALLS, torch.cuda.synchronize if device.type == "cuda" else lambda: None)

    def on_one_thread():
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            return sample()
        finally:
            torch.set_num_threads(threads)

    return on_one_thread


def problems(dtype: str) -> tuple:
    """Small enough that the arithmetic is not what takes the time."""
    call, batch = Call(4, 64, 64, 8, dtype), Batched(4, 64, 64, 2, (8,), dtype)
    return replace(call, sets=1), replace(batch, sets=1)


SUITE = Suite(
    "host",
    "Host cost of one call",
    {"cuda": problems("bfloat16"), "cpu": problems("float32")},
    quick={"cuda": 2, "cpu": 2},
    timer=timer,
    method=f"wall clock of {CALLS} calls in a row on one thread, nothing waited for in between",
    more=(ours.OPERATOR,),
)
