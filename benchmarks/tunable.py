"""What the tuner can choose: for every kernel its space of configs, its tensors, its gate and the step that is timed."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable
from types import SimpleNamespace
from unittest import mock

import torch

from benchmarks import runner
from lora_kernels import (
    BatchPlan,
    LayerAdapters,
    configs,
    dispatch,
    functional,
    reference,
    static_gate,
    testing,
)
from lora_kernels.backends import triton as backend
from lora_kernels.backends import triton_batched
from lora_kernels.configs import Config, Row, legality, tuned
from lora_kernels.configs.tuned import Key

TRAINING, SERVING = configs.STRATEGIES
SCALING, DROPOUT_P = 2.0, 0.1
DECODE_ROWS = triton_batched.DECODE_ROWS
PREFILL_ADAPTERS = 8
GATE_EXTENT = 1024  # several tiles of any config; what is written is gated again, in full
PIPELINED = dict(num_warps=(4, 8), num_stages=(1, 2, 3, 4, 5, 6))
GEMM = dict(block_m=(64, 128, 256), block_n=(64, 128, 256), block_k=(32, 64, 128), group_m=(4, 8, 16)) | PIPELINED
HALVED = GEMM | dict(halves=(False, True))
DECODE = dict(block_m=(16, 32, 64), block_n=(32, 64, 128), block_k=(64, 128, 256)) | PIPELINED
PASS = dict(block_m=(32, 64, 128), block_n=(64, 128, 256)) | PIPELINED
SPACES = {
    "shrink": dict(block_m=(32, 64, 128), block_k=(32, 64, 128, 256)) | PIPELINED,
    "extended": HALVED,
    "single_pass": HALVED,
    "one_launch": HALVED,
    "dy_pass": PASS,
    "wgrad": PASS,
    "batched_shrink": dict(block_m=(16, 32, 64), block_n=(32, 64, 128), block_k=(32, 64, 128, 256)) | PIPELINED,
    "batched_one_launch": DECODE,
    "batched_extended": GEMM,
    "batched_chained": dict(block_m=(32, 64, 128), block_n=(64, 128, 256), num_warps=(4, 8)),
}
DECODING = {"single_pass": DECODE, "batched_extended": DECODE}  # up to DECODE_ROWS


def keys_for(m: int, n: int, k: int, r: int, dtype: str, dropout: bool = False, adapters: bool = False) -> list[Key]:
    """What a layer's choices are, in the order in which they are made: its kernels', and then its strategy."""
    if adapters:
        kernels = ("batched_extended", "batched_chained") + (("batched_one_launch",) if m <= DECODE_ROWS else ())
        return [
            Key("batched_shrink", m, r, k, r, dtype),
            *(Key(kernel, m, n, k, r, dtype) for kernel in kernels),
            Key(SERVING, m, n, k, r, dtype),
        ]
    fused = [] if dropout or r > legality.MAX_RANK["one_launch"] else [
        Key("one_launch", m, n, k, r, dtype), Key("single_pass", m, n, k, r, dtype)
    ]  # fmt: skip
    keys = [Key("extended", m, n, k, r, dtype), *fused, Key("shrink", m, r, k, r, dtype, dropout)]
    if m > DECODE_ROWS:  # nobody trains on fewer rows
        keys.append(Key("extended", m, k, n, r, dtype, dropout, kn=True))
        keys += [Key("one_launch", m, k, n, r, dtype, kn=True)] if fused else []
        if r <= backend.DY_PASS_MAX_RANK:
            keys.append(Key("dy_pass", m, n, n, r, dtype))
        else:
            keys += [Key("shrink", m, r, n, r, dtype), Key("wgrad", m, n, n, r, dtype)]
        keys.append(Key("wgrad", m, k, k, r, dtype, dropout))
    return list(dict.fromkeys((*keys, Key(TRAINING, m, n, k, r, dtype, dropout))))


def heuristic(key: Key, goal: backend.Target) -> Config | str:
    """What runs where nothing is measured. LookupError where nothing can, as one_launch on sm_80."""
    if key.op in configs.STRATEGIES:
        return dispatch.choose(_problem(key, goal)._replace(gpu="")).strategy
    return configs.lookup(key.op, goal.capability, _itemsize(key), key.m, key.n, key.r, goal.num_sms, key.dropout)


def candidates(key: Key, goal: backend.Target) -> list[Config | str]:
    """Where the search begins: the heuristics' choice, then the rest of the tile table, or of the strategies."""
    usual = heuristic(key, goal)
    if key.op in configs.STRATEGIES:
        module, problem = triton_batched if key.op == SERVING else backend, _problem(key, goal)
        others = [s for s in module.STRATEGIES if not module.strategy_reasons_unsupported(s, problem)]
    else:
        rows = configs.candidates(key.op, goal.capability, _itemsize(key), key.m, key.r, key.dropout)
        others = [row.config for row in rows]
    return list(dict.fromkeys((usual, *others)))


