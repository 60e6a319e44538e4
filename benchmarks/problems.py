"""What is run: one layer, or one block, of a given size. Each knows its tensors, its least cost and its judge."""

import functools
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lora_kernels import reference, testing
from lora_kernels.roofline import Ceilings

INFERENCE, FORWARD, BACKWARD, BOTH = "inference", "forward", "backward", "forward + backward"


class LinearTensors(NamedTuple):
    """x `[M,K]`, weight `[N,K]`, lora_a `[R,K]`, lora_b `[N,R]` (parameters), dy `[M,N]`."""

    x: Tensor
    weight: Tensor
    lora_a: nn.Parameter
    lora_b: nn.Parameter
    dy: Tensor


class BatchedTensors(NamedTuple):
    """x `[M,K]`, weight `[N,K]`, a `[adapters,R,K]`, b `[adapters,N,R]`, ranks and scalings `[adapters]`, slots `[M]`."""

    x: Tensor
    weight: Tensor
    a: Tensor
    b: Tensor
    ranks: Tensor
    scalings: Tensor
    slots: Tensor


@dataclass(frozen=True)
class Linear:
    """One layer with one adapter of rank r that is trained; `sets` of tensors in turn, 0: as many as outgrow a GPU's L2."""

    m: int
    n: int
    k: int
    r: int
    dtype: str = "bfloat16"
    dropout: float = 0.0
    sets: int = 0

    operation, passes = "linear", (FORWARD, BACKWARD, BOTH)
    scaling = 2.0

    def __str__(self):
        extra = f", dropout {self.dropout}" if self.dropout else ""
        return f"{self.m} × {self.n} × {self.k}, r {self.r}, {self.dtype}{extra}"

    @property
    def itemsize(self) -> int:
        return getattr(torch, self.dtype).itemsize

    @property
    def bytes_per_set(self) -> int:
        return self.itemsize * (self.m * self.k + self.n * self.k + self.m * self.n)

    @property
    def case(self) -> testing.Case:
        dtype = getattr(torch, self.dtype)
        return testing.Case(self.m, self.n, self.k, self.r, dtype, scaling=self.scaling, dropout_p=self.dropout)

    def tensors(self, device: torch.device, seed: int = 0) -> LinearTensors:
        normal = _normal(self.dtype, device, seed)
        m, n, k, r = self.m, self.n, self.k, self.r
        a, b = normal(r, k, scale=k**-0.5), normal(n, r, scale=r**-0.5)
        x, weight = normal(m, k).requires_grad_(), normal(n, k, scale=k**-0.5)
        return LinearTensors(x, weight, nn.Parameter(a), nn.Parameter(b), normal(m, n))

    def cost(self, what: str, base: bool) -> tuple[int, int]:
        """Least bytes and flops of a pass; `base` is the layer without the adapter, whose backward is dx alone."""
        m, n, k, r = self.m, self.n, self.k, 0 if base else self.r
        operands, flops = m * k + n * k + m * n, 2 * m * n * k
        forward = operands + r * (k + n), flops + 2 * m * r * (k + n)
        # It reads dy, W, x, h, A and B, and writes dx, dA and dB.
        backward = operands + (m * k + m * r + 2 * r * (k + n) if r else 0), flops + 4 * m * r * (k + n)
        both = forward[0] + backward[0], forward[1] + backward[1]
        moved, flops = {INFERENCE: forward, FORWARD: forward, BACKWARD: backward, BOTH: both}[what]
        return self.itemsize * moved, flops

    def step(self, provider, tensors: LinearTensors, what: str):
        """The function that is timed."""
        layer, parameters = provider.linear(self, tensors)
        if what == FORWARD:
            return lambda: layer(tensors.x)
        if what == INFERENCE:
            return _inference(lambda: layer(tensors.x))
        trained = (tensors.x, *parameters)
        if what == BOTH:
            return lambda: torch.autograd.grad(layer(tensors.x), trained, tensors.dy)

        @functools.cache  # runs at the first call: on the stream that is timed later
        def once():
            return layer(tensors.x)

        return lambda: torch.autograd.grad(once(), trained, tensors.dy, retain_graph=True)

    def judge(self, provider, device: torch.device) -> float:
        """The worst of y, dx, dA and dB, as a multiple of its error budget (without dropout, whose masks differ)."""
        certain = replace(self, dropout=0.0)
        inputs, truth, eager, magnitude = _expected(certain, device)
        x, weight, _, lora_a, lora_b, dy = (None if t is None else t.clone() for t in inputs[:6])
        tensors = LinearTensors(x.requires_grad_(), weight, nn.Parameter(lora_a), nn.Parameter(lora_b), dy)
        layer, parameters = provider.linear(certain, tensors)
        y = layer(tensors.x)
        grads = torch.autograd.grad(y, (tensors.x, *parameters), dy)
        results = {"y": y.detach()} | dict(zip(("dx", "da", "db"), grads, strict=True))
        case = certain.case
        return max(of_budget(case, name, t, truth[name], eager[name], magnitude[name]) for name, t in results.items())


