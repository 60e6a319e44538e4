"""A serving machine in simulated time around a real `AdapterPool`: the pool decides, the clock is arithmetic.

Time goes by in decode steps. Between two of them requests leave, and others join in the order of their arrival, up to
the batch limit and as far as the pool has slots and rows; a step begins when the adapters of those that joined are there.
Copies share one link, one after another. The adapters are one layer of 1 × 1, since the pool's decisions depend on ranks
alone; their time on the link is that of a real model.
"""

import dataclasses
import heapq
from collections import deque

import numpy as np
import torch

from lora_kernels import AdapterPool
from lora_kernels.adapters.pool import PoolFullError

MAX_RANK = 64


@dataclasses.dataclass(frozen=True)
class Server:
    """One machine: `slots` and `rows` are its pool's, and the rest is the model of time."""

    slots: int
    rows: int
    batch: int = 256
    step_s: float = 0.010  # one decode step of the whole batch
    link_bytes_s: float = 50e9  # host to device
    row_bytes: int = 5_242_880  # one rank of every projection of Llama-3-8B in bf16


@dataclasses.dataclass(frozen=True)
class Crowds:
    """Now and then a few tenants, drawn anew each time, double the load between them."""

    every_s: float = 40.0  # mean of the exponential time between two
    last_s: float = 10.0  # mean of the exponential time that one lasts
    tenants: int = 8


@dataclasses.dataclass(frozen=True)
class Trace:
    """Requests in the order of their arrival, `[requests]` each: when, whose, and for how many decode steps."""

    arrival: np.ndarray
    tenant: np.ndarray
    steps: np.ndarray

    def only(self, chosen: np.ndarray) -> "Trace":
        return Trace(self.arrival[chosen], self.tenant[chosen], self.steps[chosen])


@dataclasses.dataclass(frozen=True)
class Run:
    """What became of each request, `[requests]` each.

    joined   when its first step began
    rows     copied for it
    refused  times that the pool had no place for it
    stalled  seconds that its joining held up the batch
    """

    arrival: np.ndarray
    joined: np.ndarray
    rows: np.ndarray
    refused: np.ndarray
    stalled: np.ndarray

    @property
    def waited(self) -> np.ndarray:
        return self.joined - self.arrival

    def columns(self) -> list[np.ndarray]:
        return [getattr(self, field.name) for field in dataclasses.fields(self)]

    def only(self, chosen: np.ndarray) -> "Run":
        return Run(*(column[chosen] for column in self.columns()))


def zipf(tenants: int, exponent: float) -> np.ndarray:
    """The share of each tenant's requests, the most popular first."""
    weights = np.arange(1, tenants + 1) ** -exponent
    return weights / weights.sum()


def arrivals(
    count: int, rate: float, popularity: np.ndarray, mean_steps: float, crowds: Crowds | None = None, seed: int = 0
) -> Trace:
    """`count` Poisson arrivals of `rate` a second on average; with `crowds`, Poisson at a rate that depends on them."""
    rng = np.random.default_rng(seed)
    tenant = rng.choice(len(popularity), count, p=popularity)
    steps = rng.geometric(1 / mean_steps, count)
    work = np.cumsum(rng.exponential(size=count))  # a Poisson process of rate 1, to be bent to the rate of the time
    if crowds is None:
        return Trace(work / rate, tenant, steps)
    periods = int(count / rate / (crowds.every_s + crowds.last_s)) * 2 + 8
    lengths = rng.exponential((crowds.every_s, crowds.last_s), (periods, 2)).ravel()  # calm and crowded in turn
    calm_rate = rate / (1 + crowds.last_s / (crowds.every_s + crowds.last_s))
    rates = np.tile((calm_rate, 2 * calm_rate), periods)
    ends = np.cumsum(lengths * rates)
    period = np.searchsorted(ends, work)
    hot = rng.integers(len(popularity), size=(len(lengths), crowds.tenants))
    in_crowd = (period % 2 == 1) & (rng.random(count) < 0.5)
    tenant = np.where(in_crowd, hot[period, rng.integers(crowds.tenants, size=count)], tenant)
    return Trace(np.interp(work, np.append(0, ends), np.append(0, np.cumsum(lengths))), tenant, steps)


def simulate(trace: Trace, ranks: np.ndarray, server: Server, prefetch: bool = False) -> Run:
    """Serve the whole trace; `ranks [tenants]`. With `prefetch`, copies start when requests arrive."""
    return _Simulation(trace, ranks, server, prefetch).run()


