"""`python -m lora_kernels tune`: search, offline, for the configs and strategies that are fastest on this GPU.

For every choice (benchmarks/tunable.py) the search walks from the tile table's rows to their neighbours. What a rule or the
compiler refuses is never launched, what fails its correctness gate is never timed. The rest race: they take turns, and the
slower half drops out after every lap. A choice other than the heuristics' is written only where it wins by more than the
noise. docs/tuning.md, "Tuning", says how to run it and what the table holds.
"""

import argparse
import collections
import dataclasses
import hashlib
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
import triton

from benchmarks import compare, report, timing, tunable
from lora_kernels import configs, testing
from lora_kernels.backends import launcher
from lora_kernels.backends import triton as backend
from lora_kernels.configs import Config, tuned
from lora_kernels.configs.tuned import Key

LAPS = (3, 3, 6)  # samples of everybody still in a race, lap by lap
FINAL = 25  # samples of the finalists
FINALISTS = 4
HOPELESS = 1.3  # times the best median: out after the first lap
TRIES = 2  # of a key that ends the process
STEPS = (1, 2)  # from the best config: first its neighbours, and where none is better, theirs
HEAT = 12  # racers at a time, each with tensors in a graph of its own
OUT = Path("out", "tune")

# (m, n, k, r), the most wanted first; batches come in between, (m, n, k, r, "batched").
HEADLINE = (
    (8192, 4096, 4096, 16), (64, 4096, 4096, 16, "batched"), (8192, 14336, 4096, 16), (8192, 4096, 14336, 16),
    (16, 4096, 4096, 16, "batched"), (8192, 4096, 4096, 64), (8192, 1024, 4096, 16), (256, 4096, 4096, 16, "batched"),
    (64, 14336, 4096, 16, "batched"), (8192, 8192, 8192, 16), (2048, 4096, 4096, 16), (1, 4096, 4096, 16, "batched"),
    (2048, 4096, 4096, 16, "batched"), (8192, 4096, 4096, 16, "dropout"), (64, 4096, 14336, 16, "batched"),
)  # fmt: skip
TOY = ((512, 32, 32, 8), (8, 32, 32, 8, "batched"))


@dataclasses.dataclass
class Workshop:
    """All that the search asks of the machine. A test has its own."""

    goal: backend.Target
    legal: Callable[[Key, list], list]  # what compiles cleanly, of configs
    gate: Callable[[Key, Any, bool], str | None]  # why a choice may not be timed; the flag: in full
    timers: Callable[[Key, list], dict]  # choice -> function that returns the seconds of a step
    clock: Callable[[], float] = time.monotonic


@dataclasses.dataclass
class Found:
    """What is known of a key: the best choice with its figures, the heuristics' own, the others, and why not those."""

    key: Key
    best: Config | str
    heuristic: Config | str
    figures: dict[Any, dict]
    refused: dict[Any, str]

    @property
    def wins(self) -> bool:
        """Whether the best choice is another than the heuristics', and faster by more than the noise."""
        if self.best == self.heuristic:
            return False
        return compare.verdict(self.figures[self.heuristic], self.figures[self.best]) == compare.FASTER


class OutOfTime(Exception):
    """The budget is spent."""


