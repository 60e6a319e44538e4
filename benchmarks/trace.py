"""What a step costs beside time: its launches, the most memory it has at once, and what it saves for its backward pass."""

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile

LAUNCHED = ("kernel", "gpu_memcpy", "gpu_memset")


class Costs(NamedTuple):
    """`launches` is None on a CPU; `peak` is in bytes, of what the step itself allocates."""

    launches: int | None
    peak: int


def costs(step: Callable[[], object], device: torch.device) -> Costs:
    """Run `step` once to warm up and once under the profiler."""
    step()
    return _on_gpu(step, device) if device.type == "cuda" else Costs(None, _peak_on_cpu(step))


def saved_bytes(step: Callable[[], object], frozen: tuple[torch.Tensor, ...] = ()) -> int:
    """Bytes of the storages that autograd keeps when `step` runs forward, those of `frozen` left out."""
    storages = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        step()
    for tensor in frozen:
        storages.pop(tensor.untyped_storage().data_ptr(), None)
    return sum(storages.values())


def _on_gpu(step, device):
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        result = step()
        torch.cuda.synchronize(device)
    peak = torch.cuda.max_memory_allocated(device) - before
    del result
    return Costs(sum(event.get("cat") in LAUNCHED for event in _events(profiler)), peak)


def _peak_on_cpu(step):
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = step()  # alive until the profiler stops, or its own memory would come and go in between
    del result
    changes = [event for event in _events(profiler) if event.get("name") == "[memory]"]
    held = peak = 0
    for event in sorted(changes, key=lambda event: event["ts"]):
        held += event["args"]["Bytes"]
        peak = max(peak, held)
    return peak


def _events(profiler):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        return json.loads(path.read_text())["traceEvents"]
