"""Run a suite: gate every provider, time those that passed in turns, write each cell as soon as it is finished.

A cell is a problem and a pass. Cells that the result file has from the same code, device and versions are not run again.
"""

import json
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import NamedTuple

import torch

from benchmarks import ceilings, providers, report, trace
from benchmarks.problems import roofline_seconds
from benchmarks.providers import Provider
from benchmarks.timing import buffer_sets, device_timer, summary, take_turns
from lora_kernels import testing

SLACK = 4.0  # what a rival's error may be over the budget of ours: its gate finds what is wrong, not what is coarse
QUICK, FULL = 15, 60  # rounds
METHOD = {
    "cuda": "replays of a CUDA graph that goes through buffer sets larger than L2",
    "cpu": "calls on the host's clock, caches warm unless the case goes through several layers",
}
TURNS = "providers take turns in random order; ratio_to_base: median over the rounds of time / base layer's time"


class Verdict(NamedTuple):
    """ "passed", or why there is no figure; `error` is the worst result's, as a multiple of its budget."""

    words: str
    error: float | None = None

    @property
    def is_green(self) -> bool:
        return self.words in ("passed", "is the yardstick")


@dataclass(frozen=True)
class Suite:
    """`problems` by type of device, the first `quick` of them for the quick form; a type without any: not run there."""

    name: str
    title: str
    problems: dict[str, tuple]
    quick: dict[str, int]
    timer: Callable = device_timer
    method: str = ""
    more: tuple[Provider, ...] = ()
    without: tuple[str, ...] = ()

    def measure(self, problem, what, gates, device, rates, repeats) -> list[dict]:
        """A row for every provider of the gates, timed where its gate is green."""
        return timed_rows(self, problem, what, gates, device, rates, repeats)


class Stopped(Exception):
    """There was no time for the rest; what was measured is in the result file."""


def run(
    suite: Suite, device: torch.device, full: bool = False, fresh: bool = False, without: tuple[str, ...] = (),
    stop: Callable[[], bool] = lambda: False,
) -> dict:  # fmt: skip
    """Measure what the result file lacks; returns the file's record. Raises Stopped where `stop()` before a cell."""
    repeats, problems = FULL if full else QUICK, suite.problems[device.type]
    problems = problems if full else problems[: suite.quick[device.type]]
    found, missing = providers.load(device, without)
    found = [provider for provider in (*found, *suite.more) if provider.name not in suite.without]
    kept = None if fresh else _kept(suite, device)
    rows, rooflines = (kept["rows"], kept["ceilings"]) if kept else ([], {})
    done = {_cell(row) for row in rows if row["rounds"] >= repeats}
    rates = {}
    for problem in problems:
        waiting = [what for what in problem.passes if (str(problem), what) not in done]
        gates = {}
        for what in waiting:
            if stop():
                raise Stopped(f"{suite.name}: no time for {problem}, {what}")
            if problem.dtype not in rates:
                rates[problem.dtype] = ceilings.measure(device, getattr(torch, problem.dtype))
                rooflines[problem.dtype] = {
                    name: float(f"{rate:.4g}") for name, rate in rates[problem.dtype]._asdict().items()
                }
            for provider in found:
                if getattr(provider, problem.operation) and provider not in gates:
                    gates[provider] = gate(problem, provider, device)
            new = suite.measure(problem, what, gates, device, rates[problem.dtype], repeats)
            rows = [row for row in rows if _cell(row) != (str(problem), what)] + new
            _write(suite, rows, device, missing, rooflines)
    if not rates:
        _write(suite, rows, device, missing, rooflines)
    return report.read(suite.name, device)


def gate(problem, provider: Provider, device: torch.device) -> Verdict:
    """Whether the provider computes what the reference does, within the error budget (docs/numerics.md)."""
    if provider.is_base:
        return Verdict("is the yardstick")
    try:
        error = problem.judge(provider, device)
        if not error <= (1.0 if provider.is_ours else SLACK):
            return Verdict(f"failed: {error:.3g} × the error budget", error)
        if provider.backend and problem.case:
            testing.check(problem.case, provider.backend, provider.strategy, device)
    except Exception as error:
        return verdict_of(error, device)
    return Verdict("passed", error)


def timed_rows(suite: Suite, problem, what: str, gates: dict, device, rates, repeats: int) -> list[dict]:
    """Time every provider whose gate is green, in turns; a row for each of the others says why not."""
    sets = [problem.tensors(device, seed) for seed in range(problem.sets or buffer_sets(problem.bytes_per_set, device))]
    gates, timers, costs = dict(gates), {}, {}
    for provider, verdict in gates.items():
        if verdict.is_green:
            try:
                steps = [problem.step(provider, tensors, what) for tensors in sets]
                timer = suite.timer(steps, device)
                timer()
                costs[provider] = trace.costs(steps[0], device)
                timers[provider] = timer
            except Exception as error:
                if provider.is_base:  # without the yardstick there is nothing to report
                    raise
                gates[provider] = verdict_of(error, device)
    samples = take_turns(timers, repeats)
    [base] = (samples[provider] for provider in samples if provider.is_base)
    rows = []
    for provider, verdict in gates.items():
        row = row_head(problem, what, provider, verdict, repeats)
        if provider in samples:
            row |= {"buffer_sets": len(sets), **_figures(problem, what, provider, samples[provider], base, rates)}
            row |= {"launches": costs[provider].launches, "peak_mib": round(costs[provider].peak / 2**20, 3)}
        rows.append(row)
    return rows


def row_head(problem, what: str, provider: Provider, verdict: Verdict, rounds: int) -> dict:
    """What every row has: who, what, and how its gate went."""
    return {
        "case": asdict(problem), "problem": str(problem), "pass": what, "provider": provider.name, "rounds": rounds,
        "gate": verdict.words, "error_of_budget": verdict.error and round(verdict.error, 3),
    }  # fmt: skip


def _figures(problem, what, provider, samples, base, rates):
    moved, flops = problem.cost(what, provider.is_base)
    bound, median = roofline_seconds(problem, what, provider.is_base, rates), statistics.median(samples)
    return {
        "ratio_to_base": round(statistics.median(t / b for t, b in zip(samples, base, strict=True)), 4),
        "roofline_us": round(bound * 1e6, 3),
        "of_roofline": round(bound / median, 4),
        "tflop_s": round(flops / median / 1e12, 4),
        "gb_s": round(moved / median / 1e9, 3),
        **summary(samples),
    }


def verdict_of(error: Exception, device: torch.device) -> Verdict:
    """Why a provider has no figure. Raises SystemExit where it took the device with it."""
    if device.type == "cuda":
        try:
            torch.cuda.synchronize(device)
        except RuntimeError as broken:
            raise SystemExit(f"the device is lost ({providers.reason(broken)}); every finished cell is kept") from error
    kind = {NotImplementedError: "cannot run", AssertionError: "failed"}.get(type(error), "raised")
    return Verdict(f"{kind}: {providers.reason(error)}")


def _kept(suite, device):
    """The record of the result file, if it is of this code, this device and these versions."""
    record = report.read(suite.name, device)
    here = json.loads(json.dumps(report.origin() | report.describe(device)))
    here.pop("clocks", None)
    if record is None or here["uncommitted_changes"] or here != {name: record.get(name) for name in here}:
        return None
    return record


def _write(suite, rows, device, missing, rooflines):
    method = f"{suite.method or METHOD[device.type]}; {TURNS}"
    report.write(suite.name, method, rows, device, not_run=missing, ceilings=rooflines)


def _cell(row):
    return row["problem"], row["pass"]
