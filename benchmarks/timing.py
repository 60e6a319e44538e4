"""How everything here is timed: contenders take turns, and every sample is kept."""

import math
import random
import statistics
import time
from collections.abc import Callable

import torch

Step = Callable[[], object]


def take_turns(timers: dict[str, Callable[[], float]], repeats: int) -> dict[str, list[float]]:
    """`repeats` samples of each timer, in a new random order every round, so that drift hits all alike."""
    samples = {name: [] for name in timers}
    order, rng = list(timers), random.Random(0)
    for timer in timers.values():
        timer()
    for _ in range(repeats):
        rng.shuffle(order)
        for name in order:
            samples[name].append(timers[name]())
    return samples


def device_timer(steps: list[Step], device: torch.device) -> Callable[[], float]:
    """A function that runs all `steps` and returns the seconds one took: on a GPU, of a CUDA graph's replay."""
    if device.type == "cuda":
        return _graph_timer(steps)
    return wall_timer(steps, warm_up=steps[0]) if len(steps) == 1 else wall_timer(steps)


def wall_timer(steps: list[Step], wait: Step = lambda: None, warm_up: Step = lambda: None) -> Callable[[], float]:
    """Seconds per step on the host's clock; outside the time `warm_up` runs before, and `wait` before and after."""

    def sample():
        warm_up()  # those who ran before have swept the caches
        wait()
        start = time.perf_counter()
        for step in steps:
            step()
        seconds = (time.perf_counter() - start) / len(steps)
        wait()
        return seconds

    return sample


def _graph_timer(steps):
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # compile, and let cuBLAS allocate, outside the capture
        for step in [*steps, *steps[:1]]:
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):  # a backward pass runs on the stream of its forward pass
        for step in steps:
            step()

    def sample():
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / len(steps)

    return sample


def buffer_sets(bytes_per_set: int, device: torch.device) -> int:
    """How many sets of tensors to cycle through so that none is still in a GPU's L2; 1 on a CPU (warm caches)."""
    if device.type != "cuda":
        return 1
    return max(2, math.ceil(4 * torch.cuda.get_device_properties(device).L2_cache_size / bytes_per_set))


def summary(samples: list[float]) -> dict:
    """Median and quartiles, with the raw samples, all in microseconds."""
    micros = [1e6 * sample for sample in samples]
    low, median, high = statistics.quantiles(micros, n=4)
    return {"median_us": round(median, 3), "quartiles_us": [round(low, 3), round(high, 3)],
            "samples_us": [round(sample, 3) for sample in micros]}  # fmt: skip
