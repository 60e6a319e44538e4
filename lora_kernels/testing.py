"""The judge: random problems on guarded memory, and the error budget every backend must keep (docs/numerics.md).

>>> check(Case(m=17, n=24, k=33, r=4, dtype=torch.bfloat16))  # raises AssertionError where a result is off
"""

import contextlib
import functools
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import NamedTuple
from unittest import mock

import torch
from torch import Tensor

from lora_kernels import dispatch, functional, reference

INPUTS = ("x", "weight", "bias", "lora_a", "lora_b", "dy")
TRAINABLE = ("x", "bias", "lora_a", "lora_b")
RESULTS = {"x": "dx", "bias": "dbias", "lora_a": "da", "lora_b": "db"}
LAYOUTS = ("contiguous", "padded", "misaligned", "transposed", "strided", "expanded")
HALF = (torch.float16, torch.bfloat16)
GUARD = 64  # elements of NaN before and behind an input; a multiple of 16 bytes, so that it keeps the alignment


@dataclass(frozen=True)
class Case:
    """One problem, reproducible from its repr. `x` is `[*leading, m, k]`; `needs` names what gets a gradient.

    `layouts` maps an input to one of LAYOUTS (default "contiguous"). `base=False` is the twin with weight and bias
    zero: the adapter alone, which a large base term would hide.
    """

    m: int
    n: int
    k: int
    r: int
    dtype: torch.dtype = torch.float32
    lora_dtype: torch.dtype | None = None
    scaling: float = 2.0
    bias: bool = False
    dropout_p: float = 0.0
    needs: tuple[str, ...] = ("x", "lora_a", "lora_b")
    leading: tuple[int, ...] = ()
    layouts: dict[str, str] = field(default_factory=dict)
    base: bool = True
    seed: int = 0

    @property
    def rows(self) -> int:
        return math.prod(self.leading) * self.m


