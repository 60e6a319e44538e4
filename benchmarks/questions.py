"""The stages of `make gpu-report`: what a first run on a GPU has to settle, each a function that writes as it goes.

A stage takes a `Room`. It can run again: what its file has already is not done twice. In a dry run every step runs once,
at toy size in Triton's interpreter, and no figure is kept.
"""

import dataclasses
import functools
import importlib.util
import json
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F

from benchmarks import ceilings, providers, report, runner, timing, tunable, tune
from benchmarks.problems import Batched, Linear
from benchmarks.suites import decode, host, layer, merge, prefill, train
from lora_kernels import configs, lora_linear
from lora_kernels.backends import launcher
from lora_kernels.backends import triton as backend
from lora_kernels.backends.operands import cdiv
from lora_kernels.configs import tuned
from lora_kernels.configs.tuned import Key

REPEATS = 25
CALLS = 100  # in a row, where it is the host that is timed
UNFINISHED = 3  # exit status of a stage that has more to do
LARGE = ((8192, 4096, 4096), (8192, 14336, 4096))
ROWS = (1, 16, 64, 256)
BF16 = "bfloat16"


class OutOfTime(Exception):
    """The stage's share of the budget is spent; what it wrote is kept."""


class Room:
    """Where a stage works: its file, its time, its device."""

    def __init__(self, name: str, out: Path, until: float, dry: bool):
        self.path, self.out, self.until, self.dry = out / f"{name}.json", out, until, dry
        self.device = torch.device("cpu") if dry else report.local_device()
        self.goal = backend.target(self.device)
        self.record = json.loads(self.path.read_text()) if self.path.exists() else {"rows": []}

    @property
    def left(self) -> float:
        return self.until - time.monotonic()

    def check(self) -> None:
        if self.left <= 0:
            raise OutOfTime

    def save(self, **more) -> None:
        self.record |= more
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text(json.dumps(self.record, indent=1, default=str))
        os.replace(temporary, self.path)

    def has(self, case: str) -> bool:
        return any(row["case"] == case for row in self.record["rows"])

    def size(self, m: int, n: int, k: int) -> tuple[int, int, int]:
        return (min(m, 32), 32, 32) if self.dry else (m, n, k)

    def race(
        self, case: str, racers: dict[str, Callable], operands: list, of: str, moved=0, flops=0, timer=None
    ) -> None:  # fmt: skip
        """Time what each racer does with the operands, in turns, and write a row for each; `of` is what ratios are to."""
        self.check()
        if any(row["case"] == case for row in self.record["rows"]):
            return
        timer = timer or (lambda steps: timing.device_timer(steps, self.device))
        timers, rows = {}, []
        for name, racer in racers.items():
            steps = [functools.partial(racer, operand) for operand in operands]
            try:
                if self.dry:
                    steps[0]()
                    rows.append({"case": case, "what": name, "note": "ran; not timed"})
                else:
                    timers[name] = timer(steps)
            except Exception as error:  # a compiler's, a launch's: one racer less, and said
                rows.append({"case": case, "what": name, "note": providers.reason(error)})
                runner.verdict_of(error, self.device)  # ends the stage if the device is lost
        samples = timing.take_turns(timers, REPEATS) if timers else {}
        for name, times in samples.items():
            seconds = statistics.median(times)
            row = {"case": case, "what": name, **timing.summary(times)}
            row |= {"ratio": round(seconds / statistics.median(samples[of]), 4)} if of in samples else {}
            row |= {"gb_s": round(moved / seconds / 1e9, 1)} if moved else {}
            row |= {"tflop_s": round(flops / seconds / 1e12, 1)} if flops else {}
            rows.append(row)
        self.record["rows"] += rows
        self.save()


