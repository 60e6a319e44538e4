"""The registered operators: what torch.compile, torch.export and selective checkpointing see as one node.

`lora_kernels::lora_linear(x [M,K], weight [N,K], bias [N]?, lora_a [R,K], lora_b [N,R], scaling [], dropout_p,
seed []?, backend?, strategy?) -> (y [M,N], h [M,R])`, and its backward; `lora_linear_batched` and `add_lora_batched`, with
`LayerAdapters` and `BatchPlan` taken apart; `quantized_linear`, the base layer alone. A quantised weight is taken apart too,
by `parts`: `weight` is its codes, and `format`, `layout` and up to four `scales` say what they mean. Eager calls go through
`autograd` instead,
because crossing the dispatcher costs more than launching the kernel.
"""

import torch
from torch import Tensor

from lora_kernels import dispatch, sharding
from lora_kernels.adapters.plan import BatchPlan, LayerAdapters
from lora_kernels.autograd import autocasts, bias_gradient, no_double_backward
from lora_kernels.backends.dequantized import dense
from lora_kernels.formats import QuantizedWeight, named

# Not a list of tensors: with one, autograd wants to know how many trailing arguments the dispatcher has left out.
_QUANTIZED = "str? format=None, int[] layout=[]" + "".join(f", Tensor? scales_{i}=None" for i in range(4))
_library = torch.library.Library("lora_kernels", "DEF")
_library.define(
    "lora_linear(Tensor x, Tensor weight, Tensor? bias, Tensor lora_a, Tensor lora_b, Tensor scaling, float dropout_p, "
    f"Tensor? seed, str? backend=None, str? strategy=None, {_QUANTIZED}) -> (Tensor y, Tensor h)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.define(
    "lora_linear_backward(Tensor dy, Tensor x, Tensor h, Tensor weight, Tensor lora_a, Tensor lora_b, Tensor scaling, "
    f"float dropout_p, Tensor? seed, bool[3] needs, str? backend=None, str? strategy=None, {_QUANTIZED}) "
    "-> (Tensor dx, Tensor da, Tensor db)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.define(
    "lora_linear_batched(Tensor x, Tensor weight, Tensor? bias, Tensor[] a, Tensor[] b, Tensor[] ranks, "
    "Tensor[] scalings, Tensor[] first_row, int[] max_rank, Tensor slots, Tensor? weights, Tensor order, Tensor segment, "
    f"Tensor distinct, str? backend=None, str? strategy=None, {_QUANTIZED}) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.define(
    f"quantized_linear(Tensor x, Tensor weight, Tensor? bias, int[2] shape, bool transposed, {_QUANTIZED}) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.define(
    "add_lora_batched(Tensor(a!) y, Tensor x, Tensor[] a, Tensor[] b, Tensor[] ranks, Tensor[] scalings, "
    "Tensor[] first_row, int[] max_rank, Tensor slots, Tensor? weights, Tensor order, Tensor segment, Tensor distinct, "
    "str? backend=None) -> ()",
    tags=(torch.Tag.pt2_compliant_tag,),
)
PLAIN = (Tensor, torch.nn.Parameter)
_dispatch_modes = torch._C._len_torch_dispatch_stack
lora_linear = torch.ops.lora_kernels.lora_linear
lora_linear_backward = torch.ops.lora_kernels.lora_linear_backward
lora_linear_batched = torch.ops.lora_kernels.lora_linear_batched
quantized_linear = torch.ops.lora_kernels.quantized_linear
add_lora_batched = torch.ops.lora_kernels.add_lora_batched


def must_trace(x: Tensor) -> bool:
    """Whether something watches the dispatcher (compile, export, fake tensors, selective checkpointing, a subclass)."""
    if type(x) not in PLAIN:
        if sharding.is_dtensor(x):
            from lora_kernels import dtensor  # noqa: F401  the sharding rules
        return True
    return torch.compiler.is_compiling() or _dispatch_modes() > 0


def parts(weight: Tensor | QuantizedWeight) -> tuple[Tensor, tuple]:
    """`weight` for an operator, and its last arguments: none for a dense one; format, layout and scales of a quantised one."""
    if isinstance(weight, Tensor):
        return weight, ()
    codes, *scales = weight.state()
    return codes, (weight.name, list(weight.layout), *scales)


