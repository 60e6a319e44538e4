"""Random batches in which every row has its own adapters, and the judge of their results."""

import ctypes
import math

import torch
from conftest import DEVICE, INTERPRETED

from lora_kernels import BatchPlan, LayerAdapters, lora_linear_batched, reference, testing
from lora_kernels.backends import BATCHED_BACKENDS, cpu_library

KERNELS = [("triton", strategy) for strategy in BATCHED_BACKENDS["triton"].STRATEGIES]
COMPILED = [("cpu", "chained")] if DEVICE == "cpu" and isinstance(cpu_library.library(), ctypes.CDLL) else []
CHOICES = [("eager", "looped"), *(KERNELS if INTERPRETED or torch.cuda.is_available() else []), *COMPILED]


class Batch:
    """Adapters of random ranks (NaN past each), one `LayerAdapters` for each of `widths`; with `per_row` > 1 weighted."""

    def __init__(
        self, m=40, widths=(72,), k=96, slots=5, rank=33, dtype=torch.float32, device="cpu", popularity="uniform",
        bias=True, per_row=1,
    ):  # fmt: skip
        generator = torch.Generator().manual_seed(m * sum(widths) + k * rank + slots)

        def normal(*shape, scale=1.0):
            return (torch.randn(shape, generator=generator) * scale).to(dtype)

        n = sum(widths)
        self.x, self.weight, self.bias = normal(m, k), normal(n, k, scale=k**-0.5), normal(n) if bias else None
        self.adapters = tuple(
            LayerAdapters(
                normal(slots, rank, k, scale=k**-0.5),
                normal(slots, width, rank, scale=rank**-0.5),
                torch.randint(1, rank + 1, (slots,), generator=generator, dtype=torch.int32),
                torch.rand(slots, generator=generator) + 0.5,
            )
            for width in widths
        )
        for one_slice in self.adapters:
            for slot, r in enumerate(one_slice.ranks.tolist()):
                one_slice.a[slot, r:] = one_slice.b[slot, :, r:] = math.nan
        shape = (m,) if per_row == 1 else (m, per_row)
        self.slots = {
            "uniform": torch.randint(-1, slots, shape, generator=generator),
            "identical": torch.full(shape, slots - 1),
            "distinct": torch.arange(m * per_row).view(shape) % slots,
            "zipf": (torch.rand(shape, generator=generator).pow(3) * slots).long(),
            "base": torch.full(shape, -1),
        }[popularity].int()
        self.weights = torch.rand(shape, generator=generator) + 0.5 if per_row > 1 else None
        self.device = device

    def run(self, choice, rows=slice(None), **change):
        """What `choice` makes of the rows, with some of the attributes changed."""
        t = {**vars(self), **change}
        x, weight, bias, slots, weights = (
            None if t[name] is None else t[name].to(self.device) for name in ("x", "weight", "bias", "slots", "weights")
        )
        adapters = tuple(on(one_slice, self.device) for one_slice in t["adapters"])
        plan = BatchPlan(slots[rows], None if weights is None else weights[rows])
        with testing.poisoned_empty():
            return lora_linear_batched(
                x[rows], weight, adapters, plan, bias=bias, backend=choice[0], strategy=choice[1]
            ).cpu()

    def expected(self, dtype=torch.float64):
        """The reference, row by row and slice by slice."""
        widths = [one_slice.b.shape[1] for one_slice in self.adapters]
        bias = [None] * len(widths) if self.bias is None else self.bias.to(dtype).split(widths)
        slices = zip(self.weight.to(dtype).split(widths), self.adapters, bias, strict=True)
        return torch.cat([
            reference.lora_linear_batched(
                self.x.to(dtype), weight, one_slice.a.to(dtype), one_slice.b.to(dtype), one_slice.ranks,
                one_slice.scalings, self.slots, bias, self.weights,
            )
            for weight, one_slice, bias in slices
        ], dim=1)  # fmt: skip


def on(adapters: LayerAdapters, device, **change) -> LayerAdapters:
    """The same adapters on another device, with some of their tensors changed."""
    names = ("a", "b", "ranks", "scalings")
    return LayerAdapters(*(change.get(name, getattr(adapters, name)).to(device) for name in names))


def assert_within_budget(batch, y):
    truth, eager = batch.expected(), batch.expected(batch.x.dtype)
    scale = truth.square().mean().sqrt()

    def rms(t):
        return ((t.double() - truth).square().mean().sqrt() / scale).item()

    assert y.dtype == batch.x.dtype and y.shape == truth.shape
    if not y.numel():
        return
    terms = sum(one_slice.a.shape[2] + one_slice.a.shape[1] for one_slice in batch.adapters)
    accumulation = torch.finfo(torch.float32).eps * math.sqrt(terms)
    floor = 2 * torch.finfo(y.dtype).eps / math.sqrt(y.numel()) + accumulation  # as in docs/numerics.md
    assert rms(y) <= 1.25 * rms(eager) + floor


def packed(adapters, device=DEVICE):
    """The same adapters with rows for their own ranks, in any order and with gaps (NaN)."""
    ranks = adapters.ranks.tolist()
    total = sum(ranks) + 3 * len(ranks)
    a, b = (
        torch.full((total, size), math.nan, dtype=adapters.a.dtype)
        for size in (adapters.a.shape[2], adapters.b.shape[1])
    )
    first_row, row = torch.empty(len(ranks), dtype=torch.int64), 2
    for slot in reversed(range(len(ranks))):
        rows = slice(row, row + ranks[slot])
        a[rows], by_column = adapters.slot(slot, ranks[slot])
        b[rows], first_row[slot] = by_column.mT, row
        row += ranks[slot] + 3
    parts = (a, b, adapters.ranks, adapters.scalings, first_row)
    return LayerAdapters(*(part.to(device) for part in parts), adapters.max_rank)