def environment(room: Room) -> None:
    """The machine, the versions, and which rivals are there."""
    found, missing = providers.load(room.device)
    try:
        smi = subprocess.run(
            ["nvidia-smi", "-q", "-d", "CLOCK,POWER,TEMPERATURE,MEMORY"], capture_output=True, text=True
        )
        smi = smi.stdout
    except FileNotFoundError:
        smi = "no nvidia-smi"
    room.save(**report.describe(room.device), **report.origin(), python_path=sys.executable, nvidia_smi=smi,
              providers=[provider.name for provider in found], not_there=missing)  # fmt: skip


def gpu_tests(room: Room) -> None:
    """The tests that only a GPU can run."""
    _run_tests(room, ("test_reference.py",) if room.dry else ("test_gpu.py", "test_gpu_serving.py"), "not compile")


def suite(room: Room) -> None:
    """Every other test, on the device."""
    first = ("test_kernels.py", "test_batched.py", "test_autograd.py", "test_functional.py", "test_properties.py")
    files = [path.name for path in sorted((report.ROOT / "tests").glob("test_*.py"))]
    files = [*first, *(name for name in files if name not in first and "gpu" not in name)]
    _run_tests(room, ("test_roofline.py", "test_reference.py")[1:] if room.dry else files, "not compile and not gpu")


def _run_tests(room, files, marker):
    """A file at a time, a row for each; one that hangs is tried twice and no more."""
    rows = {row["case"]: row for row in room.record["rows"]}
    environ = {**os.environ, "PYTHONPATH": str(report.ROOT), "LORA_KERNELS_TEST_DEVICE": room.device.type}
    for name in files:
        if name in rows and (rows[name]["status"] is not None or rows[name]["tries"] == 2):
            continue
        room.check()
        command = [sys.executable, "-m", "pytest", "-q", "-x" if room.dry else "--maxfail=20", "-p", "no:cacheprovider",
                   "-m", marker, f"tests/{name}"]  # fmt: skip
        row = rows[name] = {"case": name, "tries": rows.get(name, {}).get("tries", 0) + 1, "status": None}
        start = time.monotonic()
        try:
            run = subprocess.run(
                command, capture_output=True, text=True, env=environ, cwd=report.ROOT, timeout=room.left
            )
            counts = re.findall(r"(\d+) (passed|failed|skipped|errors?|deselected)", run.stdout.rpartition("\n=")[2])
            counts = counts or re.findall(r"(\d+) (passed|failed|skipped|errors?|deselected)", run.stdout[-300:])
            row |= {"status": run.returncode, **{kind: int(count) for count, kind in counts}}
            if run.returncode not in (0, 5):  # 5: no test of the file is for this run
                row["note"] = run.stdout[-6000:] + run.stderr[-2000:]
        except subprocess.TimeoutExpired:
            row["note"] = f"killed after {time.monotonic() - start:.0f} s"
        room.record["rows"] = list(rows.values())
        room.save()
        if row["status"] is None:
            raise OutOfTime


def rates(room: Room) -> None:
    """Copy bandwidth, and what cuBLAS reaches on random data; the roofline stands on both."""
    for dtype in (torch.float32,) if room.dry else (torch.bfloat16, torch.float16):
        measured = ceilings.measure(room.device, dtype, *((64, 2**12) if room.dry else ()))
        name = str(dtype).removeprefix("torch.")
        figures = {} if room.dry else {"tflop_s": measured.flops / 1e12, "gb_s": measured.bandwidth / 1e9}
        room.record["rows"].append({"case": name, "what": "cuBLAS 8192³ and a copy of 1 GiB", **figures})
        room.save()
    for p in train.HEADLINE:
        m, n, k = room.size(p.m, p.n, p.k)
        operands = [[torch.randn(shape, device=room.device).bfloat16() for shape in ((m, k), (n, k))]]
        room.race(
            f"cuBLAS {m} × {n} × {k}", {"cuBLAS": lambda t: F.linear(*t)}, operands, "cuBLAS", flops=2 * m * n * k
        )


