"""Which backend and which strategy run a problem, and why."""

import functools
import logging
import os
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from lora_kernels import configs, roofline
from lora_kernels.backends import BACKENDS, BATCHED_BACKENDS, triton, triton_batched

logger = logging.getLogger("lora_kernels")

# one_launch runs on request only: it has not been timed on a GPU yet, and its model has not been confirmed.
DEFAULT_STRATEGIES = ("extended", "single_pass", "chained")


class Problem(NamedTuple):
    """Everything a choice may depend on.

    `device` is a type such as "cuda"; `capability` is 90 for sm_90, 0 without a GPU; `tma` says whether all operands
    lie on 16-byte boundaries and the device has TMA, `tf32` whether fp32 may run on tensor cores. Where every row has its
    own adapter, `distinct` is the most there can be, and r the largest rank.
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


class Plan(NamedTuple):
    """A backend (module) and a strategy, with the reason for both."""

    backend: Any
    strategy: str
    why: str

    def forward(self, *args):
        return self.backend.forward(*args, self.strategy)

    def backward(self, *args):
        return self.backend.backward(*args, self.strategy)


def plan_for(x, weight, lora_a, lora_b, dropout_p, backend=None, strategy=None) -> Plan:
    """The plan for tensors `x [M,K]`, `weight [N,K]`, `lora_a [R,K]`, `lora_b [N,R]`."""
    n, k = weight.shape
    goal = triton.target(x.device)
    tma = triton.tma_applies(x, weight, lora_a, lora_b)
    problem = Problem(
        x.shape[0], n, k, lora_a.shape[0], x.dtype, lora_a.dtype, dropout_p > 0.0,
        x.device.type, goal.capability, goal.num_sms, tma, x.dtype == torch.float32 and triton.tf32_allowed(),
    )  # fmt: skip
    return choose(problem, _asked_for(backend, problem), strategy)


def batched_plan_for(x, weight, adapters, plan, backend=None, strategy=None) -> Plan:
    """The plan for `x [M,K]`, `weight [N,K]` and the adapters of y's slices; only `forward` applies."""
    (n, k), goal = weight.shape, triton.target(x.device)
    distinct = min(len(adapters[0].ranks), max(plan.slots.numel(), 1))
    problem = Problem(
        x.shape[0], n, k, max(s.max_rank for s in adapters), x.dtype, x.dtype, False, x.device.type, goal.capability,
        goal.num_sms, triton.tma_applies(x, weight), x.dtype == torch.float32 and triton.tf32_allowed(), distinct,
    )  # fmt: skip
    return choose(problem, _asked_for(backend, problem), strategy)


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
    for name in (backend,) if backend else backends:
        reasons = _reasons(backends[name], strategy, problem)
        if not reasons:
            chosen, why = (strategy, "asked for") if strategy else _best_strategy(backends[name], problem)
            for reason in against:
                _say_once(f"using the {name} backend, because {reason}")
            return Plan(backends[name], chosen, "; ".join((*against, why)))
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
    costs = {
        strategy: modelled_cost(strategy, problem).seconds
        for strategy in (module.STRATEGIES if problem.distinct else DEFAULT_STRATEGIES)
        if not module.strategy_reasons_unsupported(strategy, problem)
    }
    best = min(costs, key=costs.get)
    return best, "modelled, not measured: " + ", ".join(f"{name} {t * 1e6:.0f} µs" for name, t in costs.items())


def modelled_cost(strategy: str, problem: Problem) -> roofline.Cost:
    """The roofline's bytes, flops and seconds of a forward pass under `strategy`."""
    m, n, k, r = problem.m, problem.n, problem.k, problem.r
    itemsize, ceilings = problem.dtype.itemsize, _ceilings(problem.capability)
    if problem.distinct:
        return roofline.batched_cost(strategy, m, n, k, r, problem.distinct, itemsize, ceilings)
    block_n = 256
    if strategy in ("single_pass", "one_launch"):
        block_n = configs.lookup(strategy, problem.capability, itemsize, m, n, r, problem.num_sms).block_n
    return roofline.forward_cost(strategy, m, n, k, r, itemsize, ceilings, block_n)


def _ceilings(capability):
    table = configs.architecture(capability)
    return roofline.Ceilings(table.FLOPS, table.BANDWIDTH)


@dataclass(frozen=True)
class Explanation:
    """What dispatch chose for a problem, and what the model says of every strategy; `str()` is for reading."""

    problem: Problem
    plan: Plan
    base: roofline.Cost
    costs: dict[str, roofline.Cost]
    reasons: dict[str, list[str]]

    def __str__(self):
        p = self.problem
        backend = self.plan.backend.__name__.rsplit(".", 1)[-1].removesuffix("_batched")
        lines = [
            f"y[{p.m},{p.n}] = x[{p.m},{p.k}] Wᵀ + s (x Aᵀ) Bᵀ, r = {p.r}, {p.dtype}, "
            + (f"adapters = {p.distinct}, " if p.distinct else "")
            + (f"sm_{p.capability}, {p.num_sms} SMs" if p.capability else p.device),
            f"runs     {backend} / {self.plan.strategy}",
            f"because  {self.plan.why}",
            "figures  modelled from the roofline; none of them is measured",
            f"{'':12s} {'time':>10s} {'vs base':>8s} {'bytes':>10s} {'flops':>10s}",
            _line("base only", self.base, self.base),
        ]
        for strategy, cost in self.costs.items():
            lines.append(_line(strategy, cost, self.base) + "".join(f"  ({r})" for r in self.reasons[strategy]))
        return "\n".join(lines)


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
) -> Explanation:
    """Why this kernel: the choice for `x [m,k]`, `weight [n,k]`, rank r, on this GPU or on one of `capability` (90: H200).

    With `adapters` it is `lora_linear_batched` that is explained, with as many of them in the batch. Without a GPU, and
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
        capability, num_sms, tma = triton.target(torch.device("cuda", torch.cuda.current_device()))
    else:
        capability = 90 if capability is None else capability
        num_sms, tma = configs.architecture(capability).NUM_SMS, capability >= 90
    distinct = 0 if adapters is None else min(adapters, max(m, 1))
    tma = tma and not any(extent * dtype.itemsize % 16 for extent in (n, k, *(() if distinct else (r,))))
    tf32 = dtype == torch.float32 and triton.tf32_allowed()
    problem = Problem(m, n, k, r, dtype, dtype, dropout, "cuda", capability, num_sms, tma, tf32, distinct)
    module = triton_batched if distinct else triton
    strategies = [
        s
        for s in module.STRATEGIES
        if distinct or s == "chained" or configs.candidates(s, capability, dtype.itemsize, m, r)
    ]
    return Explanation(
        problem,
        choose(problem, _asked_for(backend, problem), strategy),
        roofline.base_cost(m, n, k, dtype.itemsize, _ceilings(capability)),
        {s: modelled_cost(s, problem) for s in strategies},
        {s: module.strategy_reasons_unsupported(s, problem) for s in strategies},
    )
