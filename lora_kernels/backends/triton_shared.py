"""The Triton backend's products one by one, for layers that share them (backends/shared.py). Operands as PyTorch has them."""

import functools

import torch

from lora_kernels.backends import triton as backend
from lora_kernels.backends.operands import cdiv, row_major
from lora_kernels.configs import Config

BLOCK = 1024  # elements


def shrink(x, lora_a, scaling):
    """`h [M,R] = scaling x Aᵀ`."""
    with backend.device_guard(x.device):
        return backend._shrink(row_major(x), lora_a.to(x.dtype).mT, scaling)


def expand(x, weight, h, lora_b, bias, strategy):
    """`y [M,N] = x Wᵀ + bias + h Bᵀ`."""
    x, w, b = row_major(x), weight.mT, lora_b.to(x.dtype).mT
    bias = None if bias is None else bias.contiguous()
    with backend.device_guard(x.device):
        if strategy == "chained":
            y = h.mm(b) if bias is None else torch.addmm(bias, h, b)
            return y.addmm_(x, w)
        return backend._extended(x, w, h, b, bias)


def dy_products(dy, h, lora_b, scaling, needs_g, needs_b):
    """`g [M,R] = scaling dy B` and `db [N,R] = dyᵀ h`, None where not needed; from one read of dy up to rank 32."""
    dy, b, g, db = row_major(dy), lora_b.to(dy.dtype), None, None
    with backend.device_guard(dy.device):
        if needs_g and needs_b and lora_b.shape[1] <= backend.DY_PASS_MAX_RANK:
            return backend._dy_pass(dy, b, h, scaling, lora_b.dtype)
        if needs_g:
            g = backend._shrink(dy, b, scaling)
        if needs_b:
            db = backend._wgrad(dy, h, torch.empty_like(lora_b, memory_format=torch.contiguous_format))
    return g, db


def wgrad(x, g, dtype):
    """`da [R,K] = gᵀ x`."""
    da = x.new_empty(g.shape[1], x.shape[1], dtype=dtype)
    with backend.device_guard(x.device):
        backend._wgrad(row_major(x), g, da.mT)
    return da


def glu(z, u, activation):
    """`f(z) ∘ u`, both `[M,N]`."""
    p = torch.empty_like(z)
    _glu(_kernels().glu_kernel, (z, u, p), activation)
    return p


def glu_backward(dp, z, u, activation):
    """`(dz, du)` of `glu`; `dp` is overwritten."""
    dz = torch.empty_like(z)
    _glu(_kernels().glu_backward_kernel, (dp, z, u, dz), activation)
    return dz, dp


def _glu(kernel, tensors, activation):
    first, *_ = tensors
    if first.numel():
        constants = dict(BLOCK=BLOCK, GELU=activation == "gelu_tanh", ACC=backend.arithmetic(first)["ACC"])
        grid = (cdiv(first.numel(), BLOCK), 1, 1)
        with backend.device_guard(first.device):
            backend.launch(kernel, grid, (*tensors, first.numel()), constants, Config(block_m=BLOCK))


@functools.cache
def _kernels():
    from lora_kernels.kernels import glu

    return glu