def race(timers: dict[Any, Callable[[], float]], kept: Iterable, laps=LAPS) -> dict[Any, list[float]]:
    """The samples of all: they take turns, and after a lap the hopeless and the slower half leave, except for `kept`."""
    samples = {name: [] for name in timers}
    running = list(timers)
    for lap, repeats in enumerate(laps):
        for name, times in timing.take_turns({name: timers[name] for name in running}, repeats).items():
            samples[name] += times
        medians = {name: statistics.median(samples[name]) for name in running}
        ranked = sorted(running, key=medians.get)
        fast = [name for name in ranked if medians[name] <= HOPELESS * medians[ranked[0]]]
        half = fast[: max((len(ranked) + 1) // 2, 1)] if lap else fast
        running = [name for name in running if name in half or name in kept]
    return samples


def search(key: Key, shop: Workshop, until: float) -> Found:
    """Find the best choice for `key`; raises OutOfTime where that takes longer than `until`."""
    usual, *others = tunable.candidates(key, shop.goal)
    tried, refused, medians = {usual}, {}, {}
    best, front = usual, [usual, *others]
    steps = iter(STEPS)
    while front is not None:
        tried |= set(front)
        racers = _fit_to_race(key, front, shop, refused, until)
        for i in range(0, len(racers), HEAT):
            if shop.clock() > until:
                raise OutOfTime
            heat = list(dict.fromkeys([*(c for c in (usual, best) if c not in refused), *racers[i : i + HEAT]]))
            for name, times in race(shop.timers(key, heat), (usual, best)).items():
                medians[name] = statistics.median(times)
        leader = min(medians, key=medians.get, default=usual)
        if leader != best:
            best, steps = leader, iter(STEPS)
        front = None
        for distance in steps:
            if front := [near for near in tunable.neighbours(key, best, shop.goal, distance) if near not in tried]:
                break
        front = front or None
    return _final(key, usual, medians, refused, shop, until)


def _fit_to_race(key, front, shop, refused, until):
    legal = set(shop.legal(key, front)) if not isinstance(front[0], str) else set(front)
    refused |= {value: "does not compile cleanly" for value in front if value not in legal}
    fit = []
    for value in front:
        if shop.clock() > until:
            raise OutOfTime
        if value in legal:
            if reason := shop.gate(key, value, False):
                refused[value] = reason
            else:
                fit.append(value)
    return fit


def _final(key, usual, medians, refused, shop, until):
    """The fastest of all races once more, side by side and with many samples; the winner is gated in full."""
    finalists = sorted(medians, key=medians.get)[:FINALISTS]
    entrants = list(dict.fromkeys([*((usual,) if usual in medians else ()), *finalists]))
    while entrants:
        if shop.clock() > until:
            raise OutOfTime
        samples = timing.take_turns(shop.timers(key, entrants), FINAL)
        figures = {name: timing.summary(times) for name, times in samples.items()}
        best = min(figures, key=lambda name: figures[name]["median_us"])
        reason = shop.gate(key, best, True)
        if reason is None:
            return Found(key, best, usual, figures, refused)
        refused[best] = reason
        entrants.remove(best)
    return Found(key, usual, usual, {}, refused)


def tune(keys: list[Key], shop: Workshop, until: float, journal: "Journal", say=print) -> int:
    """Search for all keys not yet in the journal, in their order; returns how many are left when time is up."""
    left = [key for key in keys if key not in journal.found]
    for done, key in enumerate(left):
        if journal.fatal(key):
            say(f"{_named(key)}: left out, it has ended {TRIES} runs")
            continue
        journal.begin(key)
        try:
            with tunable.decided(journal.choices()):
                found = search(key, shop, until)
        except (OutOfTime, LookupError) as error:
            journal.end(key)
            if isinstance(error, OutOfTime):
                return len(left) - done
            say(f"{_named(key)}: no choice: {error}")
            continue
        journal.add(found)
        say(f"[{len(keys) - len(left) + done + 1}/{len(keys)}] {_line(found)}")
    return 0


class Journal:
    """What this and earlier runs found, a line of JSON a key, and the table made of it. A killed run loses one key.

    A line written with other kernels, another triton or another GPU is not read.
    """

    def __init__(self, path: Path, goal: backend.Target, origin: dict, dry_run: bool = False):
        self.path, self.goal, self.origin, self.dry_run = path, goal, origin, dry_run
        self.found: dict[Key, dict | None] = {}
        self.begun = collections.Counter()
        for line in path.read_text().splitlines() if path.exists() else ():
            try:
                record = json.loads(line)
            except ValueError:  # the line that a kill cut short
                continue
            if (record["fingerprint"], record["device"]) == (fingerprint(), goal.name):
                key = Key(**record["key"])
                self.begun[key] += record.get("begun", 0)
                if "entry" in record:
                    self.found[key] = record["entry"]

    def fatal(self, key: Key) -> bool:
        """Whether looking at `key` has ended the process before its time, more than once."""
        return self.begun[key] >= TRIES

    def begin(self, key: Key) -> None:
        self._write(key, begun=1)

    def end(self, key: Key) -> None:
        self._write(key, begun=-1)

    def add(self, found: Found) -> None:
        entry = _entry(found, self.origin) if found.wins else None
        self.found[found.key] = entry
        figures = [{**_value(value), **figures} for value, figures in found.figures.items()]
        refused = [{**_value(value), "reason": reason[:300]} for value, reason in found.refused.items()]
        self._write(found.key, begun=-1, entry=entry, figures=figures, refused=refused)

    def _write(self, key, begun, **more):
        self.begun[key] += begun
        line = {"fingerprint": fingerprint(), "device": self.goal.name, "key": key._asdict(), "begun": begun, **more}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")

    def choices(self) -> dict[Key, tuned.Choice]:
        """What was found so far, as dispatch reads it."""
        content = {entry_key(entry): entry for entry in self.found.values() if entry}
        return {
            key: tuned.Choice(entry.get("strategy") or Config(**entry["config"]), "being tuned")
            for key, entry in content.items()
        }

    def write(self, path: Path) -> int:
        """Write the table: what was found here, and of the file that is there what was not looked at; returns its size."""
        entries = {}
        if path.exists():
            old = json.loads(path.read_text())
            if (old["schema"], old["device"]) != (tuned.SCHEMA, self.goal.name):
                raise SystemExit(f"tune: {path} is of schema {old['schema']}, {old['device']!r}; move it away first")
            entries = {entry_key(entry): entry for entry in old["entries"]}
        entries |= self.found
        table = {"schema": tuned.SCHEMA, "device": self.goal.name, "capability": self.goal.capability}
        table |= {"num_sms": self.goal.num_sms, **({"dry_run": True} if self.dry_run else {})}
        lines = [json.dumps(entry) for _, entry in sorted(entries.items()) if entry]
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps(table)[:-1] + ', "entries": [\n' + ",\n".join(lines) + "\n]}\n")
        os.replace(temporary, path)
        return len(lines)


def entry_key(entry: dict) -> Key:
    return Key(**{name: entry[name] for name in Key._fields})


def _entry(found, origin):
    """What the table holds of a key: the winner, the heuristics' choice and the runners-up, with all their samples."""
    others = {value: figures for value, figures in found.figures.items() if value not in (found.best, found.heuristic)}
    ranked = sorted(others.items(), key=lambda item: item[1]["median_us"])
    return {
        **found.key._asdict(), **_value(found.best), "figures": found.figures[found.best],
        "heuristic": {**_value(found.heuristic), "figures": found.figures[found.heuristic]},
        "runners_up": [{**_value(value), "figures": figures} for value, figures in ranked],
        **{name: origin[name] for name in ("commit", "uncommitted_changes", "versions")},
    }  # fmt: skip


def _value(value):
    return {"strategy": value} if isinstance(value, str) else {"config": dataclasses.asdict(value)}


def _named(key):
    switches = "".join(f", {name}" for name in ("dropout", "kn") if getattr(key, name))
    return f"{key.op} {key.m} × {key.n} × {key.k}, r {key.r}, {key.dtype}{switches}"


def _line(found):
    if not found.figures:
        return f"{_named(found.key)}: nothing passed its gate: {next(iter(found.refused.values()), '')[:200]}"
    usual, best = (found.figures.get(value, {}).get("median_us") for value in (found.heuristic, found.best))
    if found.wins:
        return f"{_named(found.key)}: {_short(found.best)} {best:.1f} µs, heuristics {usual:.1f} µs"
    return f"{_named(found.key)}: the heuristics stay, {_short(found.heuristic)}"


def _short(value):
    if isinstance(value, str):
        return value
    changed = {f.name: getattr(value, f.name) for f in dataclasses.fields(value) if getattr(value, f.name) != f.default}
    return " ".join(f"{name}={setting}" for name, setting in changed.items())


def fingerprint() -> str:
    """Of all that a figure depends on, beside the machine."""
    package = Path(configs.__file__).parent.parent
    files = sorted((*package.glob("kernels/*.py"), *package.glob("backends/triton*.py"), *package.glob("configs/*.py")))
    digest = hashlib.sha256(triton.__version__.encode())
    for file in files:
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def _gpu_workshop(device, goal, pool):
    def legal(key, front):
        asked = [pool.submit(tunable.reasons_illegal, key, value, goal.capability, goal.num_sms) for value in front]
        return [value for value, future in zip(front, asked, strict=True) if not future.result()]

    def timers(key, values):
        launcher._arena_of.clear()  # no graph of the last heat is alive, and a full arena would add a node to each
        sets = timing.buffer_sets(tunable.bytes_of(key), device)
        operands = [tunable.tensors(key, device, seed) for seed in range(sets)]
        return {v: timing.device_timer([tunable.step(key, v, t) for t in operands], device) for v in values}

    return Workshop(goal, legal, lambda key, value, full: tunable.gate(key, value, device, full), timers)


def _dry_workshop(device, goal):
    """The interpreter's: the heuristics' choice of every step runs, and none is timed, so that nothing can win."""

    def timers(key, values):
        operands = tunable.tensors(key, device)
        for value in values:
            tunable.step(key, value, operands)()
        return {value: lambda: 1.0 for value in values}

    def legal(key, front):
        return front[:1] if front[0] == tunable.heuristic(key, goal) else []

    return Workshop(goal, legal, lambda key, value, full: None if full else tunable.gate(key, value, device), timers)


def keys_of(problems: Iterable[tuple], dtype: str = "bfloat16") -> list[Key]:
    """The keys of (m, n, k, r) or (m, n, k, r, "batched" or "dropout"), each once."""
    keys = {}
    for m, n, k, r, *kind in problems:
        adapters, dropout = "batched" in kind, "dropout" in kind
        keys |= dict.fromkeys(tunable.keys_for(tuned.bucket(m), n, k, r, dtype, dropout, adapters))
    return list(keys)


def default_problems(dry_run: bool) -> tuple:
    return TOY if dry_run else HEADLINE


def problem(text: str) -> tuple:
    """`8192,4096,4096,16` or `64,4096,4096,16,batched`: m, n, k, r, and what kind of layer if not the usual."""
    m, n, k, r, *kind = text.split(",")
    sizes = tuple(map(int, (m, n, k, r)))
    if set(kind) - {"batched", "dropout"} or min(sizes) < 1 or len(kind) > 1:
        raise ValueError
    if any(size % 8 for size in sizes[1:]):
        raise argparse.ArgumentTypeError(f"{text}: n, k and r must be multiples of 8: other rows are not tuned")
    return *sizes, *kind


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m lora_kernels tune", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--minutes", type=float, default=25, help="stop after so many; another run goes on (default: 25)"
    )
    parser.add_argument("--problem", type=problem, nargs="+", metavar="M,N,K,R[,batched|,dropout]",
                        help="layers to tune (default: the headline shapes)")  # fmt: skip
    parser.add_argument("--dtype", choices=tuned.ITEMSIZES, default="bfloat16")
    parser.add_argument("--table", type=Path, help="where to write (default: where the package reads it)")
    parser.add_argument("--journal", type=Path, help="what a later run goes on from (default: under out/tune/)")
    parser.add_argument("--list", action="store_true", help="print the choices to make, and make none")
    parser.add_argument("--dry-run", action="store_true", help="toy sizes in the interpreter; nothing is timed")
    arguments = parser.parse_args(argv)
    keys = keys_of(arguments.problem or default_problems(arguments.dry_run), arguments.dtype)
    if arguments.list:
        print(*map(_named, keys), sep="\n")
        return 0
    if arguments.dry_run:
        if os.environ.get("TRITON_INTERPRET") != "1":  # triton reads it when it is imported, which it is by now
            command = [sys.executable, "-m", "benchmarks.tune", *(sys.argv[1:] if argv is None else argv)]
            return subprocess.call(command, env={**os.environ, "TRITON_INTERPRET": "1"})
        testing.mend_interpreter()
        device = torch.device("cpu")
    else:
        report.refuse_interpreter()
        device = report.local_device()
        if device.type != "cuda":
            print("tune: torch sees no GPU here (--dry-run passes through the search on a CPU)")
            return 1
    goal = backend.target(device)
    name = goal.name or "dry-run"
    stem = tuned.path_for(name).stem
    journal = Journal(arguments.journal or OUT / f"{stem}.jsonl", goal, report.origin(), arguments.dry_run)
    table = arguments.table or (OUT / "dry-run.json" if arguments.dry_run else tuned.path_for(name))
    until = time.monotonic() + 60 * arguments.minutes
    with ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("spawn")) as pool:
        shop = _dry_workshop(device, goal) if arguments.dry_run else _gpu_workshop(device, goal, pool)
        left = tune(keys, shop, until, journal)
        pool.shutdown(cancel_futures=True)
    size = journal.write(table)
    print(f"{len(journal.found)} choices looked at, {left} left; {table}: {size} that differ from the heuristics'")
    if left:
        print("run it again to go on")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