@dataclass(frozen=True)
class Batched:
    """One layer in inference, `distinct` adapters in a batch of m rows; `ranks` go round among them."""

    m: int
    n: int
    k: int
    distinct: int
    ranks: tuple[int, ...] = (16,)
    dtype: str = "bfloat16"
    sets: int = 0

    operation, passes = "batched", (INFERENCE,)
    case = None  # testing.check has none for a batch

    def __str__(self):
        ranks = f"r {'/'.join(map(str, self.ranks))}"
        cold = f", {self.sets} layers in turn" if self.sets > 1 else ""
        adapters = f"{self.distinct} adapter{'s' * (self.distinct > 1)}"
        return f"{self.m} × {self.n} × {self.k}, {adapters}, {ranks}, {self.dtype}{cold}"

    @property
    def itemsize(self) -> int:
        return getattr(torch, self.dtype).itemsize

    @property
    def rank_of(self) -> list[int]:
        return [self.ranks[i % len(self.ranks)] for i in range(self.distinct)]

    @property
    def bytes_per_set(self) -> int:
        m, n, k = self.m, self.n, self.k
        return self.itemsize * (m * k + n * k + m * n + self.distinct * max(self.ranks) * (n + k))

    def tensors(self, device: torch.device, seed: int = 0) -> BatchedTensors:
        normal, k, widest = _normal(self.dtype, device, seed), self.k, max(self.ranks)
        ranks = torch.tensor(self.rank_of, dtype=torch.int32, device=device)
        a, b = (
            normal(self.distinct, widest, k, scale=k**-0.5),
            normal(self.distinct, self.n, widest, scale=widest**-0.5),
        )
        unused = torch.arange(widest, device=device) >= ranks[:, None]
        a.masked_fill_(unused[:, :, None], 0.0), b.masked_fill_(unused[:, None], 0.0)  # rivals pad with zeros
        slots = self.slots(device)
        scalings = torch.full((self.distinct,), 2.0, device=device)
        x, weight = normal(self.m, k), normal(self.n, k, scale=k**-0.5)
        return BatchedTensors(x, weight, a, b, ranks, scalings, slots)

    def slots(self, device: torch.device) -> Tensor:
        """The adapter of each row: they go round, as the sequences of a decode step do."""
        return torch.arange(self.m, dtype=torch.int32, device=device) % self.distinct

    def cost(self, what: str, base: bool) -> tuple[int, int]:
        """Least bytes and flops; each adapter in the batch is read once."""
        m, n, k = self.m, self.n, self.k
        of_rows = sum(self.rank_of[i % self.distinct] for i in range(m))
        moved, flops = m * k + n * k + m * n, 2 * m * n * k
        if not base:
            moved, flops = moved + sum(self.rank_of) * (n + k), flops + 2 * of_rows * (n + k)
        return self.itemsize * moved, flops

    def step(self, provider, tensors: BatchedTensors, what: str):
        """The function that is timed."""
        layer = provider.batched(self, tensors)
        return _inference(lambda: layer(tensors.x))

    def judge(self, provider, device: torch.device) -> float:
        """y as a multiple of its error budget."""
        tensors, truth, eager = _expected_of_batch(self, device)
        case = testing.Case(self.m, self.n, self.k, max(self.ranks), getattr(torch, self.dtype))
        return of_budget(case, "y", self.step(provider, tensors, INFERENCE)().clone(), truth, eager, truth)


def roofline_seconds(problem, what: str, base: bool, ceilings: Ceilings) -> float:
    """No run of the pass can be faster: its least bytes at full bandwidth, or its flops at the peak."""
    moved, flops = problem.cost(what, base)
    return max(moved / ceilings.bandwidth, flops / ceilings.flops)


def _inference(call):
    def step():
        with torch.inference_mode():
            return call()

    return step


def _normal(dtype, device, seed):
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*size, scale=1.0):
        return (torch.randn(size, generator=generator, device=device) * scale).to(getattr(torch, dtype))

    return normal


@functools.lru_cache(maxsize=8)  # the providers of one problem come one after another, and a block has five layers
def _expected(problem, device):
    tensors = testing.make_tensors(problem.case, device)
    return tensors, *testing.expected(problem.case, tensors)


@functools.lru_cache(maxsize=1)
def _expected_of_batch(problem, device):
    tensors = problem.tensors(device)

    def y(dtype):
        return reference.lora_linear_batched(
            *(t.to(dtype) for t in tensors[:4]), tensors.ranks, tensors.scalings, tensors.slots
        )

    return tensors, y(torch.float64), y(tensors.x.dtype)


def of_budget(case, name: str, actual: Tensor, truth: Tensor, eager: Tensor, magnitude: Tensor) -> float:
    """The error of `actual` as a multiple of its budget; AssertionError for another shape."""
    if actual.shape != eager.shape:
        raise AssertionError(f"{name}: got {list(actual.shape)}, expected {list(eager.shape)}")
    measured = testing.errors(actual, truth, magnitude)
    budgets = testing.budgets(case, name, truth, eager, magnitude)
    return max(measured[metric][0] / budget.limit for metric, budget in budgets.items())
