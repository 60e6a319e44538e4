"""The autograd Function of the eager path: what is saved, and which gradients are computed."""

import torch

from lora_kernels.backends.dequantized import dense

_any_autocast = torch._C._is_any_autocast_enabled
_functorch_is_active = torch._C._are_functorch_transforms_active


def lora_linear(x, weight, bias, lora_a, lora_b, scaling, dropout_p, seed, plan):
    """`y [M,N]` of the 2-D problem by dispatch's `plan`; differentiable in x, bias, lora_a and lora_b."""
    if torch.is_grad_enabled() and (
        x.requires_grad or lora_a.requires_grad or lora_b.requires_grad or (bias is not None and bias.requires_grad)
    ):
        apply = LoRALinearFunction.apply if _functorch_is_active() else _apply
        return apply(x, weight, bias, lora_a, lora_b, scaling, dropout_p, seed, plan)
    return plan.forward(x, weight, bias, lora_a, lora_b, scaling, dropout_p, seed)[0]


class LoRALinearFunction(torch.autograd.Function):
    """2-D in, 2-D out: a view returned from here could not be modified in place by the caller."""

    @staticmethod
    def forward(ctx, x, weight, bias, lora_a, lora_b, scaling, dropout_p, seed, plan):
        y, h = plan.forward(x, weight, bias, lora_a, lora_b, scaling, dropout_p, seed)
        _, _, needs_bias, needs_a, needs_b, *_ = ctx.needs_input_grad
        ctx.quantized, base = (None, (weight,)) if isinstance(weight, torch.Tensor) else (weight, weight.state())
        ctx.save_for_backward(
            x if needs_a else None, h if needs_b else None, lora_a, lora_b, seed, bias if needs_bias else None, *base
        )
        ctx.scaling, ctx.dropout_p, ctx.plan = scaling, dropout_p, plan
        return y

    @staticmethod
    def backward(ctx, dy):
        x, h, lora_a, lora_b, seed, bias, *base = ctx.saved_tensors  # which raises where one has changed since
        weight = ctx.quantized or base[0]
        if not torch.is_grad_enabled():
            dx, dbias, da, db = _gradients(ctx, dy, x, h, weight, lora_a, lora_b, seed, bias)
        else:  # create_graph=True
            with torch.no_grad():
                grads = _gradients(ctx, dy, x, h, weight, lora_a, lora_b, seed, bias)
            dx, dbias, da, db = OnceDifferentiable.apply(4, *grads, dy, x, lora_a, lora_b)
        return dx, None, dbias, da, db, None, None, None, None


def _gradients(ctx, dy, x, h, weight, lora_a, lora_b, seed, bias):
    needs_x, _, needs_bias, needs_a, needs_b, *_ = ctx.needs_input_grad
    needs = (needs_x, needs_a, needs_b)
    dx, da, db = ctx.plan.backward(dy, x, h, weight, lora_a, lora_b, ctx.scaling, ctx.dropout_p, seed, needs)
    return dx, bias_gradient(dy).to(bias.dtype) if needs_bias else None, da, db


# Function.apply without its search for functorch's wrappers, which takes as long as autograd's part of the call.
_apply = super(torch.autograd.Function, LoRALinearFunction).apply


class QuantizedLinearFunction(torch.autograd.Function):
    """The base layer alone, `y [M,N] = x Wᵀ + bias`, for a quantised weight; its state is saved, not the dense values."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.weight = weight
        ctx.save_for_backward(*weight.state(), *(() if bias is None else (bias,)))
        with dense(weight, x.dtype) as w:
            return torch.nn.functional.linear(x, w, bias)

    @staticmethod
    def backward(ctx, dy):
        *_, last = ctx.saved_tensors
        needs_x, _, needs_bias = ctx.needs_input_grad
        dx = None
        with torch.no_grad():
            if needs_x:
                with dense(ctx.weight, dy.dtype) as w:
                    dx = dy.mm(w)
            dbias = bias_gradient(dy).to(last.dtype) if needs_bias else None
        return dx, None, dbias


class OnceDifferentiable(torch.autograd.Function):
    """Returns the first `count` tensors, and raises where they are differentiated again, in whatever they depend on.

    PyTorch's `once_differentiable` looks at dy alone, so that a gradient penalty on a dx that depends on a trained B
    would silently be worth nothing.
    """

    @staticmethod
    def forward(ctx, count, *grads_and_depends_on):
        return grads_and_depends_on[:count]

    @staticmethod
    def backward(ctx, *grads):
        no_double_backward(ctx, *grads)


def no_double_backward(ctx, *grads):
    raise NotImplementedError("lora_linear: no double backward; compute second derivatives with lora_kernels.reference")


def autocasts(x) -> bool:
    """Whether autocast applies to x; it leaves fp64 alone, as everywhere in PyTorch."""
    return _any_autocast() and torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64


def bias_gradient(dy):
    """`dbias [N]`, summed over the rows of `dy [M,N]` in fp32 or better."""
    return dy.sum(0, dtype=torch.promote_types(dy.dtype, torch.float32))
