"""The scheme of Unsloth and Axolotl, without their packages: cuBLAS adds the adapter's term to the base layer's y."""

import torch
import torch.nn.functional as F

from benchmarks.providers import Provider


class Addmm(torch.autograd.Function):
    """`dense()` is the weight, asked for in each pass."""

    @staticmethod
    def forward(ctx, x, dense, lora_a, lora_b, scaling):
        ctx.save_for_backward(x, lora_a, lora_b)
        ctx.dense, ctx.scaling = dense, scaling
        return F.linear(x, dense()).addmm_(x @ lora_a.mT, lora_b.mT, alpha=scaling)

    @staticmethod
    def backward(ctx, dy):
        x, lora_a, lora_b = ctx.saved_tensors
        g = dy @ lora_b
        da = (g.mT @ x).mul_(ctx.scaling)
        db = (dy.mT @ (x @ lora_a.mT)).mul_(ctx.scaling)
        return (dy @ ctx.dense()).addmm_(g, lora_a, alpha=ctx.scaling), None, da, db, None


def providers(device: torch.device) -> list[Provider]:
    return [Provider("addmm scheme", _linear)]


def _linear(problem, tensors):
    if problem.dropout:
        raise NotImplementedError("has no dropout: Unsloth takes another path there, Axolotl a dropout module before")
    lora = (tensors.lora_a, tensors.lora_b)
    return lambda x: Addmm.apply(x, lambda: tensors.weight, *lora, problem.scaling), lora
