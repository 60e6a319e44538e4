"""Between an MLP's layers: `p = f(z) ∘ u` and its gradients, each tensor read once and written once. All are contiguous."""

import triton
import triton.language as tl


@triton.jit
def glu_kernel(z, u, p, SIZE, BLOCK: tl.constexpr, GELU: tl.constexpr, ACC: tl.constexpr):
    """`p [SIZE] = f(z) u`, f SiLU or GELU's tanh form, rounded once."""
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < SIZE
    f, _ = activated(tl.load(z + offs, mask=mask, other=0.0).to(ACC), GELU)
    product = f * tl.load(u + offs, mask=mask, other=0.0).to(ACC)
    tl.store(p + offs, product.to(p.dtype.element_ty), mask=mask)


@triton.jit
def glu_backward_kernel(dp, z, u, dz, SIZE, BLOCK: tl.constexpr, GELU: tl.constexpr, ACC: tl.constexpr):
    """`dz [SIZE] = dp u f'(z)`, and `du = dp f(z)` in the place of dp."""
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < SIZE
    f, slope = activated(tl.load(z + offs, mask=mask, other=0.0).to(ACC), GELU)
    grad = tl.load(dp + offs, mask=mask, other=0.0).to(ACC)
    dz_block = grad * tl.load(u + offs, mask=mask, other=0.0).to(ACC) * slope
    tl.store(dz + offs, dz_block.to(dz.dtype.element_ty), mask=mask)
    tl.store(dp + offs, (grad * f).to(dp.dtype.element_ty), mask=mask)


@triton.jit
def activated(z, GELU: tl.constexpr):
    """`f(z)` and `f'(z)`: z σ(z), or z σ(2 v) with v = √(2/π) (z + 0.044715 z³), since (1 + tanh v) / 2 = σ(2 v)."""
    if GELU:
        twice_v = 1.5957691216057308 * (z + 0.044715 * z * z * z)
        inner = 1.5957691216057308 * (1.0 + 0.134145 * z * z)
    else:
        twice_v = z
        inner = 1.0
    e = tl.exp(tl.minimum(-twice_v, 80.0))  # e gate is 1 - gate without cancellation, and finite
    gate = 1.0 / (1.0 + e)
    return z * gate, gate + z * gate * (e * gate) * inner