def _key(room, kernel, m, n, k, r=16, **switches):
    m, n, k = room.size(m, n, k)
    return Key(kernel, tuned.bucket(m), r if kernel == "shrink" else n, k, r, BF16, **switches)


def _operands(room, key):
    sets = 1 if room.dry else timing.buffer_sets(tunable.bytes_of(key), room.device)
    return [tunable.tensors(key, room.device, seed) for seed in range(sets)]


def _pinned(key, value):
    return lambda t: tunable.step(key, value, t)()


def _tiles(room, key):
    """The rows of the tile table by name."""
    return {tune._short(config): config for config in tunable.candidates(key, room.goal)}


def gemm(room: Room) -> None:
    """What fraction of cuBLAS the extended GEMM reaches, tile by tile: below 1 - 184 / K `chained` is better."""
    for m, n, k in LARGE:
        for kn in (False, True):
            key = _key(room, "extended", m, n, k, kn=kn)
            racers = {"cuBLAS": lambda t: torch.mm(t.x, t.w)}
            racers |= {name: _pinned(key, config) for name, config in _tiles(room, key).items()}
            case, flops = f"{'dx' if kn else 'y'} {key.m} × {key.n} × {key.k}", 2 * key.m * key.n * key.k
            room.race(case, racers, _operands(room, key), "cuBLAS", flops=flops)


def serialised(room: Room) -> None:
    """What it costs when ptxas serialises wgmma (C7515): the same GEMM with a K loop that may run zero times."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    spec = importlib.util.spec_from_file_location("planted", report.ROOT / "tests" / "planted.py")
    planted = sys.modules["planted"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(planted)
    m, n, k = room.size(*LARGE[0])
    (bm, bn, bk), options = ((16, 16, 16), {}) if room.dry else ((128, 128, 64), dict(num_warps=8, num_stages=3))
    x, w, y = (torch.randn(shape, device=room.device).bfloat16() for shape in ((m, k), (n, k), (m, n)))
    args = [TensorDescriptor.from_tensor(t, block) for t, block in ((x, [bm, bk]), (w, [bn, bk]), (y, [bm, bn]))]
    constants = dict(BLOCK_M=bm, BLOCK_N=bn, BLOCK_K=bk, **options)

    def racer(kernel):
        return lambda args: kernel[cdiv(m, bm), cdiv(n, bn)](*args, k, **constants)

    racers = {"in flight": racer(planted.descriptor_gemm), "serialised": racer(planted.zero_trip_loop)}
    room.race(f"{m} × {n} × {k}, {bm} × {bn} × {bk}", racers, [args], "in flight", flops=2 * m * n * k)


def shrink(room: Room) -> None:
    """The shrink's bandwidth by the number of parts of K."""
    for r in (16, 64):
        key = _key(room, "shrink", 8192, 4096, 4096, r)
        operands, moved = _operands(room, key), 2 * (key.m * key.k + r * key.k + key.m * r)
        for tile, config in _tiles(room, key).items():
            racers = {f"{parts} parts": _split(room, key, config, parts) for parts in (1, 2, 4, 8)}
            room.race(f"{key.m} × {key.k}, r {r}, {tile}", racers, operands, "1 parts", moved=moved)


def _split(room, key, config, parts):
    """The shrink splits K by how many programs the SMs leave room for."""
    goal = room.goal._replace(num_sms=parts * cdiv(key.m, config.block_m))

    def racer(t):
        with mock.patch.object(backend, "target", lambda device: goal):
            tunable.step(key, config, t)()

    return racer


def forward(room: Room) -> None:
    """one_launch against extended against chained: the forward pass, end to end, and the base layer alone."""
    for p in (*train.HEADLINE, Linear(8192, 4096, 4096, 64)):
        m, n, k = room.size(p.m, p.n, p.k)
        racers = {"base only": lambda t: F.linear(t.x, t.weight), "two kernels with PDL": _not_built}
        racers |= {strategy: functools.partial(_forward, strategy) for strategy in backend.STRATEGIES}
        operands = _operands(room, Key(tunable.TRAINING, m, n, k, p.r, BF16))
        room.race(f"{m} × {n} × {k}, r {p.r}", racers, operands, "base only", flops=2 * m * n * k)


