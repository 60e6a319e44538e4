"""Which backend and which strategy run a problem, and why."""

import functools
import logging
import os
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from lora_kernels import configs, roofline
from lora_kernels.backends import (
    BACKENDS,
    BATCHED_BACKENDS,
    ON_REQUEST,
    cpu,
    cuda_batched,
    cuda_nf4,
    triton,
    triton_batched,
)
from lora_kernels.backends.dequantized import Dequantized, InLoop
from lora_kernels.configs import legality, tuned
from lora_kernels.formats import QuantizedWeight, named

logger = logging.getLogger("lora_kernels")

# one_launch runs on request only: it has not been timed on a GPU yet, and its model has not been confirmed.
DEFAULT_STRATEGIES = ("extended", "single_pass", "chained")
IN_LOOP_ROWS = legality.MAX_ROWS["quantized_extended"]


class Problem(NamedTuple):
    """Everything a choice may depend on.

    `device` is a type such as "cuda"; `capability` is 90 for sm_90, 0 without a GPU; `tma` says whether all operands
    lie on 16-byte boundaries and the device has TMA, `tf32` whether fp32 may run on tensor cores. Where every row has its
    own adapter, `distinct` is the most there can be, and r the largest rank. `gpu` is its name, for the tuned tables.
    A quantised weight has a `format`, takes `weight_bytes`, and `no_tile` says why no kernel can read it, if none can.
    """

    m: int
    n: int
    k: int
    r: int
    dtype: torch.dtype
    lora_dtype: torch.dtype
    dropout: bool
    device: str
    capability: int
    num_sms: int
    tma: bool
    tf32: bool = False
    distinct: int = 0
    gpu: str = ""
    format: str = ""
    weight_bytes: int = 0
    no_tile: str = ""


class Plan(NamedTuple):
    """A backend (module) and a strategy, with the reason for both."""

    backend: Any
    strategy: str
    why: str

    def forward(self, *args):
        return self.backend.forward(*args, self.strategy)

    def add(self, *args):
        return self.backend.add(*args)

    def backward(self, *args):
        return self.backend.backward(*args, self.strategy)


def plan_for(x, weight, lora_a, lora_b, dropout_p, backend=None, strategy=None) -> Plan:
    """The plan for tensors `x [M,K]`, `weight [N,K]` (or a quantised one), `lora_a [R,K]`, `lora_b [N,R]`."""
    n, k = weight.shape
    goal = triton.target(x.device)
    tma = triton.tma_applies(x, _dense(weight, x), lora_a, lora_b)
    problem = Problem(
        x.shape[0], n, k, lora_a.shape[0], x.dtype, lora_a.dtype, dropout_p > 0.0,
        x.device.type, goal.capability, goal.num_sms, tma, uses_tf32(x.dtype), gpu=goal.name, **_format(weight, n, goal),
    )  # fmt: skip
    return choose(problem, _asked_for(backend, problem), strategy)


def batched_plan_for(x, weight, adapters, plan, backend=None, strategy=None) -> Plan:
    """The plan for `x [M,K]`, `weight [N,K]` and the adapters of y's slices; only `forward` applies.

    Without a weight the adapters are added to what is there: then only `add` applies.
    """
    n, k, goal = sum(s.b.shape[1] for s in adapters), x.shape[1], triton.target(x.device)
    distinct = min(len(adapters[0].ranks), max(plan.slots.numel(), 1))
    read = x if weight is None else _dense(weight, x)
    problem = Problem(
        x.shape[0], n, k, max(s.max_rank for s in adapters), x.dtype, x.dtype, False, x.device.type, goal.capability,
        goal.num_sms, triton.tma_applies(x, read), uses_tf32(x.dtype), distinct, goal.name,
        **_format(weight, n, goal),
    )  # fmt: skip
    return choose(problem, _asked_for(backend, problem), strategy)


def _dense(weight, x):
    """What TMA would have to address; of a quantised weight, its dense values."""
    return weight.like(x.dtype) if isinstance(weight, QuantizedWeight) else weight


