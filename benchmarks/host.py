"""Microseconds of Python per call: tiny tensors, so that what is left is the way to the kernel.

On a GPU this is the time to enqueue; on a CPU it contains the (tiny) arithmetic of the eager backend as well.
"""

import torch
import torch.nn.functional as F

from benchmarks import contenders, report
from benchmarks.timing import summary, take_turns, wall_timer
from lora_kernels import lora_linear, ops

M, N, K, R = 4, 64, 64, 8
CALLS = 50  # per sample


def main(full: bool = False) -> None:
    device = report.local_device()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a thread pool's wake-up is not the price of our Python
    try:
        rows = run(device, repeats=101 if full else 25)
        sizes = f"x [{M},{K}], N = {N}, r = {R}, {'bf16' if device.type == 'cuda' else 'fp32'}"
        method = f"wall clock of {CALLS} calls in a row, {sizes}; contenders take turns"
        path = report.write("host", method, rows, device)
    finally:
        torch.set_num_threads(threads)
    what = "time to enqueue" if device.type == "cuda" else "CPU, eager backend, with its tiny arithmetic"
    table = [[row["pass"], row["contender"], f"{row['median_us']:.1f}", _quartiles(row)] for row in rows]
    report.show(f"Host cost of one call: {what}", path, ["pass", "path", "median µs", "quartiles"], table)


def run(device: torch.device, repeats: int) -> list[dict]:
    """A row for every path from Python to the arithmetic."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    x, weight, lora_a, lora_b = (
        torch.randn(shape, device=device, dtype=dtype) for shape in ((M, K), (N, K), (R, K), (N, R))
    )
    adapter = [tensor.clone().requires_grad_() for tensor in (lora_a, lora_b)]
    scaling = torch.tensor(contenders.SCALING)
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None

    def without_grad(call):
        def run():
            with torch.no_grad():
                call()

        return run

    def forward_backward(call):
        return lambda: torch.autograd.grad(call().sum(), adapter)

    paths = {
        "inference": {
            contenders.BASE: without_grad(lambda: F.linear(x, weight)),
            contenders.COMPOSED: without_grad(lambda: contenders.composed(x, weight, lora_a, lora_b)),
            "lora_linear": without_grad(lambda: lora_linear(x, weight, lora_a, lora_b, contenders.SCALING)),
            "registered operator": without_grad(
                lambda: ops.lora_linear(x, weight, None, lora_a, lora_b, scaling, 0.0, None)
            ),
        },
        "forward + backward": {
            contenders.COMPOSED: forward_backward(lambda: contenders.composed(x, weight, *adapter)),
            "lora_linear": forward_backward(lambda: lora_linear(x, weight, *adapter, contenders.SCALING)),
            "registered operator": forward_backward(
                lambda: ops.lora_linear(x, weight, None, *adapter, scaling, 0.0, None)[0]
            ),
        },
    }
    rows = []
    for what, calls in paths.items():
        timers = {name: wall_timer([call] * CALLS, wait) for name, call in calls.items()}
        for name, samples in take_turns(timers, repeats).items():
            rows.append({"pass": what, "contender": name, **summary(samples)})
    return rows


def _quartiles(row):
    return "{:.1f} - {:.1f}".format(*row["quartiles_us"])