@torch.no_grad()
def _forward(strategy, t):
    return backend.forward(t.x, t.weight, None, t.a, t.b, 2.0, 0.0, None, strategy)


def _not_built(_):
    raise NotImplementedError("not built")


def decoding(room: Room) -> None:
    """The decode kernels by rows, every row with its own adapter: strategies, and widths of the one launch's tile."""
    for rows in ROWS:
        m, n, k = room.size(rows, 4096, 4096)
        key = Key(tunable.SERVING, m, n, k, 16, BF16)
        one, racers = key._replace(op="batched_one_launch"), {"base only": lambda t: F.linear(t.x, t.weight)}
        racers |= {strategy: _pinned(key, strategy) for strategy in configs.STRATEGIES[tunable.SERVING]}
        usual = tunable.heuristic(one, room.goal)
        near = () if room.dry else tunable.neighbours(one, usual, room.goal, 2)
        for width in (32, 64, 128):
            for config in [c for c in near if c.block_n == width][:2]:
                racers[f"one_launch, {tune._short(config)}"] = _pinned(one, config)
        moved = 2 * (n * k + m * (n + k) + 16 * m * (n + k))
        room.race(f"{m} rows, {n} × {k}, r 16", racers, _operands(room, key), "base only", moved=moved)


def dy_passes(room: Room) -> None:
    """One pass over dy for g and dB, against two."""
    for r in (16, 32, 64):
        key = _key(room, "dy_pass", 8192, 4096, 4096, r)
        racers = {"apart": lambda t: (backend._shrink(t.x, t.a, 2.0), backend._wgrad(t.x, t.h, torch.empty_like(t.a)))}
        if r <= backend.DY_PASS_MAX_RANK:
            racers["fused"] = lambda t: backend._dy_pass(t.x, t.a, t.h, 2.0, t.x.dtype)
        room.race(f"{key.m} × {key.n}, r {r}", racers, _operands(room, key), "apart", moved=2 * key.m * key.n)


def launches(room: Room) -> None:
    """What a launch costs the host: ours, Triton's own, and whole calls."""
    m, n, k, r = 16, 64, 64, 16
    t = tunable.tensors(Key("shrink", m, r, k, r, BF16), room.device)
    recorded = []
    with mock.patch.object(backend, "launch", lambda *launch: recorded.append(launch)):
        backend._shrink(t.x, t.a, 2.0)
    kernel, grid, args, constants, config = recorded[0]
    options = {} if room.dry else config.options
    x, weight, a, b = (torch.randn(s, device=room.device).bfloat16() for s in ((m, k), (n, k), (r, k), (n, r)))
    racers = {
        "F.linear": lambda _: F.linear(x, weight),
        "a kernel, our launcher": lambda _: launcher.launch(kernel, grid, args, constants, config),
        "a kernel, Triton's own": lambda _: kernel[grid](*args, **constants, **options),
        "the shrink, with its operands": lambda _: backend._shrink(t.x, t.a, 2.0),
        "lora_linear": torch.no_grad()(lambda _: lora_linear(x, weight, a, b, 2.0, backend="triton")),
    }
    wait = torch.cuda.synchronize if room.device.type == "cuda" else lambda: None
    room.race("on the host", racers, [None] * CALLS, "F.linear", timer=lambda steps: timing.wall_timer(steps, wait))
    room.race("in a graph", racers, [None] * CALLS, "F.linear")