class Tensors(NamedTuple):
    """The tensors of a case; `seed` (0-d int64) and `keep` (bool `[rows, k]`) are None without dropout."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    lora_a: Tensor
    lora_b: Tensor
    dy: Tensor
    seed: Tensor | None
    keep: Tensor | None


def random_case(rng: random.Random, limit: int = 96, dtypes=(*HALF, torch.float32)) -> Case:
    """A problem with dimensions up to about `limit`, often at the edge of a tile; the rank reaches 512."""

    def size(smallest):
        edge = rng.choice((0, 1, 2, 15, 16, 17, 31, 32, 33, 63, 64, 65))
        return max(smallest, min(limit, rng.choice((edge, rng.randint(0, limit)))))

    dtype = rng.choice(dtypes)
    bias = rng.random() < 0.4
    trainable = TRAINABLE if bias else ("x", "lora_a", "lora_b")
    needs = trainable if rng.random() < 0.6 else tuple(name for name in trainable if rng.random() < 0.6)
    n, k = size(1), size(1)
    r = rng.choice((rng.randint(1, 16), rng.randint(1, 64), rng.choice((1, 4, 13, 16, 40, 64, 100, 130, 512))))
    if rng.random() < 0.4:  # what TMA can address
        n, k, r = (-(-extent // 8) * 8 for extent in (n, k, r))
    return Case(
        m=size(0),
        n=n,
        k=k,
        r=r,
        dtype=dtype,
        lora_dtype=torch.float32 if dtype in HALF and rng.random() < 0.25 else None,
        scaling=rng.choice((0.0, 0.5, 1.0, 2.0, 1 / 3, 16 / math.sqrt(r), rng.uniform(0.01, 4.0))),
        bias=bias,
        dropout_p=rng.choice((0.0, 0.0, 0.05, 0.5, rng.uniform(0.0, 0.95))),
        needs=needs,
        leading=rng.choice(((), (), (1,), (2,), (2, 3), (0,) if rng.random() < 0.1 else (3,))),
        layouts={name: rng.choice(LAYOUTS[:-1]) for name in INPUTS if rng.random() < 0.3}
        | ({"dy": "expanded"} if rng.random() < 0.05 else {}),
        seed=rng.randrange(2**31),
    )


def make_tensors(case: Case, device="cpu") -> Tensors:
    """Normal values scaled so that every result is of order one; each tensor lies in a buffer of NaN."""
    generator = torch.Generator().manual_seed(case.seed)
    lora_dtype = case.lora_dtype or case.dtype
    base = float(case.base)

    def tensor(name, shape, scale, dtype):
        layout = case.layouts.get(name, "contiguous")
        drawn = torch.randn(shape, generator=generator, dtype=torch.float64) * scale
        return guarded(drawn.to(dtype), layout, device)

    x = tensor("x", (*case.leading, case.m, case.k), 1.0, case.dtype)
    weight = tensor("weight", (case.n, case.k), base / math.sqrt(case.k), case.dtype)
    bias = tensor("bias", (case.n,), base, case.dtype) if case.bias else None
    lora_a = tensor("lora_a", (case.r, case.k), 1.0 / math.sqrt(case.k), lora_dtype)
    lora_b = tensor("lora_b", (case.n, case.r), 1.0 / math.sqrt(case.r), lora_dtype)
    dy = tensor("dy", (*case.leading, case.m, case.n), 1.0, case.dtype)
    seed = keep = None
    if case.dropout_p > 0.0:
        torch.manual_seed(case.seed)
        seed = functional.draw_seed(x.device)
        keep = reference.dropout_keep(seed, case.rows, case.k, case.dropout_p, x.device)
    return Tensors(x, weight, bias, lora_a, lora_b, dy, seed, keep)


def guarded(values: Tensor, layout: str = "contiguous", device="cpu") -> Tensor:
    """A copy of `values [..., rows, cols]` laid out as `layout` says inside a buffer of NaN."""
    rows, cols = (1, *values.shape)[-2:]
    row_stride, col_stride, offset = {
        "contiguous": (cols, 1, GUARD),
        "padded": (-(-cols // 8) * 8 + 8, 1, GUARD),
        "misaligned": (cols + 3, 1, GUARD + 1),
        "transposed": (1, -(-rows // 8) * 8 + 8, GUARD),
        "strided": (2 * cols + 1, 2, GUARD + 3),
        "expanded": (0, 1, GUARD),
    }[layout]
    matrix = max(rows * row_stride, cols * col_stride, 1)
    leading = values.shape[:-2]
    strides = [math.prod(leading[i + 1 :]) * matrix for i in range(len(leading))] + [row_stride, col_stride]
    size = offset + math.prod(leading) * matrix + GUARD
    buffer = torch.full((size,), math.nan, dtype=values.dtype, device=device)
    view = buffer.as_strided(values.shape, strides[-values.dim() :], offset)
    if layout == "expanded":
        values = values[..., :1, :].expand_as(values)
        view[..., :1, :] = values[..., :1, :].to(device)
        return view
    return view.copy_(values)


@contextlib.contextmanager
def poisoned_empty() -> Iterator[None]:
    """Within it torch.empty and its kin return NaN (-1 for integers) between guard bands, which must survive."""
    guards = []

    def poisoned(allocate):
        @functools.wraps(allocate)
        def wrapper(*args, **kwargs):
            tensor = allocate(*args, **kwargs)
            if type(tensor) is not Tensor or tensor.is_meta or tensor.numel() == 0:
                return tensor
            size = tensor.untyped_storage().nbytes()
            row = tensor.element_size() * (tensor.shape[-1] if tensor.dim() else 1)
            band = 4096 + min(128 * row, 2**20) // 64 * 64  # a tile of rows; keeps the alignment
            buffer = torch.full((size + 2 * band,), 0xFF, dtype=torch.uint8, device=tensor.device)
            guards.append((buffer[:band], buffer[band + size :], tuple(tensor.shape), tensor.dtype))
            start = band // tensor.element_size()
            return tensor.set_(buffer.untyped_storage(), start, tensor.shape, tensor.stride())

        return wrapper

    with contextlib.ExitStack() as stack:
        for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch, "empty_strided"), (Tensor, "new_empty")):
            stack.enter_context(mock.patch.object(owner, name, poisoned(getattr(owner, name))))
        yield
    for before, behind, shape, dtype in guards:
        for side, band in (("before", before), ("behind", behind)):
            if not bool((band == 0xFF).all()):
                raise AssertionError(f"a store outside its buffer, {side} a {dtype} tensor of shape {list(shape)}")


class Budget(NamedTuple):
    """The error a result may have: `factor` times that of eager PyTorch, and a floor below which luck decides."""

    eager: float
    factor: float
    floor: float

    @property
    def limit(self) -> float:
        return self.factor * self.eager + self.floor


def check(case: Case, backend: str | None = None, strategy: str | None = None, device="cpu") -> None:
    """Run forward and all gradients of `case` and of its W = 0 twin; raise AssertionError where one is wrong.

    Wrong is: over the error budget, other bits in a second run, a changed input, a store outside a buffer, a shape or
    dtype that is not the input's; for half precision also a y that is not the once-rounded product of the saved h.
    Raises NotImplementedError if the strategy cannot run the case.
    """
    for twin in (case, replace(case, base=False)):
        tensors = make_tensors(twin, device)
        before = [None if t is None else _buffer(t).clone() for t in tensors[:6]]
        results = run(twin, tensors, backend, strategy)
        truth, eager, magnitude = expected(twin, tensors)
        for name, actual in results.items():
            compare(twin, name, actual, truth[name], eager[name], magnitude[name])
        if not twin.base and twin.dtype in HALF and twin.lora_dtype in (None, twin.dtype):
            _check_rounding(twin, tensors, results)
        for name, tensor, kept in zip(INPUTS, tensors, before, strict=False):
            if tensor is not None and not torch.equal(_bits(_buffer(tensor)), _bits(kept)):
                raise AssertionError(f"{name}: the input, or the memory around it, was written to\n{twin}")


def run(case: Case, tensors: Tensors, backend: str | None = None, strategy: str | None = None) -> dict[str, Tensor]:
    """y, h and the gradients that `case.needs`, by name, on poisoned memory; AssertionError if a second run differs."""
    inputs = {name: getattr(tensors, name) for name in INPUTS[:-1]}
    inputs = {name: None if t is None else t.detach().requires_grad_(name in case.needs) for name, t in inputs.items()}
    wanted = [inputs[name] for name in case.needs]
    x = tensors.x.reshape(-1, case.k)
    plan = dispatch.plan_for(x, tensors.weight, tensors.lora_a, tensors.lora_b, case.dropout_p, backend, strategy)
    with poisoned_empty():
        torch.manual_seed(case.seed)
        y = functional.lora_linear(
            **inputs, scaling=case.scaling, dropout_p=case.dropout_p, backend=backend, strategy=strategy
        )
        again, h = plan.forward(x, *tensors[1:5], case.scaling, case.dropout_p, tensors.seed)
        _check_repeated(case, "y", y, again.view_as(y))
        grads = torch.autograd.grad(y, wanted, tensors.dy, retain_graph=True) if wanted else ()
        if case.base and wanted:
            for name, *both in zip(case.needs, grads, torch.autograd.grad(y, wanted, tensors.dy), strict=True):
                _check_repeated(case, RESULTS[name], *both)
    return {"y": y.detach(), "h": h} | {RESULTS[name]: grad for name, grad in zip(case.needs, grads, strict=True)}


def compare(case: Case, name: str, actual: Tensor, truth: Tensor, eager: Tensor, magnitude: Tensor) -> None:
    """Hold one result against its budget (docs/numerics.md); AssertionError names the metric and the worst element."""
    if (actual.shape, actual.dtype, actual.device) != (eager.shape, eager.dtype, eager.device):
        got, expected = ((list(t.shape), t.dtype, t.device) for t in (actual, eager))
        raise AssertionError(f"{name}: got {got}, expected {expected}\n{case}")
    if actual.numel() == 0:
        return
    measured = errors(actual, truth, magnitude)
    for metric, budget in budgets(case, name, truth, eager, magnitude).items():
        value, worst = measured[metric]
        if not value <= budget.limit:
            index = tuple(int(i) for i in torch.unravel_index(worst, truth.shape))
            raise AssertionError(
                f"{name}: {metric} error {value:.3g}, budget {budget.limit:.3g} = "
                f"{budget.factor} × {budget.eager:.3g} (eager) + {budget.floor:.3g}; worst at {index}: "
                f"got {actual[index].item():.8g}, expected {truth[index].item():.8g} "
                f"({int(actual.isnan().sum())} of {actual.numel()} are NaN)\n{case}"
            )


def errors(actual: Tensor, truth: Tensor, magnitude: Tensor) -> dict[str, tuple[float, Tensor]]:
    """RMS and maximum error against `truth` (fp64), each with the flat index of the worst element.

    Relative to the larger of truth and `magnitude`, the size the result has when nothing cancels.
    """
    scale = torch.maximum(_rms(truth), _rms(magnitude))
    difference = (actual.double() - truth).abs()
    if scale == 0.0:
        scale = torch.where(difference == 0.0, 1.0, 0.0).min()  # exact, or infinitely wrong
    relative = (difference / torch.maximum(truth.abs(), scale)).nan_to_num(math.inf, math.inf)
    worst = relative.argmax()
    return {"rms": (float(_rms(difference) / scale), worst), "max": (float(relative.flatten()[worst]), worst)}


def budgets(case: Case, name: str, truth: Tensor, eager: Tensor, magnitude: Tensor) -> dict[str, Budget]:
    """What `name` may be off by: C times eager's own error, and a floor for what eager may get right by luck."""
    m, n, k, r = case.rows, case.n, case.k, case.r
    ulp = torch.finfo(case.dtype).eps
    depth = {"y": k + r, "h": k, "dx": n + r, "da": m + n, "db": m + k, "dbias": m}[name]
    accumulation = torch.finfo(torch.promote_types(case.dtype, torch.float32)).eps * math.sqrt(depth)
    factor = 2.0 if name in ("da", "db") else 1.25
    measured = errors(eager, truth, magnitude)
    roundings = _independent_roundings(case, name)
    return {
        "rms": Budget(measured["rms"][0], factor, 2 * ulp / math.sqrt(roundings) + accumulation),
        "max": Budget(measured["max"][0], factor, 2 * ulp + 4 * accumulation),
    }


