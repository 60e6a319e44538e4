"""The autograd Functions of blocks: what is saved, and in which order the backward pass runs."""

from itertools import islice

import torch
from torch import Tensor

from lora_kernels.autograd import OnceDifferentiable, bias_gradient
from lora_kernels.backends import shared

PER_LAYER = 4  # of a layer's fields are inputs of the Function: weight, bias, lora_a, lora_b


def lora_projections(x, layers):
    """`(y [M,N], ...)` of 2-D `shared.Layer` problems; differentiable in x, biases and adapters."""
    if _learns(x, layers):
        return LoRAProjectionsFunction.apply(x, [layer[PER_LAYER:] for layer in layers], *_flat(layers))
    return shared.forward(x, layers)[0]


def lora_mlp(x, layers, activation):
    """`y [M,K]` of the layers gate, up and down."""
    if _learns(x, layers):
        return LoRAMLPFunction.apply(x, activation, [layer[PER_LAYER:] for layer in layers], *_flat(layers))
    return _mlp(x, layers, activation)[0]


class LoRAProjectionsFunction(torch.autograd.Function):
    """Saves x and the layers' h, where a gradient needs them."""

    @staticmethod
    def forward(ctx, x, settings, *flat):
        layers = _layers(flat, settings)
        ys, hs = shared.forward(x, layers)
        _save(ctx, layers, hs, ctx.needs_input_grad[2:], (x,))
        return ys

    @staticmethod
    def backward(ctx, *dys):
        (x,), layers, hs, biases = _saved(ctx)
        needs_x, _, *needs = ctx.needs_input_grad
        with torch.no_grad():
            dx, grads = shared.backward(dys, x, hs, layers, needs_x, _adapter_needs(needs))
            dbiases = _bias_gradients(dys, biases)
        dx, *grads = _once(dx, *_in_order(grads, dbiases), depends_on=(*dys, x, *_adapters(layers)))
        return dx, None, *grads


class LoRAMLPFunction(torch.autograd.Function):
    """Saves x, what f and ∘ are applied to, and the layers' h; their product is computed again where dA of down needs it."""

    @staticmethod
    def forward(ctx, x, activation, settings, *flat):
        layers = _layers(flat, settings)
        y, z, u, hs = _mlp(x, layers, activation)
        _save(ctx, layers, hs, ctx.needs_input_grad[3:], (x, z, u))
        ctx.activation = activation
        return y

    @staticmethod
    def backward(ctx, dy):
        if dy is None:
            return (None,) * len(ctx.needs_input_grad)
        (x, z, u), (gate, up, down), hs, biases = _saved(ctx)
        needs_x, _, _, *needs = ctx.needs_input_grad
        of_gate, of_up, of_down = _adapter_needs(needs)
        kernels = _glu_kernels((gate, up, down))
        with torch.no_grad():
            product = kernels.glu(z, u, ctx.activation) if of_down[0] else None
            goes_on = needs_x or any(needs[: 2 * PER_LAYER])
            dp, grads_of_down = shared.backward((dy,), product, hs[2:], (down,), goes_on, (of_down,))
            del product
            dx, grads, dz_du = None, [(None, None)] * 2, (None, None)
            if goes_on:
                dz_du = kernels.glu_backward(dp, z, u, ctx.activation)
                dx, grads = shared.backward(dz_du, x, hs[:2], (gate, up), needs_x, (of_gate, of_up))
            grads = _in_order((*grads, *grads_of_down), _bias_gradients((*dz_du, dy), biases))
        dx, *grads = _once(dx, *grads, depends_on=(dy, x, z, u, *_adapters((gate, up, down))))
        return dx, None, None, *grads


def _mlp(x, layers, activation):
    gate, up, down = layers
    (z, u), hs = shared.forward(x, (gate, up))
    product = _glu_kernels(layers).glu(z, u, activation)
    (y,), of_down = shared.forward(product, (down,))
    return y, z, u, (*hs, *of_down)


def _glu_kernels(layers):
    return shared.products(layers) or shared.eager


def _learns(x, layers) -> bool:
    return torch.is_grad_enabled() and (
        x.requires_grad or any(t is not None and t.requires_grad for layer in layers for t in layer[1:PER_LAYER])
    )


def _flat(layers):
    return [field for layer in layers for field in layer[:PER_LAYER]]


def _layers(flat, settings):
    groups = zip(*[iter(flat)] * PER_LAYER, strict=True)
    return tuple(shared.Layer(*tensors, *rest) for tensors, rest in zip(groups, settings, strict=True))


def _save(ctx, layers, hs, needs, activations):
    """Tensors go through `save_for_backward`, which notices where one has changed since; the rest onto ctx."""
    x, *others = activations
    ctx.others, ctx.kept, tensors = len(others), [], []
    for layer, h, need in zip(layers, hs, _grouped(needs), strict=True):
        _, needs_bias, _, needs_b = need
        quantized = not isinstance(layer.weight, Tensor)
        state = layer.weight.state() if quantized else (layer.weight,)
        ctx.kept.append((len(state), layer.weight if quantized else None, layer.scaling, layer.dropout_p, layer.plan))
        tensors += (h if needs_b else None, layer.bias if needs_bias else None, layer.lora_a, layer.lora_b, layer.seed)
        tensors += state
    reads_x = any(needs_a for _, _, needs_a, _ in _grouped(needs[: 2 * PER_LAYER] if others else needs))
    ctx.save_for_backward(x if reads_x else None, *others, *tensors)
    ctx.set_materialize_grads(False)


def _saved(ctx):
    saved = iter(ctx.saved_tensors)  # which raises where one has changed since
    activations, layers, hs, biases = tuple(islice(saved, 1 + ctx.others)), [], [], []
    for states, weight, scaling, dropout_p, plan in ctx.kept:
        h, bias, lora_a, lora_b, seed = islice(saved, 5)
        dense, *_ = islice(saved, states)
        weight = dense if weight is None else weight
        layers.append(shared.Layer(weight, None, lora_a, lora_b, scaling, dropout_p, seed, plan))
        hs.append(h)
        biases.append(bias)
    return activations, tuple(layers), hs, biases


def _grouped(needs):
    return zip(*[iter(needs)] * PER_LAYER, strict=True)


def _adapter_needs(needs):
    return [(needs_a, needs_b) for _, _, needs_a, needs_b in _grouped(needs)]


def _bias_gradients(dys, biases):
    return [
        None if bias is None or dy is None else bias_gradient(dy).to(bias.dtype)
        for dy, bias in zip(dys, biases, strict=True)
    ]


def _in_order(grads, dbiases):
    return [grad for (da, db), dbias in zip(grads, dbiases, strict=True) for grad in (None, dbias, da, db)]


def _adapters(layers):
    return (tensor for layer in layers for tensor in (layer.lora_a, layer.lora_b))


def _once(*grads, depends_on):
    """The gradients, which raise where they are differentiated again (create_graph=True)."""
    return OnceDifferentiable.apply(len(grads), *grads, *depends_on) if torch.is_grad_enabled() else grads