def neighbours(key: Key, config: Config | str, goal: backend.Target, steps: int = 1) -> list[Config]:
    """The configs that the rules allow, up to `steps` steps away: a step takes one field to the next value of its space."""
    if key.op in configs.STRATEGIES:
        return []
    space = DECODING.get(key.op, SPACES[key.op]) if key.m <= DECODE_ROWS else SPACES[key.op]
    found = {config: None}
    for _ in range(steps):
        found |= dict.fromkeys(near for config in found for near in _one_step(config, space))
    problem = goal.capability, _itemsize(key), key.r, key.m, key.dropout
    return [near for near in found if near != config and not legality.reasons_illegal(key.op, near, *problem)]


def _one_step(config, space):
    for name, values in space.items():
        here = getattr(config, name)
        below, above = [v for v in values if v < here], [v for v in values if v > here]
        for value in (*below[-1:], *above[:1]):
            yield dataclasses.replace(config, **{name: value})


def reasons_illegal(key: Key, config: Config, capability: int, num_sms: int) -> list[str]:
    """Why the compiler, or a rule, is against `config`; seconds of compiling, so many processes are asked at once.

    What compiles cleanly is left in Triton's cache, where the launch will find it.
    """
    n, k = (key.k, key.n) if key.kn else (key.n, key.k)
    if key.op in ("shrink", "batched_shrink", "dy_pass", "wgrad"):
        n, k = (key.n, 4096) if key.op == "dy_pass" else (4096, key.k)
    case = static_gate.Case(_dtype(key), key.r, key.m, n, k, dropout_p=DROPOUT_P if key.dropout else 0.0)
    row = Row(key.op, config, _itemsize(key))
    return static_gate.reasons_illegal(case, row, capability, num_sms, key.kn, keep=True)


@contextlib.contextmanager
def pinned(key: Key, value: Config | str):
    """Inside, the backend launches `key.op` with this config, whatever the tables say."""
    lookup = backend._lookup

    def choose(kernel, *rest):
        *_, kn = rest
        return value if (kernel, kn) == (key.op, key.kn) else lookup(kernel, *rest)

    with mock.patch.object(backend, "_lookup", choose):
        yield


@contextlib.contextmanager
def decided(choices: dict[Key, tuned.Choice]):
    """Inside, these choices are the tuned table of every device."""

    def forget():
        backend._lookup.cache_clear()
        dispatch.choose.cache_clear()

    with mock.patch.object(tuned, "table", lambda device: choices):
        forget()
        yield
    forget()


def bytes_of(key: Key) -> int:
    """Of the large tensors that a step reads and writes."""
    wide = key.n if key.op not in ("shrink", "batched_shrink", "dy_pass", "wgrad") else 0
    return _itemsize(key) * (key.m * key.k + key.m * wide + key.k * wide)


def tensors(key: Key, device: torch.device, seed: int = 0) -> SimpleNamespace:
    """Random operands of a step, that many candidates can share."""
    normal = _normal(key, device, seed)
    m, n, k, r = key[1:5]
    if key.op == TRAINING:
        t = SimpleNamespace(x=normal(m, k), weight=normal(n, k), a=normal(r, k), b=normal(n, r), dy=normal(m, n))
        for trained in (t.x, t.a, t.b) if m > DECODE_ROWS else ():
            trained.requires_grad_()
        return t
    if key.op.startswith("batched_") or key.op == SERVING:
        batch = _batch(normal, m, 4096 if key.op == "batched_shrink" else n, k, r, device)
        batch.y = normal(m, n) if key.op == "batched_chained" else None
        return batch
    w, b = (normal(k, n), normal(r, n)) if key.kn else (normal(n, k).mT, normal(n, r).mT)
    a = normal(k, r) if key.kn or key.op == "dy_pass" else normal(r, k).mT
    out = torch.empty(r, k, dtype=a.dtype, device=device).mT
    dropout = (DROPOUT_P, functional.draw_seed(device)) if key.dropout else (0.0, None)
    return SimpleNamespace(x=normal(m, k), h=normal(m, r), w=w, a=a, b=b, out=out, dropout=dropout)


def step(key: Key, value: Config | str, t: SimpleNamespace) -> Callable[[], object]:
    """The function that is timed: one kernel, with what sums up its planes, or a whole operation."""
    if key.op == TRAINING:
        call = functools.partial(
            functional.lora_linear, t.x, t.weight, t.a, t.b, SCALING, dropout_p=DROPOUT_P if key.dropout else 0.0,
            backend="triton", strategy=value,
        )  # fmt: skip
        if key.m <= DECODE_ROWS:
            return call
        return lambda: torch.autograd.grad(call(), (t.x, t.a, t.b), t.dy)
    if key.op == SERVING:
        return lambda: triton_batched.forward(t.x, t.weight, None, t.adapters, t.plan, value)
    run = _batched_step(key, t) if key.op.startswith("batched_") else _STEPS[key.op]

    def pinned_step():
        with pinned(key, value):
            return run(t)

    return pinned_step