def _format(weight, n, goal) -> dict[str, Any]:
    """The fields of a problem with n rows of W that say how it is quantised; `weight` may have fewer."""
    if not isinstance(weight, QuantizedWeight):
        return {}
    tile = weight.tile(goal.capability)
    size = weight.nbytes * n // weight.shape[0]
    return dict(format=weight.name, weight_bytes=size, no_tile=tile if isinstance(tile, str) else "")


def _over_format(module, strategy: str, problem: Problem) -> tuple[Any, str]:
    """The backend that runs `strategy` of `module` over a quantised weight, and why in that way."""
    if reasons := named(problem.format).reasons_unsupported(torch.device(problem.device)):
        raise NotImplementedError(f"weight: {problem.format} cannot run this problem: {', '.join(reasons)}")
    if reasons := reasons_not_in_loop(module, strategy, problem):
        why = f"{problem.format} is dequantised into a scratch: {', '.join(reasons)}"
        _say_once(why)
        return Dequantized(module), why
    if module is cuda_batched:
        return InLoop(cuda_nf4), "nf4 is dequantised in the K loop, as asked for"
    in_loop, scratch = (cost.seconds * 1e6 for cost in _costs_over_format(strategy, problem))
    times = f"modelled, not measured: {in_loop:.0f} µs in the K loop, {scratch:.0f} µs with a scratch"
    if in_loop < scratch:
        return InLoop(module), f"{problem.format} is dequantised in the K loop ({times})"
    return Dequantized(module), f"{problem.format} is dequantised into a scratch ({times})"


def reasons_not_in_loop(module, strategy: str, problem: Problem) -> list[str]:
    """Why no kernel of `module` dequantises the weight in its K loop under `strategy`; empty if one does."""
    if module is cuda_batched:
        return cuda_nf4.reasons_unsupported(problem)
    kernel = _quantized_kernel(strategy, problem)
    if module in (triton, triton_batched) and problem.m > IN_LOOP_ROWS:
        return [f"{problem.m} rows > {IN_LOOP_ROWS}, and a K loop would do it again for every tile of rows"]
    if module not in (triton, triton_batched) or kernel not in legality.KERNELS:
        return [f"no kernel of {_name_of(module)} / {strategy} does it in its K loop"]
    if problem.no_tile:
        return [f"its K loop cannot, for {problem.no_tile}"]
    if configs.candidates(kernel, problem.capability, problem.dtype.itemsize, problem.m, problem.r):
        return []
    return [f"{problem.m} rows of {problem.dtype} have no tile that does it in its K loop"]


def _quantized_kernel(strategy, problem):
    return f"quantized_batched_{strategy}" if problem.distinct else f"quantized_{strategy}"


