"""Every fused call also runs PEFT's own forward, and that in fp64: the result and each gradient must be as near to it."""

import contextlib
import copy
from collections.abc import Iterator

import torch
from peft.tuners.lora.layer import Linear
from torch import Tensor

from lora_kernels import formats, functional, reference
from lora_kernels.integrations import peft as integration
from lora_kernels.integrations.checks import NotFused
from lora_kernels.integrations.peft import Fused

# How much larger than PEFT's own error ours may be (sums are reordered), and how many eps of rounding are free.
FACTOR, FREE_EPS = 2.0, 4.0


class Judge:
    """Counts what it compared, and keeps what was wrong: a test may swallow the error that it raises."""

    def __init__(self):
        self.calls = self.gradients = self.mixed = 0
        self.not_fused: dict[str, int] = {}
        self.wrong: list[str] = []

    @contextlib.contextmanager
    def watching(self) -> Iterator["Judge"]:
        """Judge every call until the end of the block."""
        fused = Fused._fused

        def judged(layer, x, *args, **kwargs):
            if torch.compiler.is_compiling():
                return fused(layer, x, *args, **kwargs)
            try:
                y = fused(layer, x, *args, **kwargs)
            except NotFused as reason:
                self.not_fused[reason.args[0]] = self.not_fused.get(reason.args[0], 0) + 1
                raise
            if layer.active_names() or "adapter_names" in kwargs:
                with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
                    self._compare(fused, layer, x, kwargs)
            return y

        Fused._fused = judged
        try:
            yield self
        finally:
            Fused._fused = fused

    def _compare(self, fused, layer, x, kwargs):
        self.calls += 1
        self.mixed += kwargs.get("adapter_names") is not None
        differentiable = (
            torch.is_grad_enabled() and not torch.is_inference_mode_enabled() and "adapter_names" not in kwargs
        )
        exact, own = _in_fp64(layer), _copy(layer)  # a copy: bitsandbytes repacks a weight that it evaluates
        own.__class__ = next(kind for kind in type(layer).__mro__ if kind.__module__.startswith("peft."))
        with _recorded_seeds() as seeds:
            ours = _results(lambda x: fused(layer, x, **kwargs), layer, x, differentiable)
        with _same_dropout(seeds):
            theirs = _results(lambda x: type(own).forward(own, x, **kwargs), own, x, differentiable)
            with torch.autocast(x.device.type, enabled=False):
                truth = _results(lambda x: Linear.forward(exact, x, **kwargs), exact, x.double(), differentiable)
        eps = max(torch.finfo(t.dtype).eps for t in (x, ours["y"], layer.lora_A[next(iter(layer.lora_A))].weight))
        assert ours.keys() == theirs.keys() == truth.keys()
        self.gradients += len(ours) - 1
        for name, actual in ours.items():
            if actual.dtype != theirs[name].dtype or actual.shape != theirs[name].shape:
                self._fail(
                    f"{name} is {actual.dtype} {list(actual.shape)}, PEFT's {theirs[name].dtype} {list(actual.shape)}"
                )
            error, allowed = _error(actual, truth[name]), FACTOR * _error(theirs[name], truth[name]) + FREE_EPS * eps
            if not error <= allowed:
                self._fail(
                    f"{name} is off by {error:.2e}, more than {allowed:.2e} (PEFT's own error, {FREE_EPS:.0f} eps)"
                )

    def _fail(self, message):
        self.wrong.append(message)
        raise AssertionError(f"fused call {self.calls}: {message}")


def _copy(layer):
    """A deep copy, of the views too that FSDP1 has for parameters while it runs."""
    views = {
        id(t): torch.nn.Parameter(t.detach().clone(), t.requires_grad) for t in layer.parameters() if not t.is_leaf
    }
    return copy.deepcopy(layer, views)


def _in_fp64(layer):
    """PEFT's plain layer over the very values of the base."""
    exact, base = _copy(layer), layer.base_layer
    if (weight := formats.from_linear(base)) is not None:
        exact.base_layer = torch.nn.Linear(*weight.shape[::-1], base.bias is not None, device=weight.device)
        exact.base_layer.weight.data = weight.dequantize(torch.float64)
        if base.bias is not None:
            exact.base_layer.bias.data = base.bias.data
        exact.base_layer.requires_grad_(False)
    exact.double().__class__ = Linear
    return exact


def _results(forward, layer, x, differentiable) -> dict[str, Tensor]:
    """y, and the gradients of all that trains, for one and the same dy."""
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):  # a checkpoint counts what is saved
        x = x.detach().clone().requires_grad_(differentiable)
        y = forward(x)
        results = {"y": y.detach()}
        if differentiable:
            inputs = {"dx": x} | {f"d{name}": p for name, p in layer.named_parameters() if p.requires_grad}
            dy = torch.randn(y.shape, generator=torch.Generator("cpu").manual_seed(0), device="cpu").to(y)
            gradients = torch.autograd.grad(y, list(inputs.values()), dy, allow_unused=True)
            results |= {name: g for name, g in zip(inputs, gradients, strict=True) if g is not None}
    return results


def _error(actual, truth) -> float:
    """The root of the mean square of the error, relative to the truth's; infinite where one is zero, and the other not."""
    actual, truth = actual.double(), truth.double()
    if torch.equal(actual, truth):
        return 0.0
    if not truth.isfinite().all():  # tests of broken adapters have NaN and Inf, which must be ours too
        return 0.0 if torch.equal(actual.isfinite(), truth.isfinite()) else float("inf")
    error, size = (actual - truth).square().mean().sqrt(), truth.square().mean().sqrt()
    return float("inf") if size == 0 or not error.isfinite() else float(error / size)


@contextlib.contextmanager
def _recorded_seeds():
    seeds, draw = [], functional.draw_seed

    def recorded(device):
        seeds.append(draw(device))
        return seeds[-1]

    functional.draw_seed = recorded
    try:
        yield seeds
    finally:
        functional.draw_seed = draw


@contextlib.contextmanager
def _same_dropout(seeds):
    """PEFT's dropout layers drop what ours did: only then can results be compared."""
    dropout = torch.nn.functional.dropout

    def dropped(x, p=0.5, training=True, inplace=False):
        if not training or p == 0.0:
            return x
        [seed] = seeds
        rows = x.reshape(-1, x.shape[-1])
        return reference.drop(rows, reference.dropout_keep(seed, *rows.shape, p, device=x.device), p).view(x.shape)

    torch.nn.functional.dropout = dropped
    try:
        yield
    finally:
        torch.nn.functional.dropout = dropout


def _times_1001(*args, **kwargs):
    x, weight, lora_a, lora_b, scaling = args
    return functional.lora_linear(x, weight, lora_a, lora_b, scaling * 1.001, **kwargs)


def _negated_da(*args, **kwargs):
    x, weight, lora_a, *rest = args
    return functional.lora_linear(x, weight, _Negated.apply(lora_a), *rest, **kwargs)


class _Negated(torch.autograd.Function):
    @staticmethod
    def forward(ctx, a):
        return a.clone()

    @staticmethod
    def backward(ctx, da):
        return -da


FAULTS = {"scaling x 1.001": _times_1001, "dA negated": _negated_da}


@contextlib.contextmanager
def planted(fault: str) -> Iterator[None]:
    """While it is active, every fused call has the fault."""
    sound = integration.lora_linear
    integration.lora_linear = FAULTS[fault]
    try:
        yield
    finally:
        integration.lora_linear = sound
