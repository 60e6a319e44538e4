"""What the machine can do at best: the two rates that a roofline is made of, measured in the run that uses them."""

import torch

from benchmarks.timing import device_timer, take_turns
from lora_kernels.roofline import Ceilings

GEMM = {"cuda": 8192, "cpu": 2048}
COPY_BYTES = {"cuda": 2**30, "cpu": 2**28}


def measure(device: torch.device, dtype: torch.dtype, gemm: int = 0, copied: int = 0) -> Ceilings:
    """The best of a few large products (flop/s) and large copies (bytes/s, read and written) on random data."""
    size, count = gemm or GEMM[device.type], (copied or COPY_BYTES[device.type]) // 4
    left, right, out = (torch.randn(size, size, device=device).to(dtype) for _ in range(3))
    source, target = (torch.empty(count, device=device).fill_(value) for value in (1.0, 0.0))
    timers = {
        "gemm": device_timer([lambda: torch.mm(left, right.mT, out=out)], device),
        "copy": device_timer([lambda: target.copy_(source)], device),
    }
    best = {name: min(times) for name, times in take_turns(timers, 10).items()}
    return Ceilings(2 * size**3 / best["gemm"], 2 * 4 * count / best["copy"])
