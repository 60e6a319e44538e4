"""`AdapterPool` under 10⁵ tenants, in simulated time: what memory buys, what misses cost, what routing is worth.

No device is timed: the pool decides who is loaded, evicted and refused, and a model of the machine makes times of that.
The quick form prints; the full one also writes benchmarks/results/simulation/pool.json and the plots of docs/serving.md.
"""

import dataclasses
import math
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context

import numpy as np
import torch

from benchmarks import fleet, report
from benchmarks.simulator import MAX_RANK, Crowds, Run, Server, arrivals, clairvoyant_hits, residence, simulate, zipf

METHOD = (
    "discrete events in simulated time around the real AdapterPool on the CPU; no GPU and no link was measured, "
    "so the result depends on no device; the second half of each trace counts"
)
TENANTS = 100_000
RATE = 75.0  # requests a second for each machine: with these steps, 150 in flight on average
MEAN_STEPS = 200
RANKS = {"8, 16, 16, 64": (8, 16, 16, 64), "2 to 64": tuple(range(2, 65))}
ROWS = (4096, 8192, 16384, 32768)
EXPONENTS = (0.9, 1.0, 1.1)
HIT_RATES = (0.90, 0.95, 0.99)
MACHINES = 8
BOUND = 1.25
ROUTERS = ("random", "hashed", "hashed, bounded")
WINDOW_S = 1.0  # of the hit rate around the loss of a machine
SHOWN_S = 20.0  # before it, and after


