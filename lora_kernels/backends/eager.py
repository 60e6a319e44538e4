"""Plain PyTorch: runs everywhere, and is the fallback where no kernel applies.

The strategy is `chained`: the adapter's term is written first and the base GEMM accumulates onto it (beta = 1), which
saves the scale and add passes of the usual module stack.
"""

import torch
from torch.nn.functional import gelu, linear, silu

from lora_kernels import reference
from lora_kernels.backends.operands import cast, with_clean_rows

STRATEGIES = ("chained",)


def reasons_unsupported(problem) -> list[str]:
    """Why this backend cannot run `problem`: never a reason."""
    return []


def strategy_reasons_unsupported(strategy, problem) -> list[str]:
    """Why `strategy` cannot run `problem`: never a reason."""
    return []


def forward(x, weight, bias, lora_a, lora_b, scaling, dropout_p, seed, strategy):
    """`y [M,N]` and `h [M,R] = scaling drop(x) Aᵀ`, both in x's dtype."""
    h = shrink(_drop(x, dropout_p, seed), lora_a, scaling)
    return expand(x, weight, h, lora_b, bias, strategy), h


def backward(dy, x, h, weight, lora_a, lora_b, scaling, dropout_p, seed, needs, strategy):
    """`(dx [M,K], da [R,K], db [N,R])`, None where `needs` says so; da and db in lora_a's dtype."""
    needs_x, needs_a, needs_b = needs
    dx = da = db = None
    dy = with_clean_rows(dy)
    if needs_x or needs_a:
        g = dy.mm(cast(lora_b, dy)).mul_(scaling)
    if needs_x:
        dx = _drop(with_clean_rows(g).mm(cast(lora_a, dy)), dropout_p, seed).addmm_(dy, weight)
    if needs_a:
        da = g.mT.mm(_drop(x, dropout_p, seed)).to(lora_a.dtype)
    if needs_b:
        db = dy.mT.mm(h).to(lora_b.dtype)
    return dx, da, db


def shrink(x, lora_a, scaling):
    """`h [M,R] = scaling x Aᵀ`."""
    return linear(with_clean_rows(x), cast(lora_a, x)).mul_(scaling)


def expand(x, weight, h, lora_b, bias, strategy):
    """`y [M,N] = x Wᵀ + bias + h Bᵀ`."""
    return linear(with_clean_rows(h), cast(lora_b, x), bias).addmm_(with_clean_rows(x), weight.mT)


def dy_products(dy, h, lora_b, scaling, needs_g, needs_b):
    """`g [M,R] = scaling dy B` and `db [N,R] = dyᵀ h`, None where not needed."""
    g = with_clean_rows(dy).mm(cast(lora_b, dy)).mul_(scaling) if needs_g else None
    return g, dy.mT.mm(h).to(lora_b.dtype) if needs_b else None


def wgrad(x, g, dtype):
    """`da [R,K] = gᵀ x`."""
    return g.mT.mm(x).to(dtype)


def glu(z, u, activation):
    """`f(z) ∘ u`, both `[M,N]`."""
    return _activate(z, activation).mul_(u)


def glu_backward(dp, z, u, activation):
    """`(dz, du)` of `glu`; `dp` is overwritten."""
    du = _activate(z, activation).mul_(dp)
    dp.mul_(u)
    if activation == "silu":
        return torch.ops.aten.silu_backward(dp, z), du
    return torch.ops.aten.gelu_backward(dp, z, approximate="tanh"), du


def _activate(z, activation):
    return silu(z) if activation == "silu" else gelu(z, approximate="tanh")


def _drop(x, dropout_p, seed):
    if dropout_p == 0.0:
        return x
    keep = reference.dropout_keep(seed, *x.shape, dropout_p, device=x.device)
    return torch.where(keep, x / (1.0 - dropout_p), 0.0)
