"""Where quantised weights are dequantised: one dense buffer for all layers, overwritten by the next one."""

import contextlib
import threading
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from lora_kernels.formats.base import QuantizedWeight


class _Scratch:
    def __init__(self):
        self.buffer: Tensor | None = None
        self.lock = threading.Lock()


_scratches: dict[tuple, _Scratch] = {}


def _fill(weight, out):
    weight.dequantize(out=out)


@contextlib.contextmanager
def dense(
    weight: QuantizedWeight, dtype: torch.dtype, fill: Callable[[QuantizedWeight, Tensor], None] = _fill
) -> Iterator[Tensor]:
    """The dense `weight [N, K]` in `dtype`, until the context is left; then the next layer may write over it.

    There is one buffer for each device, dtype and stream, as large as the largest weight so far. On a GPU a stream runs
    what was launched in order, so that a kernel that reads the buffer is done before the next layer fills it. Of several
    threads one at a time has it. While a CUDA graph is captured the memory is the graph's own. `fill` writes the values.
    """
    device, elements, stream = weight.device, weight.shape.numel(), None
    if device.type == "cuda":
        if torch.cuda.is_current_stream_capturing():
            out = torch.empty(weight.shape, dtype=dtype, device=device)
            fill(weight, out)
            yield out
            return
        stream = torch.cuda.current_stream(device).cuda_stream
    scratch = _scratches.setdefault((device, dtype, stream), _Scratch())
    with scratch.lock:
        if scratch.buffer is None or scratch.buffer.numel() < elements:
            scratch.buffer = None  # before the larger one is there, not after
            with torch.inference_mode(False):  # else no later call outside of inference mode could write to it
                scratch.buffer = torch.empty(elements, dtype=dtype, device=device)
        out = scratch.buffer[:elements].view(weight.shape)
        fill(weight, out)
        yield out


def scratch_bytes() -> int:
    """The bytes that dequantised weights take now, on all devices together: those of each buffer's largest weight."""
    return sum(0 if scratch.buffer is None else scratch.buffer.nbytes for scratch in _scratches.values())


def release_scratch() -> None:
    """Give the buffers back to the allocator; the next call that needs one makes it anew."""
    _scratches.clear()
