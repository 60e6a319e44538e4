"""Any backend, run on a quantised weight's dense values, which last as long as the call."""

import functools

from lora_kernels.backends import cpu_dequantize
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


def fill(weight, out):
    """Write the dense values of `weight` to a contiguous `out [N, K]`: `weight.dequantize(out=out)`, compiled on CPUs."""
    if not (out.is_cpu and cpu_dequantize.dequantize(weight, out)):
        weight.dequantize(out=out)


dense = functools.partial(scratch.dense, fill=fill)