def _whole(weight, n, k, format=None, layout=(), *scales):
    scales = [scale for scale in scales if scale is not None]
    if format is not None:
        return named(format).whole((weight, *scales), (n, k), layout)
    if layout or scales:
        raise ValueError(
            f"format: got None, expected a name, since there are layout {list(layout)}, {len(scales)} scales"
        )
    return weight


def _forward(x, weight, bias, lora_a, lora_b, scaling, dropout_p, seed, backend=None, strategy=None, *quantized):
    weight = _whole(weight, len(lora_b), x.shape[1], *quantized)
    plan = dispatch.plan_for(x, weight, lora_a, lora_b, dropout_p, backend, strategy)
    return plan.forward(x, weight, bias, lora_a, lora_b, _host(scaling), dropout_p, seed)


def _backward(
    dy, x, h, weight, lora_a, lora_b, scaling, dropout_p, seed, needs, backend=None, strategy=None, *quantized
):
    weight = _whole(weight, len(lora_b), x.shape[1], *quantized)
    plan = dispatch.plan_for(x, weight, lora_a, lora_b, dropout_p, backend, strategy)
    grads = plan.backward(dy, x, h, weight, lora_a, lora_b, _host(scaling), dropout_p, seed, needs)
    return tuple(dy.new_empty(0) if grad is None else grad for grad in grads)


def _host(scaling):
    return float(scaling) if scaling.device.type == "cpu" else scaling


def _forward_fake(x, weight, bias, lora_a, lora_b, *_):
    m, (n, r) = x.shape[0], lora_b.shape
    return x.new_empty(m, n), x.new_empty(m, r)


def _backward_fake(dy, x, h, weight, lora_a, lora_b, scaling, dropout_p, seed, needs, *_):
    shapes = ((x.shape, dy), (lora_a.shape, lora_a), (lora_b.shape, lora_b))
    return tuple(like.new_empty(shape if need else 0) for need, (shape, like) in zip(needs, shapes, strict=True))


def _batched(
    x, weight, bias, a, b, ranks, scalings, first_row, max_rank, slots, weights, order, segment, distinct,
    backend=None, strategy=None, *quantized,
):  # fmt: skip
    weight = _whole(weight, _width(b), x.shape[1], *quantized)
    adapters = _adapters(a, b, ranks, scalings, first_row, max_rank)
    plan = _plan(x, slots, weights, order, segment, distinct)
    chosen = dispatch.batched_plan_for(x, weight, adapters, plan, backend, strategy)
    return chosen.forward(x, weight, bias, adapters, plan)


def _batched_fake(x, weight, bias, a, b, *_):
    return x.new_empty(x.shape[0], _width(b))


def _width(b):
    return sum(of_slice.shape[1] for of_slice in b)


def _quantized(x, weight, bias, shape, transposed, format=None, *quantized):
    named(format)  # which it must have
    if x.shape[1] != shape[not transposed]:
        got = f"{list(x.shape)}, expected [M, {shape[not transposed]}]"
        raise ValueError(f"x: got shape {got}, since weight is {list(shape)}{', transposed' * transposed}")
    with dense(_whole(weight, *shape, format, *quantized), x.dtype) as w:
        return torch.nn.functional.linear(x, w.mT if transposed else w, bias)


def _quantized_fake(x, weight, bias, shape, transposed, *_):
    return x.new_empty(x.shape[0], shape[transposed])


def _setup_quantized(ctx, inputs, output):
    _, weight, bias, ctx.shape, ctx.transposed, ctx.format, ctx.layout, *scales = inputs
    ctx.save_for_backward(bias, weight, *scales)


def _autograd_quantized(ctx, dy):
    bias, weight, *scales = ctx.saved_tensors
    needs_x, _, needs_bias, *_ = ctx.needs_input_grad
    rest = ctx.shape, not ctx.transposed, ctx.format, ctx.layout, *scales
    dx = quantized_linear(dy, weight, None, *rest) if needs_x else None
    dbias = bias_gradient(dy).to(bias.dtype) if needs_bias else None
    return dx, None, dbias, *[None] * len(rest)


def _add_batched(
    y, x, a, b, ranks, scalings, first_row, max_rank, slots, weights, order, segment, distinct, backend=None
):  # fmt: skip
    if y.shape != (x.shape[0], _width(b)):
        raise ValueError(
            f"y: got shape {list(y.shape)}, expected {[x.shape[0], _width(b)]}, since x is {list(x.shape)}"
        )
    adapters = _adapters(a, b, ranks, scalings, first_row, max_rank)
    plan = _plan(x, slots, weights, order, segment, distinct)
    dispatch.batched_plan_for(x, None, adapters, plan, backend).add(x, y, adapters, plan)