def _costs_over_format(strategy, p) -> tuple[roofline.Cost, roofline.Cost]:
    """The roofline's cost of dequantising in the K loop and into a scratch."""
    kernel = _quantized_kernel(strategy, p)
    tile = configs.lookup(kernel, p.capability, p.dtype.itemsize, p.m, p.n, p.r, p.num_sms)
    rows, columns = max(-(-p.m // tile.block_m), 1), -(-p.n // tile.block_n)
    # A program of `extended` has a whole tile, and without enough of them there are SMs that issue nothing.
    share = 1.0 if p.distinct else min(rows * columns / p.num_sms, 1.0)
    issued = named(p.format).INSTRUCTIONS * p.n * p.k * rows / share
    return _dense_cost(strategy, p, roofline.InLoop(p.weight_bytes, issued)), _scratch_cost(strategy, p)


def _scratch_cost(strategy, p) -> roofline.Cost:
    dequantize = roofline.dequantize_cost(p.n, p.k, p.weight_bytes, p.dtype.itemsize, _ceilings(p.capability))
    return roofline.add(dequantize, _dense_cost(strategy, p))


# The dict behind os.environ, which itself takes microseconds to be asked.
_environment, _BACKEND = os.environ._data, os.environ.encodekey("LORA_KERNELS_BACKEND")


def settings(x) -> tuple:
    """What a choice for `x` depends on beside the call: the backend asked for, and tf32."""
    return _environment.get(_BACKEND), x.dtype is torch.float32 and not x.is_cpu and triton.tf32_allowed()


def uses_tf32(dtype) -> bool:
    """Whether products of `dtype` may run on tensor cores in tf32."""
    return dtype == torch.float32 and triton.tf32_allowed()


def _asked_for(backend, problem):
    """The backend by name; LORA_KERNELS_BACKEND may be one that only the other operation has, and then says nothing."""
    named = os.environ.get("LORA_KERNELS_BACKEND")
    if backend or named is None:
        return backend
    wanted, other = (BATCHED_BACKENDS, BACKENDS) if problem.distinct else (BACKENDS, BATCHED_BACKENDS)
    return None if named in other.keys() - wanted.keys() else named


@functools.lru_cache(maxsize=4096)
def choose(problem: Problem, backend: str | None = None, strategy: str | None = None) -> Plan:
    """The first backend that has no reason against `problem`, and for it the strategy asked for, or the best one.

    Raises ValueError for an unknown name, NotImplementedError where what was asked for cannot run `problem`.
    """
    backends = BATCHED_BACKENDS if problem.distinct else BACKENDS
    if backend is not None and backend not in backends:
        raise ValueError(f"backend: got {backend!r}, expected one of {', '.join(backends)}")
    known = {name for module in backends.values() for name in module.STRATEGIES}
    if strategy is not None and strategy not in known:
        raise ValueError(f"strategy: got {strategy!r}, expected one of {', '.join(sorted(known))}")
    against = []
    for name in (backend,) if backend else (name for name in backends if name not in ON_REQUEST):
        reasons = _reasons(backends[name], strategy, problem)
        if not (reasons or backend) and backends[name] is cpu:
            reasons = cpu.reasons_slower(problem)
        if not reasons:
            chosen, why = (strategy, "asked for") if strategy else _best_strategy(backends[name], problem)
            for reason in against:
                _say_once(f"using the {name} backend, because {reason}")
            if not problem.format:
                return Plan(backends[name], chosen, "; ".join((*against, why)))
            over, how = _over_format(backends[name], chosen, problem)
            return Plan(over, chosen, "; ".join((*against, why, how)))
        against.append(f"{name}: {', '.join(reasons)}")
    asked = " and ".join(f"{kind}={value!r}" for kind, value in (("backend", backend), ("strategy", strategy)) if value)
    raise NotImplementedError(f"{asked} cannot run this problem: {'; '.join(against)}")


@functools.cache
def _say_once(message):
    logger.info(message)


def _reasons(module, strategy, problem) -> list[str]:
    reasons = module.reasons_unsupported(problem)
    if strategy is None or reasons:
        return reasons
    if strategy not in module.STRATEGIES:
        return [f"no strategy {strategy!r}"]
    return module.strategy_reasons_unsupported(strategy, problem)


def _best_strategy(module, problem) -> tuple[str, str]:
    if module not in (triton, triton_batched):
        return module.STRATEGIES[0], "it has no other strategy"
    if problem.dtype == torch.float32 and not problem.tf32:
        return "chained", "fp32 without tf32 has no tensor cores, and cuBLAS is best there"
    if problem.capability >= 90 and not problem.tma:
        operands = "x, weight or y" if problem.distinct else "x, weight, lora_a, lora_b or y"
        why = f"rows of {operands} are not on 16-byte boundaries, so no TMA"
        _say_once(f"using the chained strategy, because {why}")
        return "chained", why
    if choice := _tuned_strategy(module, problem):
        return choice.value, choice.why
    costs = {
        strategy: modelled_cost(strategy, problem).seconds
        for strategy in (module.STRATEGIES if problem.distinct else DEFAULT_STRATEGIES)
        if not module.strategy_reasons_unsupported(strategy, problem)
    }
    best = min(costs, key=costs.get)
    return best, "modelled, not measured: " + ", ".join(f"{name} {t * 1e6:.0f} µs" for name, t in costs.items())


def _tuned_strategy(module, problem) -> tuned.Choice | None:
    """What was measured on this device for the problem, if that can run it; nothing was over a quantised weight."""
    if problem.format:
        return None
    op = "lora_linear_batched" if problem.distinct else "lora_linear"
    shape = (tuned.bucket(problem.m), problem.n, problem.k, problem.r)
    key = tuned.Key(op, *shape, str(problem.dtype).removeprefix("torch."), problem.dropout)
    choice = tuned.table(problem.gpu).get(key)
    return None if choice is None or module.strategy_reasons_unsupported(choice.value, problem) else choice


def modelled_cost(strategy: str, problem: Problem) -> roofline.Cost:
    """The roofline's bytes, flops and seconds of a forward pass under `strategy`."""
    if not problem.format:
        return _dense_cost(strategy, problem)
    if reasons_not_in_loop(triton_batched if problem.distinct else triton, strategy, problem):
        return _scratch_cost(strategy, problem)
    return min(_costs_over_format(strategy, problem), key=lambda cost: cost.seconds)


def _dense_cost(strategy, problem, in_loop=None) -> roofline.Cost:
    m, n, k, r = problem.m, problem.n, problem.k, problem.r
    itemsize, ceilings = problem.dtype.itemsize, _ceilings(problem.capability)
    if problem.distinct:
        return roofline.batched_cost(strategy, m, n, k, r, problem.distinct, itemsize, ceilings, in_loop)
    block_n = 256
    if strategy in ("single_pass", "one_launch"):
        block_n = configs.lookup(strategy, problem.capability, itemsize, m, n, r, problem.num_sms).block_n
    return roofline.forward_cost(strategy, m, n, k, r, itemsize, ceilings, block_n, in_loop)


def _ceilings(capability):
    table = configs.architecture(capability)
    return roofline.Ceilings(table.FLOPS, table.BANDWIDTH, table.ISSUE)


@dataclass(frozen=True)
class Explanation:
    """What dispatch chose for a problem, and what the model says of every strategy; `str()` is for reading."""

    problem: Problem
    plan: Plan
    base: roofline.Cost
    costs: dict[str, roofline.Cost]
    reasons: dict[str, list[str]]
    tiles: dict[str, tuple[configs.Config, str]]

    def __str__(self):
        p = self.problem
        backend = _name_of(self.plan.backend)
        lines = [
            f"y[{p.m},{p.n}] = x[{p.m},{p.k}] Wᵀ + s (x Aᵀ) Bᵀ, r = {p.r}, {p.dtype}, "
            + (f"W in {p.format}, " if p.format else "")
            + (f"adapters = {p.distinct}, " if p.distinct else "")
            + (f"sm_{p.capability}, {p.num_sms} SMs" if p.capability else p.device),
            f"runs     {backend} / {self.plan.strategy}",
            f"because  {self.plan.why}",
            *(f"tile     {kernel} {_tile(config)}: {why}" for kernel, (config, why) in self.tiles.items()),
            "figures  modelled from the roofline; none of them is measured",
            f"{'':12s} {'time':>10s} {'vs base':>8s} {'bytes':>10s} {'flops':>10s}",
            _line("base only", self.base, self.base),
        ]
        for strategy, cost in self.costs.items():
            lines.append(_line(strategy, cost, self.base) + "".join(f"  ({r})" for r in self.reasons[strategy]))
        if p.distinct and backend not in ON_REQUEST:
            lines += (f"{name:12s} on request only: {why}" for name, why in ON_REQUEST.items())
        return "\n".join(lines)


def _name_of(backend) -> str:
    return backend.__name__.rsplit(".", 1)[-1].removesuffix("_batched").removesuffix("_nf4")


def _tile(config):
    extents = [str(extent) for extent in (config.block_m, config.block_n, config.block_k) if extent]
    return f"{' × '.join(extents)}, {config.num_warps} warps, {config.num_stages} stages"


def _line(name, cost, base):
    ratio = cost.seconds / base.seconds
    return f"{name:12s} {cost.seconds * 1e6:7.1f} µs {ratio:8.3f} {cost.bytes / 1e6:7.1f} MB {cost.flops / 1e9:7.1f} GF"


def explain(
    m: int,
    n: int,
    k: int,
    r: int,
    dtype: torch.dtype = torch.bfloat16,
    *,
    capability: int | None = None,
    dropout: bool = False,
    backend: str | None = None,
    strategy: str | None = None,
    adapters: int | None = None,
    weight_format: str | None = None,
) -> Explanation:
    """Why this kernel: the choice for `x [m,k]`, `weight [n,k]`, rank r, on this GPU or on one of `capability` (90: H200).

    With `adapters` it is `lora_linear_batched` that is explained, with as many of them in the batch; with `weight_format`
    ("nf4", ...) the weight is a quantised one, and it is said where it is dequantised, and why there. Without a GPU, and
    with no capability given, sm_90 is explained. Nothing is run. Raises as `lora_linear` does for a backend or strategy that
    cannot run the problem, and ValueError for fewer adapters than one, or dropout with adapters.

    >>> print(explain(8192, 4096, 4096, 16, backend="triton").plan.strategy)
    extended
    """
    if adapters is not None and adapters < 1:
        raise ValueError(f"adapters: got {adapters}, expected at least 1, or None")
    if adapters is not None and dropout:
        raise ValueError("dropout: got True, expected False, since lora_linear_batched has none")
    if capability is None and torch.cuda.is_available():
        capability, num_sms, tma, gpu = triton.target(torch.device("cuda", torch.cuda.current_device()))
    else:
        capability = 90 if capability is None else capability
        num_sms, tma, gpu = configs.architecture(capability).NUM_SMS, capability >= 90, ""
    distinct = 0 if adapters is None else min(adapters, max(m, 1))
    tma = tma and not any(extent * dtype.itemsize % 16 for extent in (n, k, *(() if distinct else (r,))))
    tf32 = uses_tf32(dtype)
    one_row = None if weight_format is None else named(weight_format).quantize(torch.zeros(1, k))
    problem = Problem(
        m, n, k, r, dtype, dtype, dropout, "cuda", capability, num_sms, tma, tf32, distinct, gpu,
        **_format(one_row, n, triton.Target(capability, num_sms, tma)),
    )  # fmt: skip
    module = triton_batched if distinct else triton
    strategies = [
        s
        for s in module.STRATEGIES
        if distinct or s == "chained" or configs.candidates(s, capability, dtype.itemsize, m, r)
    ]
    plan = choose(problem, _asked_for(backend, problem), strategy)
    return Explanation(
        problem,
        plan,
        roofline.base_cost(m, n, k, dtype.itemsize, _ceilings(capability)),
        {s: modelled_cost(s, problem) for s in strategies},
        {s: module.strategy_reasons_unsupported(s, problem) for s in strategies},
        _tiles(problem, plan) if getattr(plan.backend, "backend", plan.backend) is module else {},
    )


def _tiles(p, plan):
    """The forward pass's kernels with their tiles, and whether those were measured."""
    strategy, in_loop = plan.strategy, isinstance(plan.backend, InLoop)
    kernels = ["shrink"] if strategy in ("extended", "chained") or p.distinct else []
    kernels += [strategy] if strategy != "chained" or p.distinct else []
    found = {}
    for kernel in kernels:
        n, aligned = p.r if kernel == "shrink" else p.n, p.tma or p.capability < 90
        name = f"batched_{kernel}" if p.distinct else kernel
        name = f"quantized_{name}" if in_loop and kernel == strategy else name
        choice = triton.tuned_config(name, p.gpu, p.dtype, p.m, n, p.k, p.r, aligned=aligned)
        usual = configs.lookup(name, p.capability, p.dtype.itemsize, p.m, n, p.r, p.num_sms, aligned=aligned)
        found[name] = (choice.value, choice.why) if choice else (usual, "modelled, not measured")
    return found