def tuning(room: Room) -> None:
    """The headline shapes by `python -m lora_kernels tune`."""
    table = room.out / f"{tuned.path_for(room.goal.name or 'dry-run').stem}.tuned"
    arguments = ["--minutes", str(room.left / 60), "--table", str(table), "--journal", str(room.out / "tune.jsonl")]
    tune.main(arguments + (["--dry-run"] if room.dry else []))
    left = [key for key in tune.keys_of(tune.default_problems(room.dry)) if key not in _journal(room).found]
    found = json.loads(table.read_text())["entries"]
    room.save(rows=[_won(entry) for entry in found], left=len(left), looked_at=len(_journal(room).found))
    if left:
        raise OutOfTime


def _journal(room):
    return tune.Journal(room.out / "tune.jsonl", room.goal, {})


def _won(entry):
    best, usual = entry["figures"], entry["heuristic"]["figures"]
    value = entry.get("strategy") or tune._short(configs.Config(**entry["config"]))
    return {"case": tune._named(tune.entry_key(entry)), "what": value, "median_us": best["median_us"],
            "ratio": round(best["median_us"] / usual["median_us"], 4)}  # fmt: skip


def quick_benchmarks(room: Room) -> None:
    """The quick form of the suites, against every rival that is installed, with what was tuned just now."""
    report.RESULTS = room.out / "results"
    name = room.goal.name
    tables = list(room.out.glob("*.tuned"))
    if tables and name:
        tuned.DIRECTORY = room.out / "table"
        tuned.DIRECTORY.mkdir(exist_ok=True)
        tuned.path_for(name).write_text(tables[0].read_text())
    suites = [module.SUITE for module in (train, decode, host, prefill, layer, merge)]
    if room.dry:
        toys = {"train": Linear(32, 64, 64, 8, "float32"), "decode": Batched(4, 64, 64, 2, (8,), "float32")}
        suites = [runner.Suite(name, name, {"cpu": (toy,)}, {"cpu": 1}) for name, toy in toys.items()]
    rivals = ("compiled", "unsloth", "axolotl", "vllm", "sglang", "nemo") if room.dry else ()
    for one in suites:
        failed = []
        try:
            runner.run(one, room.device, without=rivals, stop=lambda: room.left <= 0)
        except runner.Stopped:
            pass  # what was measured is in the result file
        except Exception as error:  # costs this suite alone
            failed = [{"suite": one.name, "case": "the suite", "what": "", "note": f"raised {providers.reason(error)}"}]
        record = report.read(one.name, room.device) or {"rows": []}
        rows = [row for row in room.record["rows"] if row["suite"] != one.name]
        room.save(rows=[*rows, *(_outcome(one.name, row, room.dry) for row in record["rows"]), *failed])
        room.check()


def _outcome(suite_name, row, dry):
    kept = {"suite": suite_name, "case": f"{row['problem']}, {row['pass']}", "what": row["provider"]}
    if "median_us" not in row:
        return kept | {"note": row["gate"]}
    if dry:
        return kept | {"note": "ran; figures not kept"}
    return kept | {name: row[name] for name in ("median_us", "quartiles_us", "tflop_s", "gb_s") if name in row} | {
        "ratio": row.get("ratio_to_base")
    }  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Stage:
    """A stage, at most `seconds` of the budget at first; an unfinished one gets what is left in the end."""

    name: str
    run: Callable[[Room], None]
    seconds: float
    interprets: bool = True  # in a dry run

    @property
    def title(self) -> str:
        return self.run.__doc__.splitlines()[0].rstrip(".")


STAGES = (
    Stage("environment", environment, 60, interprets=False),
    Stage("gpu_tests", gpu_tests, 180, interprets=False),
    Stage("suite", suite, 60, interprets=False),
    Stage("ceilings", rates, 45),
    Stage("gemm", gemm, 90),
    Stage("serialised", serialised, 45),
    Stage("shrink", shrink, 60),
    Stage("forward", forward, 90),
    Stage("decode", decoding, 120),
    Stage("dy_pass", dy_passes, 60),
    Stage("launch", launches, 45),
    Stage("tune", tuning, 345),
    Stage("bench", quick_benchmarks, 300, interprets=False),
)