def _independent_roundings(case, name):
    """How many roundings at least a result's error averages over: its own elements', or those of h or g before it."""
    m = 1 if "expanded" in (case.layouts.get("x"), case.layouts.get("dy")) else case.rows
    n, k, r = case.n, case.k, case.r
    if name == "dbias":
        return n
    counts = [{"y": m * n, "h": m * r, "dx": m * k, "da": r * k, "db": n * r}[name], m * r]
    if case.lora_dtype not in (None, case.dtype):
        counts += [r * k, n * r]
    return max(1.0, min(counts) * (1.0 - case.dropout_p))


def expected(case: Case, tensors: Tensors) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """Truth (fp64), eager (the working dtype) and magnitude of every result, each a dict by name."""
    x, weight, bias, lora_a, lora_b, dy = (None if t is None else t.contiguous() for t in tensors[:6])
    x, dy = x.view(-1, case.k), dy.view(-1, case.n)
    lora_dtype = lora_a.dtype

    def results(convert, scaling, dropout_p):
        args = [convert(t) for t in (x, weight, lora_a, lora_b)]
        keep = tensors.keep
        y = reference.lora_linear(*args, scaling, None if bias is None else convert(bias), keep, dropout_p)
        h = scaling * (reference.drop(args[0], keep, dropout_p) @ args[2].mT)
        dx, da, db, dbias = reference.lora_linear_backward(convert(dy), *args, scaling, keep, dropout_p)
        shaped = {"y": y.view(*tensors.dy.shape), "h": h, "dx": dx.view(tensors.x.shape), "da": da, "db": db}
        return shaped | {"dbias": dbias}

    s, p = case.scaling, case.dropout_p
    truth = results(Tensor.double, s, p)
    eager = results(lambda t: t.to(case.dtype), s, p)
    eager |= {name: eager[name].to(lora_dtype) for name in ("da", "db")}
    # The same formulas on the squares add up the squares: the RMS of each result over random signs.
    squares = results(lambda t: t.double().square(), s * s, 1.0 - (1.0 - p) ** 2)
    return truth, eager, {name: t.sqrt() for name, t in squares.items()}