@dataclasses.dataclass(frozen=True)
class Case:
    """One simulation. `padded`: as many slots as rows of MAX_RANK fit, instead of as many adapters as fit."""

    requests: int = 24_000  # for each machine
    exponent: float = 1.0
    ranks: str = "8, 16, 16, 64"
    rows: int = 8192
    padded: bool = False
    crowds: bool = False
    prefetch: bool = False
    machines: int = 1
    router: str = "random"
    lost: bool = False  # the last machine, in the middle

    @property
    def server(self) -> Server:
        return Server(self.rows // (MAX_RANK if self.padded else min(RANKS[self.ranks])), self.rows)


def _rows_for(exponent, hit_rate) -> int:
    """What a hit rate takes with the first rank mix; by Che's approximation."""
    mean_rank = np.mean(next(iter(RANKS.values())))
    return round(mean_rank * residence(zipf(TENANTS, exponent), hit_rate).sum())


def cases(full: bool) -> tuple[Case, ...]:
    """What is simulated, in the order of the results."""
    if not full:
        return (
            *(Case(4000, exponent) for exponent in EXPONENTS),
            Case(4000, padded=True),
            *(Case(4000, crowds=crowds, prefetch=True) for crowds in (False, True)),
            *(Case(2000, machines=MACHINES, router=router) for router in ROUTERS),
        )
    return (
        *(Case(exponent=exponent, rows=rows) for exponent in EXPONENTS for rows in ROWS),
        *(Case(600_000, exponent, rows=_rows_for(exponent, HIT_RATES[0])) for exponent in EXPONENTS),
        *(Case(rows=rows, ranks="2 to 64") for rows in ROWS),
        *(Case(rows=rows, padded=True) for rows in ROWS),
        *(Case(rows=rows, prefetch=True) for rows in ROWS),
        *(Case(60_000, rows=rows, crowds=True, prefetch=prefetch) for rows in ROWS for prefetch in (False, True)),
        *(Case(10_000, rows=rows, machines=MACHINES, router=router) for rows in ROWS[:3] for router in ROUTERS),
        *(Case(10_000, machines=MACHINES, router=router, lost=True) for router in ("modulo, bounded", ROUTERS[-1])),
    )


def main(full: bool = False) -> None:
    rows = _run_all(cases(full))
    path = None
    if full:
        from benchmarks import pool_figures  # needs matplotlib

        record = {"method": METHOD, "parameters": parameters(), "sizing": sizing(), "rows": rows}
        path = report.save("simulation", "pool", record)
        pool_figures.draw(record)
    columns = ["case", "hits", "GB/s", "wait, ms", "99 %", "stalled", "refused"]
    report.show("AdapterPool under 10⁵ tenants, in simulated time", path, columns, [_line(row) for row in rows])


def run(case: Case) -> dict:
    """Simulate `case`; its row of the results."""
    torch.set_num_threads(1)
    popularity = zipf(TENANTS, case.exponent)
    ranks = np.random.default_rng(0).choice(RANKS[case.ranks], TENANTS)
    count, rate = case.requests * case.machines, RATE * case.machines
    trace = arrivals(count, rate, popularity, MEAN_STEPS, Crowds() if case.crowds else None)
    machine = _route(case, trace)
    runs = [simulate(trace.only(machine == each), ranks, case.server, case.prefetch) for each in range(case.machines)]
    row = {"case": dataclasses.asdict(case), **_figures(case, runs, since=trace.arrival[count // 2])}
    if case.padded:
        hits = clairvoyant_hits(trace.tenant, case.server.slots)
        row["clairvoyant_hit_rate"] = round(float(hits[count // 2 :].mean()), 4)
    return row


def _route(case, trace):
    if case.router == "random":
        return fleet.scattered(trace, case.machines)
    order = fleet.modulo if "modulo" in case.router else fleet.rendezvous
    bound = BOUND if "bounded" in case.router else math.inf

    def sticky(part, machines):
        return fleet.sticky(trace.only(part), order(TENANTS, machines), Server.step_s, bound)

    if not case.lost:
        return sticky(slice(None), case.machines)
    half = len(trace.arrival) // 2
    return np.concatenate([sticky(slice(half), case.machines), sticky(slice(half, None), case.machines - 1)])


def _figures(case, runs, since) -> dict:
    """What the requests that came after `since` saw, on all machines."""
    everything = Run(*(np.concatenate(parts) for parts in zip(*map(Run.columns, runs), strict=True)))
    counted = everything.only(everything.arrival >= since)
    seconds = sum(run.joined.max() - since for run in runs)
    figures = {
        "hit_rate": np.mean(counted.rows == 0),
        "load_gb_s": counted.rows.sum() * case.server.row_bytes / seconds / 1e9,
        "wait_ms": {str(q): round(float(np.percentile(1e3 * counted.waited, q)), 2) for q in (50, 95, 99)},
        "stalled": counted.stalled.sum() / seconds,
        "refused": counted.refused.mean(),
        "busiest": max(len(run.arrival) for run in runs) * len(runs) / len(everything.arrival),
    }
    if case.lost:
        window = np.floor((everything.arrival - since) / WINDOW_S)
        figures["hit_rate_around_loss"] = [
            [WINDOW_S * (each + 0.5), round(float(np.mean(everything.rows[window == each] == 0)), 4)]
            for each in np.unique(window).tolist()
            if -SHOWN_S <= WINDOW_S * each < SHOWN_S
        ]
    return {name: round(float(value), 4) if np.isscalar(value) else value for name, value in figures.items()}


def parameters() -> dict:
    """The model of the machine and its load, as numbers."""
    server = {name: value for name, value in vars(Server).items() if name in Server.__annotations__}
    load = {"tenants": TENANTS, "requests_a_second_and_machine": RATE, "mean_steps": MEAN_STEPS}
    routing = {"machines": MACHINES, "bound": BOUND, "window_s": WINDOW_S}
    return {**server, **load, "crowds": dataclasses.asdict(Crowds()), **routing}


def sizing() -> list[dict]:
    """Slots, and gigabytes at the mean of the first rank mix, for each hit rate and exponent; by Che's approximation."""
    return [
        {
            "exponent": exponent,
            "hit_rate": hit_rate,
            "slots": round(residence(zipf(TENANTS, exponent), hit_rate).sum()),
            "gb": round(_rows_for(exponent, hit_rate) * Server.row_bytes / 1e9),
        }
        for exponent in EXPONENTS
        for hit_rate in HIT_RATES
    ]


def _run_all(cases):
    """The row of each case, from as many processes as there are CPUs, the longest first."""
    by_cost = sorted(cases, key=lambda case: case.requests * case.machines * case.rows, reverse=True)
    with ProcessPoolExecutor(mp_context=get_context("spawn")) as workers:
        futures = {case: workers.submit(run, case) for case in by_cost}
        for _ in _progress(as_completed(futures.values()), len(futures)):
            pass
    return [futures[case].result() for case in cases]


def _progress(steps, total):
    try:
        from rich.progress import track
    except ImportError:
        return steps
    return track(steps, "Simulating", total)


def _line(row):
    case = Case(**row["case"])
    what = [f"Zipf {case.exponent}", f"{case.rows:,} rows", f"ranks {case.ranks}"]
    what += [name for name in ("padded", "crowds", "prefetch") if getattr(case, name)]
    what += [f"{case.machines} machines, {case.router}"] * (case.machines > 1) + ["one lost"] * case.lost
    return [
        "; ".join(what), f"{row['hit_rate']:.1%}", f"{row['load_gb_s']:.1f}", f"{row['wait_ms']['50']:.0f}",
        f"{row['wait_ms']['99']:.0f}", f"{row['stalled']:.1%}", f"{row['refused']:.2f}",
    ]  # fmt: skip
