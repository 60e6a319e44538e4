"""A model backend that keeps the contract to the letter, and mutants of it that each break one clause.

A mutant overrides as little as it can. `broken` says which clause, `case` changes the standard problem where that is
needed to show the defect, and `half_only` marks clauses about half precision.
"""

import torch

from lora_kernels import reference

K_TILE = 32


class Model:
    """Every product in fp32 or better from the rounded operands; h, g and the results are rounded once."""

    STRATEGIES = ("model",)
    broken = ""
    case: dict = {}
    half_only = False

    def reasons_unsupported(self, problem):
        return []

    def forward(self, x, weight, bias, lora_a, lora_b, scaling, dropout_p, seed, strategy):
        h = self.scale(self.matmul(self.drop(x, dropout_p, seed), lora_a.to(x.dtype).mT), scaling)
        h_used = self.h_used(h, x.dtype)
        y = self.matmul(x, weight.mT) + self.matmul(h_used, lora_b.to(x.dtype).mT)
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