def _check_repeated(case, name, first, second):
    if not torch.equal(_bits(first), _bits(second)):
        raise AssertionError(f"{name}: a second run gave other bits\n{case}")


def _check_rounding(case, tensors, results):
    """The adapter alone must be the h that backward will see, times Bᵀ, rounded once: else db belongs to another y."""
    h, b = results["h"].double(), tensors.lora_b.double()
    y, exact = results["y"].reshape(-1, case.n), h @ b.mT
    slack = 2.0**-22 * math.sqrt(case.r) * (h.abs() @ b.mT.abs())  # of the fp32 accumulation
    outside = (y < (exact - slack).to(y.dtype)) | (y > (exact + slack).to(y.dtype))
    if bool(outside.any()):
        index = tuple(int(i) for i in outside.nonzero()[0])
        raise AssertionError(
            f"y: not h Bᵀ rounded once, at {index} ({int(outside.sum())} of {y.numel()} elements): "
            f"got {y[index].item():.8g}, expected {exact[index].item():.8g} to the nearest {y.dtype}; "
            f"is h kept in fp32 for y, or y rounded twice?\n{case}"
        )


def _rms(t):
    return t.square().mean().sqrt()


def _buffer(t):
    """Everything that lies in the memory of `t`, as one flat tensor."""
    return t.detach().as_strided((t.untyped_storage().nbytes() // t.element_size(),), (1,), 0)


def _bits(t):
    return t.contiguous().view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[t.element_size()])


def mend_interpreter() -> None:
    """Make Triton's interpreter compute bfloat16 as the hardware does; without it, it computes with the bit patterns.

    Dots, arithmetic and comparisons go through fp32, and rounding to bfloat16 is to nearest even. Idempotent.
    """
    import numpy as np
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    if getattr(InterpreterBuilder, "_lora_kernels_mended", False):
        return

    def is_bf16(operand):
        return isinstance(operand, TensorHandle) and operand.dtype.scalar == tl.bfloat16

    def to_fp32(operand):
        if not is_bf16(operand):
            return operand
        return TensorHandle((operand.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def to_bf16(data):
        bits = np.ascontiguousarray(data, dtype=np.float32).view(np.uint32)
        nearest_even = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        return TensorHandle(np.where(np.isnan(data), 0x7FC0, nearest_even).astype(np.uint16), tl.bfloat16)

    def through_fp32(method):
        def wrapper(self, *operands):
            result = method(self, *map(to_fp32, operands))
            *_, last = (operand for operand in operands if isinstance(operand, TensorHandle))  # of a dot: accumulator
            return to_bf16(result.data) if is_bf16(last) and result.data.dtype == np.float32 else result

        return wrapper

    def cast(self, source, dst_type):
        if dst_type.scalar != tl.bfloat16:
            return original_cast(self, to_fp32(source), dst_type)
        return source if is_bf16(source) else to_bf16(original_cast(self, source, tl.float32).data)

    original_cast, InterpreterBuilder.cast_impl = InterpreterBuilder.cast_impl, cast
    for name in ("binary_op", "unary_op", "create_fma", "create_dot"):
        setattr(InterpreterBuilder, name, through_fp32(getattr(InterpreterBuilder, name)))
    InterpreterBuilder.get_bf16 = lambda self, value: to_bf16(np.array([value]))
    InterpreterBuilder._lora_kernels_mended = True