def _plan(x, slots, *others):
    """A plan of as many rows as x, which those who call the operators themselves may get wrong."""
    if slots.shape[0] != x.shape[0] or any(t is not None and t.numel() != slots.numel() for t in others):
        got = [None if t is None else t.shape[0] for t in (slots, *others)]
        raise ValueError(f"plan: got parts of {got} rows, expected {x.shape[0]} each, as x {list(x.shape)}")
    return BatchPlan.of_parts(slots, *others)


def _adapters(*fields):
    return tuple(LayerAdapters.unchecked(*of_slice) for of_slice in zip(*fields, strict=True))


def _setup_context(ctx, inputs, output):
    x, weight, bias, lora_a, lora_b, scaling, dropout_p, seed, backend, strategy, format, layout, *scales = inputs
    _, h = output
    ctx.save_for_backward(x, h, weight, lora_a, lora_b, scaling, seed, bias, *scales)
    ctx.mark_non_differentiable(h)
    ctx.dropout_p, ctx.static = dropout_p, (backend, strategy, format, layout)


def _autograd(ctx, dy, _):
    x, h, weight, lora_a, lora_b, scaling, seed, bias, *scales = ctx.saved_tensors
    needs_x, _, needs_bias, needs_a, needs_b, *_ = ctx.needs_input_grad
    # DTensor remembers the shapes of results by those of the tensors, whatever `needs` says.
    needs = [True] * 3 if sharding.is_dtensor(dy) else [needs_x, needs_a, needs_b]
    grads = lora_linear_backward(
        dy, x, h, weight, lora_a, lora_b, scaling, ctx.dropout_p, seed, needs, *ctx.static, *scales
    )
    dx, da, db = (grad if need else None for grad, need in zip(grads, needs, strict=True))
    da, db = sharding.placed_as(da, lora_a), sharding.placed_as(db, lora_b)
    dbias = sharding.placed_as(bias_gradient(dy).to(bias.dtype), bias) if needs_bias else None
    return dx, None, dbias, da, db, *[None] * (3 + len(ctx.static) + len(scales))


def _autocast(device_type):
    def run(x, weight, bias, a, b, scaling, dropout_p, seed, backend=None, strategy=None, *quantized):
        dtype = torch.get_autocast_dtype(device_type) if autocasts(x) else x.dtype
        x, bias = x.to(dtype), None if bias is None else bias.to(dtype)
        weight = weight if quantized else weight.to(dtype)
        with _outside_autocast(device_type):
            return lora_linear(x, weight, bias, a, b, scaling, dropout_p, seed, backend, strategy, *quantized)

    return run


def _without_autocast(operator, device_type):
    def run(*args):
        with _outside_autocast(device_type):
            return operator(*args)

    return run


def _outside_autocast(device_type):
    return torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(f"Autocast{device_type.upper()}"))


for _name, _impl, _fake in (
    ("lora_linear", _forward, _forward_fake),
    ("lora_linear_backward", _backward, _backward_fake),
    ("lora_linear_batched", _batched, _batched_fake),
    ("quantized_linear", _quantized, _quantized_fake),
    ("add_lora_batched", _add_batched, lambda *_: None),
):
    _library.impl(_name, _impl, "CompositeExplicitAutograd")
    torch.library.register_fake(f"lora_kernels::{_name}", _fake, lib=_library)
torch.library.register_autograd("lora_kernels::lora_linear", _autograd, setup_context=_setup_context, lib=_library)
torch.library.register_autograd("lora_kernels::lora_linear_backward", no_double_backward, lib=_library)
torch.library.register_autograd(
    "lora_kernels::quantized_linear", _autograd_quantized, setup_context=_setup_quantized, lib=_library
)
for _device in ("cpu", "cuda"):
    _library.impl("lora_linear", _autocast(_device), f"Autocast{_device.upper()}")
    for _name, _operator in (("lora_linear_batched", lora_linear_batched), ("quantized_linear", quantized_linear)):
        _library.impl(_name, _without_autocast(_operator, _device), f"Autocast{_device.upper()}")
