"""How a router spreads tenants over machines: at random, or each tenant to a machine of its own, with or without bounds."""

import heapq
import math

import numpy as np

from benchmarks.simulator import Trace


def rendezvous(tenants: int, machines: int, seed: int = 0) -> np.ndarray:
    """The machines in each tenant's order of preference, `[tenants, machines]`, as rendezvous hashing orders them.

    Without the last machine the orders stay as they are otherwise.
    """
    return np.random.default_rng(seed).random((machines, tenants)).argsort(axis=0).T


def modulo(tenants: int, machines: int, seed: int = 0) -> np.ndarray:
    """As `rendezvous`, for the hash of a tenant's name modulo the number of machines, and the machines after that one."""
    hashes = np.random.default_rng(seed).integers(2**62, size=tenants)
    return (hashes[:, None] + np.arange(machines)) % machines


def scattered(trace: Trace, machines: int, seed: int = 0) -> np.ndarray:
    """A random machine for each request."""
    return np.random.default_rng(seed).integers(machines, size=len(trace.tenant))


def sticky(trace: Trace, order: np.ndarray, step_s: float, bound: float = math.inf) -> np.ndarray:
    """For each request the first machine in its tenant's `order` whose load is below `bound` times the mean.

    A load is the number of requests in flight, each for as long as its steps take.
    """
    machines = order.shape[1]
    load, in_flight, chosen = np.zeros(machines), [], []
    for arrival, tenant, steps in zip(trace.arrival, trace.tenant, trace.steps, strict=True):
        while in_flight and in_flight[0][0] <= arrival:
            load[heapq.heappop(in_flight)[1]] -= 1
        most = bound * (len(in_flight) + 1) / machines
        machine = next(machine for machine in order[tenant] if load[machine] < most)
        load[machine] += 1
        heapq.heappush(in_flight, (arrival + steps * step_s, machine))
        chosen.append(machine)
    return np.array(chosen)