class _Simulation:
    def __init__(self, trace, ranks, server, prefetch):
        self.trace, self.server, self.prefetch = trace, server, prefetch
        self.names = list(map(str, trace.tenant))
        self.ranks = ranks[trace.tenant]
        self.pool = AdapterPool({"layer": (1, 1)}, server.slots, MAX_RANK, torch.float16, rows=server.rows)
        for name, rank in dict(zip(self.names, self.ranks.tolist(), strict=True)).items():
            self.pool.load_tensors(name, {"layer": (torch.ones(rank, 1), torch.ones(1, rank), 1.0)})
        self.arrived = 0
        self.queue = deque()
        self.running = []  # a heap of (the step at which it is gone, request)
        self.link_free = 0.0
        self.copied = {}  # when the last copy of each adapter ends
        count = len(self.names)
        self.result = Run(trace.arrival, *(np.zeros(count, dtype) for dtype in (float, int, int, float)))

    def run(self) -> Run:
        now, step = 0.0, 0
        while self.arrived < len(self.names) or self.queue or self.running:
            if not self.queue and not self.running:
                now = max(now, self.trace.arrival[self.arrived])
            self._arrive(now)
            self._leave(step)
            now = self._join(now, step) + self.server.step_s
            step += 1
        return self.result

    def _arrive(self, now):
        while self.arrived < len(self.names) and self.trace.arrival[self.arrived] <= now:
            if self.prefetch:
                self._watch(self.pool.prefetch, self.arrived, self.trace.arrival[self.arrived])
            self.queue.append(self.arrived)
            self.arrived += 1

    def _leave(self, step):
        while self.running and self.running[0][0] <= step:
            self.pool.release(self.names[heapq.heappop(self.running)[1]])

    def _join(self, now, step) -> float:
        """Let requests in; returns when their adapters are there."""
        joined, start = [], now
        while self.queue and len(self.running) < self.server.batch:
            request = self.queue[0]
            try:
                self._watch(self.pool.acquire, request, now)
            except PoolFullError:
                self.result.refused[request] += 1
                break
            heapq.heappush(self.running, (step + self.trace.steps[request], self.queue.popleft()))
            start = max(start, self.copied[self.names[request]])
            joined.append(request)
        self.result.joined[joined] = start
        self.result.stalled[joined[:1]] = start - now
        return start

    def _watch(self, call, request, now):
        """Call the pool; if it copied the adapter, put that on the link."""
        before = self.pool.statistics.bytes_copied
        call(self.names[request])
        if self.pool.statistics.bytes_copied > before:
            rows = self.ranks[request]
            self.link_free = max(self.link_free, now) + rows * self.server.row_bytes / self.server.link_bytes_s
            self.copied[self.names[request]] = self.link_free
            self.result.rows[request] += rows


def residence(popularity: np.ndarray, hit_rate: float) -> np.ndarray:
    """The share of time that each adapter is resident when LRU has that hit rate: Che's approximation.

    An adapter stays for a time t after each use, the same t for all; with Poisson arrivals it is then found there with
    probability 1 - exp(-popularity · t). Sums of the result, weighted or not, are the rows or slots that this takes.
    """
    low, high = 0.0, 60.0
    for _ in range(60):
        t = (low + high) / 2
        found = -np.expm1(-popularity * np.exp(t))
        low, high = (t, high) if popularity @ found < hit_rate else (low, t)
    return found


def clairvoyant_hits(tenants: np.ndarray, slots: int) -> np.ndarray:
    """Whether each request finds its adapter in one of `slots` if the one that is needed last is evicted: Bélády's bound."""
    following, last = np.empty(len(tenants), int), {}
    for i in reversed(range(len(tenants))):
        following[i] = last.get(tenants[i], len(tenants) + tenants[i])  # never again: any of these is as good
        last[tenants[i]] = i
    resident, heap, hits = {}, [], np.zeros(len(tenants), bool)
    for i, tenant in enumerate(tenants):
        hits[i] = tenant in resident
        while not hits[i] and len(resident) == slots:
            needed, victim = heapq.heappop(heap)
            if resident.get(victim) == -needed:
                del resident[victim]
        resident[tenant] = following[i]
        heapq.heappush(heap, (-following[i], tenant))
    return hits
