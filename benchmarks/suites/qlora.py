"""One layer over a quantised base, a training step and a decode step, against the dense base layer in bf16."""

from dataclasses import dataclass
from typing import NamedTuple

import torch

from benchmarks.problems import BOTH, FORWARD, INFERENCE, Batched, BatchedTensors, Linear, LinearTensors, of_budget
from benchmarks.runner import Suite
from lora_kernels import formats, reference, testing
from lora_kernels.formats import QuantizedWeight


class QuantizedLinearTensors(NamedTuple):
    """As `LinearTensors`, whose weight holds the dense values of `quantized`."""

    x: torch.Tensor
    weight: torch.Tensor
    lora_a: torch.nn.Parameter
    lora_b: torch.nn.Parameter
    dy: torch.Tensor
    quantized: QuantizedWeight


class QuantizedBatchedTensors(NamedTuple):
    """As `BatchedTensors`, whose weight holds the dense values of `quantized`."""

    x: torch.Tensor
    weight: torch.Tensor
    a: torch.Tensor
    b: torch.Tensor
    ranks: torch.Tensor
    scalings: torch.Tensor
    slots: torch.Tensor
    quantized: QuantizedWeight


class _Quantized:
    """What both problems share: the weight, and the bytes that it saves."""

    def __str__(self):
        return f"{super().__str__()}, {self.format}"

    def cost(self, what, base):
        moved, flops = super().cost(what, base)
        if base:  # the dense layer is the yardstick
            return moved, flops
        dense = self.n * self.k * self.itemsize
        return moved - (2 if what == BOTH else 1) * (dense - self._quantize(torch.zeros(self.n, self.k)).nbytes), flops

    def _quantize(self, weight):
        return formats.quantize(weight, self.format)


@dataclass(frozen=True)
class QuantizedLinear(_Quantized, Linear):
    format: str = "nf4"

    operation, passes = "quantized", (FORWARD, BOTH)

    __str__ = _Quantized.__str__

    def tensors(self, device, seed=0):
        return self._over(super().tensors(device, seed))

    def _over(self, tensors: LinearTensors):
        quantized = self._quantize(tensors.weight)
        return QuantizedLinearTensors(*tensors._replace(weight=quantized.dequantize(tensors.x.dtype)), quantized)

    def step(self, provider, tensors, what):
        layer, parameters = provider.quantized(self, tensors)
        if what == FORWARD:
            return lambda: layer(tensors.x)
        return lambda: torch.autograd.grad(layer(tensors.x), (tensors.x, *parameters), tensors.dy)

    def judge(self, provider, device):
        """The worst of y, dx, dA and dB, as a multiple of its error budget."""
        drawn = testing.make_tensors(self.case, device)
        tensors = self._over(LinearTensors(drawn.x, drawn.weight, drawn.lora_a, drawn.lora_b, drawn.dy))
        truth, eager, magnitude = testing.expected(self.case, drawn._replace(weight=tensors.weight))
        x, a, b = (t.detach().clone().requires_grad_() for t in (drawn.x, drawn.lora_a, drawn.lora_b))
        layer, parameters = provider.quantized(self, tensors._replace(x=x, lora_a=a, lora_b=b))
        y = layer(x)
        results = {"y": y.detach()}
        results |= dict(zip(("dx", "da", "db"), torch.autograd.grad(y, (x, *parameters), drawn.dy), strict=True))
        return max(
            of_budget(self.case, name, t, truth[name], eager[name], magnitude[name]) for name, t in results.items()
        )


@dataclass(frozen=True)
class QuantizedBatched(_Quantized, Batched):
    format: str = "nf4"

    operation, passes = "quantized_batched", (INFERENCE,)

    __str__ = _Quantized.__str__

    def tensors(self, device, seed=0):
        tensors: BatchedTensors = super().tensors(device, seed)
        quantized = self._quantize(tensors.weight)
        return QuantizedBatchedTensors(*tensors._replace(weight=quantized.dequantize(tensors.x.dtype)), quantized)

    def step(self, provider, tensors, what):
        layer = provider.quantized_batched(self, tensors)

        def step():
            with torch.inference_mode():
                return layer(tensors.x)

        return step

    def judge(self, provider, device):
        """y as a multiple of its error budget."""
        tensors = self.tensors(device)

        def y(dtype):
            x, weight, a, b = (t.to(dtype) for t in tensors[:4])
            return reference.lora_linear_batched(x, weight, a, b, tensors.ranks, tensors.scalings, tensors.slots)

        truth = y(torch.float64)
        case = testing.Case(self.m, self.n, self.k, max(self.ranks), getattr(torch, self.dtype))
        return of_budget(case, "y", self.step(provider, tensors, INFERENCE)().clone(), truth, y(tensors.x.dtype), truth)


OTHERS = ("int8", "fp8", "int4")
GPU = (
    QuantizedLinear(8192, 4096, 4096, 16),
    QuantizedBatched(1, 4096, 4096, 1),
    QuantizedBatched(32, 4096, 4096, 32),
    QuantizedLinear(8192, 14336, 4096, 16),
    QuantizedBatched(8, 14336, 4096, 8),
    QuantizedBatched(128, 4096, 4096, 16),
    *(QuantizedLinear(8192, 4096, 4096, 16, format=name) for name in OTHERS),
    *(QuantizedBatched(m, 4096, 4096, m, format=name) for name in OTHERS for m in (1, 32)),
)
CPU = (
    QuantizedLinear(256, 1024, 1024, 16),
    QuantizedBatched(16, 1024, 1024, 16),
    *(QuantizedBatched(16, 1024, 1024, 16, format=name) for name in OTHERS),
    *(QuantizedLinear(256, 1024, 1024, 16, format=name) for name in OTHERS),
)

SUITE = Suite("qlora", "Over a quantised base, one layer", {"cuda": GPU, "cpu": CPU}, quick={"cuda": 3, "cpu": 5})
