"""Any backend, run on a quantised weight's dense values, which last as long as the call."""

import functools

from lora_kernels.backends.cpu_dequantize import dequantize
from lora_kernels.formats import scratch

dense = functools.partial(scratch.dense, dequantize=dequantize)


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