_STEPS = {
    "extended": lambda t: backend._extended(t.x, t.w, t.h, t.b, None, *t.dropout),
    "single_pass": lambda t: backend._single_pass(t.x, t.w, t.a, t.b, None, SCALING),
    "one_launch": lambda t: backend._one_launch(t.x, t.w, t.a, t.b, None, SCALING),
    "shrink": lambda t: backend._shrink(t.x, t.a, SCALING, *t.dropout),
    "dy_pass": lambda t: backend._dy_pass(t.x, t.a, t.h, SCALING, t.x.dtype),
    "wgrad": lambda t: backend._wgrad(t.x, t.h, t.out, *t.dropout),
}


def _batched_step(key, t):
    tables = triton_batched._Tables.of(t.adapters)

    def run(t):
        h = triton_batched._H.of(t.x, t.adapters, t.plan)
        if key.op == "batched_one_launch":
            return triton_batched._one_launch(t.x, t.weight, None, tables, t.plan, h)
        if key.op == "batched_shrink":
            return triton_batched._shrink(t.x, tables, t.plan, h)
        return triton_batched._extended(t.x, t.weight, None, tables, t.plan, h, t.y)

    return run


def _batch(normal, m, n, k, r, device):
    """While decoding every row has its own adapter; else some long runs of rows have one each."""
    adapters = m if m <= DECODE_ROWS else PREFILL_ADAPTERS
    slots = (torch.arange(m) * adapters // m).to(torch.int32).to(device)
    tables = torch.full((adapters,), r, dtype=torch.int32, device=device), torch.ones(adapters, device=device)
    one_slice = LayerAdapters(normal(adapters, r, k), normal(adapters, n, r), *tables)
    return SimpleNamespace(
        x=normal(m, k), weight=normal(n, k), adapters=(one_slice,), plan=BatchPlan(slots), slots=slots
    )


def gate(key: Key, value: Config | str, device: torch.device, in_full: bool = False) -> str | None:
    """Why `value` may not be timed: it misses the error budget of the layer it is part of. None if it passes."""
    m, n, k = key[1:4]
    if not in_full:
        m, n, k = (min(extent, GATE_EXTENT) for extent in (m, n, k))
    case = testing.Case(m, n, k, key.r, _dtype(key), scaling=SCALING, dropout_p=DROPOUT_P if key.dropout else 0.0)
    strategy = key.op.removeprefix("batched_") if key.op not in configs.STRATEGIES else value
    strategy = strategy if strategy in (*backend.STRATEGIES, *triton_batched.STRATEGIES) else "chained"
    config = contextlib.nullcontext() if key.op in configs.STRATEGIES else pinned(key, value)
    try:
        with config:
            if key.op.startswith("batched_") or key.op == SERVING:
                _check_batched(case, strategy, device)
            else:
                testing.check(case, "triton", strategy, device)
    except Exception as error:  # also a launch's that needs more than there is
        return runner.verdict_of(error, device).words


def _check_batched(case, strategy, device):
    def normal(*shape):
        generator = torch.Generator(device).manual_seed(sum(shape))
        return (torch.randn(shape, generator=generator, device=device) * shape[-1] ** -0.5).to(case.dtype)

    batch = _batch(normal, case.m, case.n, case.k, case.r, device)
    [one_slice] = batch.adapters

    def expected(convert, scalings):
        return reference.lora_linear_batched(
            *map(convert, (batch.x, batch.weight, one_slice.a, one_slice.b)), one_slice.ranks, scalings, batch.slots
        )

    with testing.poisoned_empty():
        y = triton_batched.forward(batch.x, batch.weight, None, batch.adapters, batch.plan, strategy)
        again = triton_batched.forward(batch.x, batch.weight, None, batch.adapters, batch.plan, strategy)
    if not torch.equal(y, again):
        raise AssertionError(f"y: a second run gave other bits\n{case}")
    truth, eager = expected(torch.Tensor.double, one_slice.scalings), expected(lambda t: t, one_slice.scalings)
    magnitude = expected(lambda t: t.double().square(), one_slice.scalings.square()).sqrt()
    testing.compare(case, "y", y, truth, eager, magnitude)


def _problem(key, goal):
    dtype = _dtype(key)
    adapters = 0 if key.op == TRAINING else key.m if key.m <= DECODE_ROWS else PREFILL_ADAPTERS
    device = "cuda" if goal.capability else "cpu"
    return dispatch.Problem(key.m, key.n, key.k, key.r, dtype, dtype, key.dropout, device, goal.capability, goal.num_sms,
                            goal.tma, distinct=adapters, gpu=goal.name)  # fmt: skip


def _normal(key, device, seed):
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape):
        return (torch.randn(shape, generator=generator, device=device) * shape[-1] ** -0.5).to(_dtype(key))

    return normal


def _dtype(key):
    return getattr(torch, key.dtype)


def _itemsize(key):
    return tuned.ITEMSIZES[key.dtype]
