"""Any backend, run on a quantised weight: on its dense values, which last as long as the call, or in its own K loop."""

import functools
import importlib.util

from lora_kernels.backends import cpu_dequantize, triton
from lora_kernels.backends.launcher import launch
from lora_kernels.backends.operands import Base, cdiv
from lora_kernels.formats import scratch


class Dequantized:
    """`backend` for a `QuantizedWeight`: the weight is dequantised into the shared scratch, in x's dtype."""

    def __init__(self, backend):
        self.backend, self.__name__ = backend, backend.__name__

    def forward(self, x, weight, *rest):
        with dense(weight, x.dtype) as w:
            return self.backend.forward(x, w, *rest)

    def backward(self, dy, x, h, weight, *rest):
        with dense(weight, dy.dtype) as w:
            return self.backend.backward(dy, x, h, w, *rest)


class InLoop(Dequantized):
    """`backend` for a `QuantizedWeight` that its forward kernel takes as it is; the backward pass is over the scratch."""

    def forward(self, *args):
        return self.backend.forward(*args)


def fill(weight, out):
    """Write the dense values of `weight` to a contiguous `out [N, K]`: `weight.dequantize(out=out)`, by a kernel of ours."""
    if out.is_cpu and cpu_dequantize.dequantize(weight, out):
        return
    if (
        out.device.type == "cuda"
        and _has_triton()
        and not reasons_no_kernel(weight, out.dtype, triton.target(out.device))
    ):
        dequantize(weight, out)
    else:
        weight.dequantize(out=out)


dense = functools.partial(scratch.dense, fill=fill)


def reasons_no_kernel(weight, dtype, goal) -> list[str]:
    """Why PyTorch has to dequantise `weight` to `dtype`; empty if one kernel can."""
    reasons = [] if goal.capability >= 80 else [f"compute capability {goal.capability / 10}, expected 8.0 or newer"]
    if dtype.itemsize > 4:
        reasons.append(f"{dtype} has no kernel")
    if isinstance(tile := weight.tile(goal.capability), str):
        reasons.append(tile)
    return reasons


def dequantize(weight, out):
    """The launch behind `fill`; `weight` has a `tile`."""
    n, k = weight.shape
    config = triton.config_for("dequantize", out, k, 1)
    base = Base.of(weight, triton.target(out.device).capability)
    constants = dict(BLOCK_M=config.block_m, BLOCK_K=config.block_k, **base.constants)
    with triton.device_guard(out.device):
        grid = (cdiv(n, config.block_m), cdiv(k, config.block_k), 1)
        launch(_kernel(), grid, (base.w, out, n, k), constants, config)


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


@functools.cache
def _kernel():
    from lora_kernels.kernels.dequantize import dequantize_kernel

    return dequantize_kernel
