"""The functions people call: check the arguments, flatten the leading dimensions, go to autograd or the operator."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lora_kernels import autograd, dispatch, ops, sharding
from lora_kernels.adapters.plan import BatchPlan, LayerAdapters
from lora_kernels.formats import QuantizedWeight

MAX_RANK = 512
REMEMBERED = 4096
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def lora_linear(
    x: Tensor,
    weight: Tensor | QuantizedWeight,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: float | Tensor,
    *,
    bias: Tensor | None = None,
    dropout_p: float = 0.0,
    backend: str | None = None,
    strategy: str | None = None,
) -> Tensor:
    """A linear layer and its LoRA update as one differentiable operation: `y = x Wᵀ + bias + scaling (drop(x) Aᵀ) Bᵀ`.

    x         `[..., K]`, fp16, bf16, fp32 or fp64; any strides
    weight    `[N, K]`, as in `nn.Linear`; same dtype as x; frozen (it must not require grad); or a `QuantizedWeight` of
              `lora_kernels.formats`, which is dequantised to x's dtype
    lora_a    `[R, K]` with 1 ≤ R ≤ 512; same dtype as x, or fp32 (then its gradient is fp32)
    lora_b    `[N, R]`, same dtype as lora_a
    scaling   finite and ≥ 0: `alpha / r`, or `alpha / sqrt(r)` for rsLoRA; a float, or a 0-d tensor, which is not
              read on the host and so not checked when it lies on a GPU
    bias      `[N]`, same dtype as x; gets a gradient if it requires one
    dropout_p in [0, 1): the share of x's elements hidden from the adapter (never from the base layer)
    backend   None (dispatch decides), "triton", "cpu" or "eager"
    strategy  None (dispatch decides), "single_pass", "extended", "one_launch" or "chained"

    Returns `y [..., N]` in x's dtype. Under autocast x, weight and bias are cast to its dtype, as in `F.linear`.
    Raises TypeError or ValueError for arguments that break the above, NotImplementedError for a backend or strategy
    that was asked for and cannot run this problem.
    Source: Hu et al. 2021, arXiv:2106.09685, section 4.1; rsLoRA: Kalajdzievski 2023, arXiv:2312.03732.

    >>> import torch
    >>> x, weight = torch.randn(2, 5, 64), torch.randn(32, 64)
    >>> lora_a, lora_b = torch.randn(8, 64), torch.zeros(32, 8)
    >>> y = lora_linear(x, weight, lora_a, lora_b, scaling=2.0)
    >>> torch.allclose(y, x @ weight.T, atol=1e-4)  # B = 0: the base layer
    True
    """
    traced, autocasts = ops.must_trace(x), isinstance(x, Tensor) and autograd.autocasts(x)
    call = chosen = None
    if not (traced or autocasts or backend or strategy):
        tensors = (x, weight, lora_a, lora_b) if bias is None else (x, weight, lora_a, lora_b, bias)
        call = (*map(_signature, tensors), bool(dropout_p), dispatch.settings(x))
        chosen = _known.get(call)
    if chosen is None:
        _check(x, weight, lora_a, lora_b, bias, backend, strategy)
    _check_values(x, weight, scaling, dropout_p)
    if dropout_p > 0.0 and sharding.is_dtensor(x):
        raise NotImplementedError(
            "dropout_p: no dropout on DTensors yet, whose mask would have to be that of the whole x"
        )
    if autocasts:
        dtype = torch.get_autocast_dtype(x.device.type)
        x, bias = x.to(dtype), None if bias is None else bias.to(dtype)
        weight = weight.to(dtype) if isinstance(weight, Tensor) else weight
    seed = draw_seed(x.device) if dropout_p > 0.0 else None
    rows = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    if traced:
        scaling = scaling if isinstance(scaling, Tensor) else torch.full((), scaling, dtype=torch.float64)
        base, quantized = ops.parts(weight)
        y, _ = ops.lora_linear(
            rows, base, bias, lora_a, lora_b, scaling, dropout_p, seed, backend, strategy, *quantized
        )
    else:
        if chosen is None:
            chosen = dispatch.plan_for(rows, weight, lora_a, lora_b, dropout_p, backend, strategy)
            if call is not None:
                _remember(call, chosen)
        y = autograd.lora_linear(rows, weight, bias, lora_a, lora_b, scaling, dropout_p, seed, chosen)
    return y if x.dim() == 2 else y.view(*x.shape[:-1], weight.shape[0])


def lora_linear_batched(
    x: Tensor,
    weight: Tensor | QuantizedWeight,
    adapters: LayerAdapters | Sequence[LayerAdapters],
    plan: BatchPlan,
    *,
    bias: Tensor | None = None,
    backend: str | None = None,
    strategy: str | None = None,
) -> Tensor:
    """A linear layer in which every row has its own adapters, or none: inference for many tenants in one batch.

    x         `[..., K]`; its rows, in order, are those of the plan
    weight    `[N, K]`, same dtype as x; or a `QuantizedWeight`, which is dequantised to it
    adapters  one layer's: `a [slots, R_max, K]`, `b [slots, N, R_max]` (x's dtype), ranks up to 512, scalings; or several
              layers', whose weights are stacked in `weight`: those of q, k and v, or gate and up, with widths that add up
              to N and equally many slots
    plan      the slots of each row; shared by all layers of the step
    bias      `[N]`, same dtype as x
    backend   None (dispatch decides), "triton", "cpu" or "eager"
    strategy  None (dispatch decides), "one_launch", "extended" or "chained" (triton), "chained" (cpu), "looped" (eager)

    Returns `y [..., N]` in x's dtype, under autocast too. Of the other rows a row's bits depend on nothing but their
    number, which chooses strategy and tile. Nothing is read back from a GPU (except by the eager backend), so a CUDA graph
    replays it with other slots, ranks and adapters.
    Raises TypeError or ValueError for arguments that break the above, NotImplementedError where x needs a gradient, or for
    a backend or strategy that was asked for and cannot run this problem.

    >>> x, weight = torch.randn(3, 64), torch.randn(32, 64)
    >>> a, b = torch.randn(2, 8, 64), torch.randn(2, 32, 8)
    >>> adapters = LayerAdapters(a, b, torch.tensor([8, 4], dtype=torch.int32), torch.ones(2))
    >>> y = lora_linear_batched(x, weight, adapters, BatchPlan(torch.tensor([1, -1, 0], dtype=torch.int32)))
    >>> torch.allclose(y[1], weight @ x[1], atol=1e-4)
    True
    """
    adapters = (adapters,) if isinstance(adapters, LayerAdapters) else tuple(adapters)
    traced, autocasts = ops.must_trace(x), autograd.autocasts(x)
    if traced or autocasts:  # the operator keeps autocast out
        _check_batched(x, weight, adapters, plan, bias)
        _check_frozen(x, weight, adapters, bias)
        _check_slots(x, adapters, plan)
        base, quantized = ops.parts(weight)
        y = ops.lora_linear_batched(
            x.reshape(-1, x.shape[-1]), base, bias, *map(list, zip(*(s.fields for s in adapters), strict=True)),
            *plan.parts, backend, strategy, *quantized,
        )  # fmt: skip
        return y.view(*x.shape[:-1], weight.shape[0])
    chosen = _checked_plan(x, weight, adapters, plan, bias, backend, strategy)
    rows = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    y = chosen.forward(rows, weight, bias, adapters, plan)
    return y if x.dim() == 2 else y.view(*x.shape[:-1], weight.shape[0])


def add_lora_batched(
    y: Tensor,
    x: Tensor,
    adapters: LayerAdapters | Sequence[LayerAdapters],
    plan: BatchPlan,
    *,
    backend: str | None = None,
) -> Tensor:
    """What `lora_linear_batched` adds to the base layer's `y`, in place: for base layers that it cannot run. Inference.

    y         `[..., N]`, x's dtype; a slice of a larger matrix's columns too: elements of a row must lie side by side
    x, adapters, plan, backend  as in `lora_linear_batched`

    Returns y. It is rounded twice, once by the base layer. Raises TypeError or ValueError for arguments that break the
    above, NotImplementedError where something needs a gradient, or for a backend that cannot run this.

    >>> y, x = torch.ones(2, 32), torch.randn(2, 64)
    >>> adapters = LayerAdapters(torch.randn(1, 8, 64), torch.randn(1, 32, 8), torch.ones(1).int(), torch.ones(1))
    >>> y = add_lora_batched(y, x, adapters, BatchPlan(torch.tensor([0, -1], dtype=torch.int32)))
    >>> y[0].eq(1.0).all().item(), y[1].eq(1.0).all().item()
    (False, True)
    """
    adapters = (adapters,) if isinstance(adapters, LayerAdapters) else tuple(adapters)
    _check_tensors({"x": x, "y": y})
    if y.dtype != x.dtype or y.dim() < 1 or y.shape[:-1] != x.shape[:-1] or (y.shape[-1] > 1 and y.stride(-1) != 1):
        raise ValueError(
            f"y: got {y.dtype} of shape {list(y.shape)}, strides {y.stride()}, expected {x.dtype} "
            f"{[*x.shape[:-1], 'N']}, as x, with columns side by side"
        )
    weight = x.new_empty(()).expand(y.shape[-1], x.shape[-1])  # what the base layer's must have looked like
    _check_batched(x, weight, adapters, plan, None)
    _check_frozen(x, y, adapters, None)
    _check_slots(x, adapters, plan)
    rows = y.view(-1, y.shape[-1])
    ops.add_lora_batched(
        rows,
        x.reshape(-1, x.shape[-1]),
        *map(list, zip(*(s.fields for s in adapters), strict=True)),
        *plan.parts,
        backend,
    )
    return y


def quantized_linear(x: Tensor, weight: QuantizedWeight, bias: Tensor | None) -> Tensor:
    """`F.linear` for a quantised weight, autocast and gradients of x and bias included; as a merged layer needs it."""
    _check_quantized(weight, x)
    if autograd.autocasts(x):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, bias = x.to(dtype), None if bias is None else bias.to(dtype)
    rows = x.reshape(-1, x.shape[-1])
    if ops.must_trace(x):
        codes, quantized = ops.parts(weight)
        y = ops.quantized_linear(rows, codes, bias, weight.shape, False, *quantized)
    else:
        y = autograd.QuantizedLinearFunction.apply(rows, weight, bias)
    return y.view(*x.shape[:-1], weight.shape[0])


def _checked_plan(x, weight, adapters, plan, bias, backend, strategy):
    """Dispatch's plan for arguments that are in order.

    Python that the base layer has swept out of the caches takes as long as a small layer's adapters. So a layer's adapters
    remember the last call that was in order, and the next one that looks like it is neither checked nor dispatched again.
    """
    memory = adapters[0].memory if adapters and type(adapters[0]) is LayerAdapters else {}
    call = (
        _signature(x), _signature(weight), None if bias is None else _signature(bias), adapters,
        plan.signature if type(plan) is BatchPlan else None, backend, strategy, dispatch.settings(x),
    )  # fmt: skip
    known, chosen = memory.get("call", (None, None))
    if call != known:
        _check_batched(x, weight, adapters, plan, bias)
        rows = x.reshape(-1, x.shape[-1])
        chosen = dispatch.batched_plan_for(rows, weight, adapters, plan, backend, strategy)
        memory["call"] = call, chosen
    _check_frozen(x, weight, adapters, bias)
    _check_slots(x, adapters, plan)
    return chosen


_known: dict[tuple, dispatch.Plan] = {}


def _remember(call, chosen):
    """So that the next call of `lora_linear` that looks like this one is neither checked nor dispatched again."""
    if len(_known) >= REMEMBERED:
        _known.clear()
    _known[call] = chosen


def _signature(tensor):
    """All that checks and dispatch read of a plain tensor, except whether it learns; anything else equals nothing.

    A quantised weight has a signature of its own.
    """
    if type(tensor) not in ops.PLAIN or tensor.layout is not torch.strided or tensor.is_nested:
        return tensor.signature if isinstance(tensor, QuantizedWeight) else object()
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.device, tensor.is_neg(), tensor.data_ptr() % 16


def _check_batched(x, weight, adapters, plan, bias):
    for name, value, kind in (*(("adapters", s, LayerAdapters) for s in adapters), ("plan", plan, BatchPlan)):
        if not isinstance(value, kind):
            raise TypeError(f"{name}: got {type(value).__name__}, expected a {kind.__name__}")
    if not adapters:
        raise ValueError("adapters: got none, expected a LayerAdapters, or one for each slice of y's columns")
    tensors = {"x": x, "weight": weight, "plan.slots": plan.slots}  # torch 2.7 cannot trace a union of dicts
    if bias is not None:
        tensors["bias"] = bias
    for i, s in enumerate(adapters):
        tensors[f"adapters[{i}].a"] = s.a
    _check_tensors(tensors)
    if len(weight.shape) != 2 or x.dim() < 1 or x.shape[-1] != weight.shape[1] or 0 in weight.shape:
        raise ValueError(
            f"x: got shape {list(x.shape)}, expected [..., K] for weight [N, K], which is {list(weight.shape)}; N, K >= 1"
        )
    n, k = weight.shape
    if sum(s.b.shape[1] for s in adapters) != n or any(s.a.shape[-1] != k for s in adapters):
        got = " and ".join(f"a {list(s.a.shape)}, b {list(s.b.shape)}" for s in adapters)
        wanted = f"{n}" if len(adapters) == 1 else f"N_{{1..{len(adapters)}}} which add up to {n}"
        raise ValueError(
            f"adapters: got {got}, expected [slots, R, {k}] and [slots, {wanted}, R] "
            f"(packed [rows, {k}] and [rows, {wanted}]), since weight is {[n, k]}"
        )
    slots = [len(s.ranks) for s in adapters]
    if len(set(slots)) > 1:
        raise ValueError(f"adapters: got {slots} slots, expected the same number in each slice")
    for s in adapters:
        if not (1 <= s.max_rank <= MAX_RANK and slots[0] >= 1):
            raise ValueError(
                f"adapters: got {slots[0]} slots of rank {s.max_rank}, expected at least 1, and 1 <= R_max <= {MAX_RANK}"
            )
    if bias is not None and bias.shape != (n,):
        raise ValueError(f"bias: got shape {list(bias.shape)}, expected {[n]}, since weight is {[n, k]}")
    rows = plan.slots.shape[0]  # len(plan) is an int, and torch.export would have that number of rows only
    if rows * k != x.numel():
        raise ValueError(
            f"plan: got {rows} rows of slots, expected {x.numel() // k}, one for each row of x {list(x.shape)}"
        )
    if x.dtype not in DTYPES:
        raise TypeError(f"x: got {x.dtype}, expected one of {', '.join(map(str, DTYPES))}")
    for name, tensor in (("weight", weight), *(("adapters", s.a) for s in adapters), ("bias", bias)):
        if isinstance(tensor, Tensor) and tensor.dtype != x.dtype:
            raise TypeError(f"{name}: got {tensor.dtype}, expected {x.dtype}, as x (cast one; autocast does not apply)")


def _check_frozen(x, weight, adapters, bias):
    if torch.is_grad_enabled():
        learning = (x, weight, bias, *(t for s in adapters for t in (s.a, s.b)))
        if any(t is not None and t.requires_grad for t in learning):
            raise NotImplementedError("lora_linear_batched: has no backward; call it under torch.inference_mode()")


def _check_slots(x, adapters, plan):
    """Where they can be read at no cost; kernels take a slot past the end for an empty one."""
    slots = adapters[0].ranks.shape[0]
    if plan.slots.is_cpu and not ops.must_trace(x) and plan.largest_slot >= slots:
        raise ValueError(f"plan: got slot {plan.largest_slot}, expected at most {slots - 1}, the last of the adapters")


def draw_seed(device) -> Tensor:
    """A dropout seed, drawn on the device: CUDA graphs and checkpointing replay it like any other random draw."""
    return torch.randint(-(2**63), 2**63 - 1, (), dtype=torch.int64, device=device)


def _check(x, weight, lora_a, lora_b, bias, backend, strategy):
    tensors = {"x": x, "weight": weight, "lora_a": lora_a, "lora_b": lora_b}
    if bias is not None:
        tensors["bias"] = bias
    _check_tensors(tensors)
    _check_shapes(x, weight, lora_a, lora_b, bias)
    _check_dtypes(x, weight, lora_a, lora_b, bias)
    for name, choice in (("backend", backend), ("strategy", strategy)):
        if not isinstance(choice, (str, type(None))):
            raise TypeError(f"{name}: got {type(choice).__name__}, expected a name or None")


def _check_values(x, weight, scaling, dropout_p):
    _check_scaling(scaling, x)
    if isinstance(dropout_p, bool) or not isinstance(dropout_p, (int, float)):
        raise TypeError(f"dropout_p: got {type(dropout_p).__name__}, expected a float in [0, 1)")
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"dropout_p: got {dropout_p}, expected a float in [0, 1)")
    if weight.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            "weight: requires grad, expected a frozen base weight (LoRA trains lora_a and lora_b only); "
            "call weight.requires_grad_(False)"
        )


def _check_tensors(tensors):
    device = getattr(tensors["x"], "device", None)
    compiling = torch.compiler.is_compiling()
    for name, tensor in tensors.items():
        if name == "weight" and isinstance(tensor, QuantizedWeight):
            _check_quantized(tensor, tensors["x"])
            if not compiling:  # the operator does it then
                tensor.check_state()
            continue
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}: got {type(tensor).__name__}, expected a torch.Tensor")
        if sharding.is_dtensor(tensor) != sharding.is_dtensor(tensors["x"]):
            got, expected = ("a DTensor", "plain") if sharding.is_dtensor(tensor) else ("a plain tensor", "a DTensor")
            raise TypeError(f"{name}: got {got}, expected {expected} one, as x")
        if tensor.layout is not torch.strided or tensor.is_nested:
            kind = "nested tensor" if tensor.is_nested else f"tensor of layout {tensor.layout}"
            raise TypeError(f"{name}: got a {kind}, expected a dense one (call .to_dense() or pad it)")
        if not compiling and tensor.is_neg():  # Dynamo cannot trace it; the operator resolves it
            raise TypeError(f"{name}: got a lazily negated view, expected plain memory (call .resolve_neg())")
        if tensor.is_meta:
            raise ValueError(f"{name}: got a meta tensor, expected one with data (materialise the model first)")
        if tensor.device != device:
            raise ValueError(f"{name}: got device {tensor.device}, expected {device}, as x")


def _check_quantized(weight, x):
    if isinstance(x, Tensor) and weight.device != x.device:
        raise ValueError(f"weight: got device {weight.device}, expected {x.device}, as x")


def _check_shapes(x, weight, lora_a, lora_b, bias):
    if x.dim() < 1:
        raise ValueError("x: got a 0-d tensor, expected [..., K]")
    if len(weight.shape) != 2 or weight.shape[0] < 1 or weight.shape[1] < 1:
        raise ValueError(f"weight: got shape {list(weight.shape)}, expected [N, K] with N, K >= 1")
    n, k = weight.shape
    if x.shape[-1] != k:
        raise ValueError(f"x: got shape {list(x.shape)}, expected [..., {k}], since weight is {list(weight.shape)}")
    if lora_a.dim() != 2 or lora_a.shape[1] != k:
        raise ValueError(f"lora_a: got shape {list(lora_a.shape)}, expected [R, {k}], since weight is {[n, k]}")
    r = lora_a.shape[0]
    if not 1 <= r <= MAX_RANK:
        raise ValueError(f"lora_a: got rank {r} (shape {list(lora_a.shape)}), expected 1 <= R <= {MAX_RANK}")
    if lora_b.shape != (n, r):
        raise ValueError(f"lora_b: got shape {list(lora_b.shape)}, expected {[n, r]}, since lora_a is {[r, k]}")
    if bias is not None and bias.shape != (n,):
        raise ValueError(f"bias: got shape {list(bias.shape)}, expected {[n]}, since weight is {[n, k]}")


def _check_dtypes(x, weight, lora_a, lora_b, bias):
    if x.dtype not in DTYPES:
        raise TypeError(f"x: got {x.dtype}, expected one of {', '.join(map(str, DTYPES))}")
    autocast = autograd.autocasts(x)
    for name, tensor in (("weight", weight), ("bias", bias)):
        if isinstance(tensor, Tensor) and tensor.dtype != x.dtype and not (autocast and tensor.dtype in DTYPES):
            raise TypeError(f"{name}: got {tensor.dtype}, expected {x.dtype}, as x (cast one, or use torch.autocast)")
    if lora_a.dtype != x.dtype and lora_a.dtype != torch.float32 and not (autocast and lora_a.dtype in DTYPES):
        raise TypeError(f"lora_a: got {lora_a.dtype}, expected {x.dtype}, as x, or torch.float32")
    if lora_b.dtype != lora_a.dtype:
        raise TypeError(f"lora_b: got {lora_b.dtype}, expected {lora_a.dtype}, as lora_a")


def _check_scaling(scaling, x):
    if isinstance(scaling, Tensor):
        if scaling.dim() != 0 or not scaling.is_floating_point():
            raise ValueError(
                f"scaling: got a {scaling.dtype} tensor of shape {list(scaling.shape)}, "
                "expected a float or a 0-d floating-point tensor"
            )
        if scaling.requires_grad and torch.is_grad_enabled():
            raise ValueError("scaling: requires grad, expected a constant, since it gets no gradient (call .detach())")
        if scaling.device.type == "meta" or scaling.device not in (x.device, torch.device("cpu")):
            raise ValueError(f"scaling: got device {scaling.device}, expected {x.device}, as x, or cpu")
        if scaling.device.type != "cpu" or torch.compiler.is_compiling():
            return  # reading it would stall the stream or break the graph
        scaling = float(scaling)
    if isinstance(scaling, bool) or not isinstance(scaling, (int, float)):
        raise TypeError(f"scaling: got {type(scaling).__name__}, expected a float or a 0-d tensor")
    if not 0.0 <= scaling < math.inf:
        raise ValueError(f"scaling: got {scaling}, expected a finite number >= 0")
