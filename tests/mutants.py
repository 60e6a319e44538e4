"""A model backend that keeps the contract to the letter, and mutants of it that each break one clause.

A mutant overrides as little as it can; its docstring says which clause, `rejected` how the judge must put it. `case`
changes the standard problem where the defect would not show in it; `half_only` marks clauses about half precision.
"""

from typing import ClassVar

import torch

from lora_kernels import reference

K_TILE = 32


class Model:
    """Every product in fp32 or better from the rounded operands; h, g and the results are rounded once."""

    STRATEGIES = ("model",)
    rejected = ""
    case: ClassVar[dict] = {}
    half_only = False

    def reasons_unsupported(self, problem):
        return []

    def forward(self, x, weight, bias, lora_a, lora_b, scaling, dropout_p, seed, strategy):
        h = self.scale(self.matmul(self.drop(x, dropout_p, seed), lora_a.to(x.dtype).mT), scaling)
        h_used = self.h_used(h, x.dtype)
        y = self.base(x, weight) + self.matmul(h_used, lora_b.to(x.dtype).mT)
        if bias is not None:
            y = self.add_bias(y, bias)
        return self.store(y, x.dtype), h.to(x.dtype)

    def backward(self, dy, x, h, weight, lora_a, lora_b, scaling, dropout_p, seed, needs, strategy):
        dx = da = db = None
        g = (scaling * self.matmul(dy, lora_b.to(dy.dtype))).to(dy.dtype)
        if needs[0]:
            dx = self.dx(dy, weight, g, lora_a.to(dy.dtype), dropout_p, seed).to(dy.dtype)
        if needs[1]:
            da = self.da(g, x, dropout_p, seed).to(lora_a.dtype)
        if needs[2]:
            db = self.db(dy, h).to(lora_b.dtype)
        return dx, da, db

    def base(self, x, weight):
        return self.matmul(x, weight.mT)

    def matmul(self, left, right):
        accumulator = torch.promote_types(left.dtype, torch.float32)
        return left.to(accumulator) @ right.to(accumulator)

    def drop(self, t, dropout_p, seed):
        if dropout_p == 0.0:
            return t
        keep = reference.dropout_keep(seed, *t.shape, dropout_p, t.device)
        return reference.drop(t.to(torch.promote_types(t.dtype, torch.float32)), keep, dropout_p)

    def scale(self, t, scaling):
        return scaling * t

    def h_used(self, h, dtype):
        return h.to(dtype)

    def add_bias(self, y, bias):
        return y + bias

    def store(self, y, dtype):
        out = torch.empty(y.shape, dtype=dtype, device=y.device)
        return out.copy_(y)

    def dx(self, dy, weight, g, lora_a, dropout_p, seed):
        return self.matmul(dy, weight) + self.drop(self.matmul(g, lora_a), dropout_p, seed)

    def da(self, g, x, dropout_p, seed):
        return self.matmul(g.mT, self.drop(x, dropout_p, seed))

    def db(self, dy, h):
        return self.matmul(dy.mT, h)


class MaskDropped(Model):
    """Loads of x reach past its last column."""

    rejected = "^y: "

    def base(self, x, weight):
        def widened(t):
            return t.as_strided((t.shape[0], t.shape[1] + 1), t.stride())

        return self.matmul(widened(x), widened(weight).mT)


class StoreMaskDropped(Model):
    """Stores of y reach past its last row."""

    rejected = "outside its buffer"

    def store(self, y, dtype):
        out = super().store(y, dtype)
        out.as_strided((1, out.shape[1]), out.stride(), out.storage_offset() + out.numel()).fill_(0)
        return out


class LastRowNotStored(Model):
    """The last row of y is left as it was allocated."""

    rejected = "^y: .* NaN"

    def store(self, y, dtype):
        out = torch.empty(y.shape, dtype=dtype, device=y.device)
        out[:-1] = y[:-1]
        return out


class LastKTileSkipped(Model):
    """The base product stops at a multiple of the K tile."""

    rejected = "^y: "

    def base(self, x, weight):
        full = x.shape[1] // K_TILE * K_TILE
        return self.matmul(x[:, :full], weight[:, :full].mT)


class LastKTileOfTheAdapterSkipped(Model):
    """x Aᵀ stops at a multiple of the K tile."""

    rejected = "^y: "

    def drop(self, t, dropout_p, seed):
        t = super().drop(t, dropout_p, seed).clone()
        t[:, t.shape[1] // K_TILE * K_TILE :] = 0
        return t


class ScalingIgnored(Model):
    """h is not scaled."""

    rejected = "^y: "

    def scale(self, t, scaling):
        return t


class AdapterDropped(Model):
    """y is the base layer's: at this scaling `allclose(atol=5e-2)` would not mind."""

    rejected = "^y: "
    case: ClassVar[dict] = {"scaling": 0.01}

    def h_used(self, h, dtype):
        return torch.zeros_like(h, dtype=dtype)


class BiasIgnored(Model):
    """y has no bias."""

    rejected = "^y: "

    def add_bias(self, y, bias):
        return y


class HNotRounded(Model):
    """y uses h in fp32, and backward another, rounded h."""

    rejected = "^y: not h Bᵀ rounded once"
    half_only = True

    def h_used(self, h, dtype):
        return h


class AccumulatorRounded(Model):
    """Partial sums over K are rounded to the working dtype."""

    rejected = "^y: rms"
    half_only = True
    case: ClassVar[dict] = {"k": 1024, "bias": False, "dropout_p": 0.0, "needs": ("lora_a",)}

    def base(self, x, weight):
        total = 0.0
        for x_tile, w_tile in zip(x.split(K_TILE, 1), weight.split(K_TILE, 1), strict=True):
            total = (total + self.matmul(x_tile, w_tile.mT)).to(x.dtype)
        return total.float()


class DaNegated(Model):
    """dA has the wrong sign."""

    rejected = "^da: "

    def da(self, *args):
        return -super().da(*args)


class DbDoubled(Model):
    """dB is twice too large."""

    rejected = "^db: "

    def db(self, *args):
        return 2 * super().db(*args)


class DxWithoutLora(Model):
    """dX has the base term only."""

    rejected = "^dx: "

    def dx(self, dy, weight, *args):
        return self.matmul(dy, weight)


class OtherMaskInBackward(Model):
    """dA is taken with another dropout mask than y."""

    rejected = "^da: "

    def da(self, g, x, dropout_p, seed):
        return super().da(g, x, dropout_p, seed + 1)


class OtherMaskInDx(Model):
    """dX is taken with another dropout mask than y."""

    rejected = "^dx: "

    def dx(self, dy, weight, g, lora_a, dropout_p, seed):
        return super().dx(dy, weight, g, lora_a, dropout_p, seed + 1)


class KeptNotScaledUp(Model):
    """What dropout keeps is not divided by 1 - p."""

    rejected = "^y: "

    def drop(self, t, dropout_p, seed):
        return super().drop(t, dropout_p, seed) * (1.0 - dropout_p)


class Unrepeatable(Model):
    """Two runs differ in the last bit."""

    rejected = "^y: a second run"

    def store(self, y, dtype):
        return super().store(y * (1.0 + torch.finfo(dtype).eps * torch.rand(y.shape)), dtype)


class InputOverwritten(Model):
    """The memory in front of x is written to."""

    rejected = "^x: the input"

    def base(self, x, weight):
        x.data.as_strided((1,), (1,), 0).fill_(0.0)  # .data: autograd must not notice
        return super().base(x, weight)


MUTANTS = sorted(Model.__subclasses__(), key=lambda mutant: mutant.__name__)
