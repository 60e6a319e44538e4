"""Serving on a GPU: CUDA graphs, streams, hot swap under load, compute-sanitizer.

On the CPU a graph is a function and a stream is none: there the tests run in the interpreter, small, which shows that they
are sound, and nothing of what a GPU does. Everything is made of small whole numbers, so that each result is exact and
compared bit for bit.
"""

import contextlib
import functools
import math
import os
import random
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
import triton
import triton.language as tl
from conftest import DEVICE, INTERPRETED

from lora_kernels import AdapterPool, BatchPlan, lora_linear_batched
from lora_kernels.adapters.pool import PoolFullError
from lora_kernels.backends import BATCHED_BACKENDS, launcher

ROOT = Path(__file__).resolve().parent.parent
ON_GPU = DEVICE == "cuda"
pytestmark = pytest.mark.skipif(not (ON_GPU or INTERPRETED), reason="needs a GPU or the interpreter")
K, N, RANKS = (512, 768, (64, 1, 16, 33, 8)) if ON_GPU else (48, 40, (4, 1, 3))
ROWS = {"decode": 16, "prefill": 600} if ON_GPU else {"decode": 5, "prefill": 20}
STEPS, REPEATS = (100, 1000) if ON_GPU else (4, 6)
TURN = contextlib.nullcontext() if ON_GPU else threading.Lock()  # the interpreter can run one kernel at a time
NAMES = [f"tenant-{i}" for i in range(7)]
STRATEGIES = BATCHED_BACKENDS["triton"].STRATEGIES
every_strategy = pytest.mark.parametrize("strategy", STRATEGIES)
every_batch = pytest.mark.parametrize(
    ("strategy", "rows"),
    [(strategy, rows) for strategy in STRATEGIES for rows in ROWS if strategy != "one_launch" or ROWS[rows] <= 256],
)


def ternary(generator, *shape, share=1.0):
    """-1, 0 and 1, and 0 alone outside of a `share` of the elements."""
    signs = torch.randint(-1, 2, shape, generator=generator)
    return (signs * (torch.rand(shape, generator=generator) < share)).float()


@functools.cache
def adapter(seed):
    generator, r = torch.Generator().manual_seed(seed), RANKS[seed % len(RANKS)]
    return ternary(generator, r, K, share=0.125), ternary(generator, N, r, share=0.5), float(1 + seed % 2)


@functools.cache
def adapter_on_device(seed):
    a, b, scaling = adapter(seed)
    return a.double().to(DEVICE), b.double().to(DEVICE), scaling  # there on return, whatever stream uses it


class Served:
    """A layer whose rows have adapters from a pool, its own or another's; what lies in no slot is NaN."""

    def __init__(self, strategy, rows=ROWS["decode"], dtype=torch.float16, like=None, seed=0):
        generator = torch.Generator().manual_seed(seed)
        self.strategy = strategy
        self.x, self.weight, self.bias = (
            t.to(DEVICE, dtype)
            for t in (ternary(generator, rows, K), ternary(generator, N, K, share=0.125), ternary(generator, N))
        )
        self.plan = BatchPlan(torch.full((rows,), -1, dtype=torch.int32, device=DEVICE))
        if like is not None:
            self.pool, self.seeds = like.pool, like.seeds
            return
        self.pool, self.seeds = AdapterPool({"proj": (K, N)}, 4, max(RANKS), dtype, DEVICE, rows=8 * max(RANKS)), {}
        for tensor in (self.pool.layer("proj").a, self.pool.layer("proj").b):
            tensor.fill_(math.nan)
        synchronize()
        for seed, name in enumerate(NAMES):
            self.load(name, seed)

    def load(self, name, seed):
        self.seeds[name] = seed
        self.pool.load_tensors(name, {"proj": adapter(seed)})

    def replace(self, name, seed):
        """Other contents and another rank under the same name; not while somebody uses it."""
        try:
            self.pool.unload(name)
        except (LookupError, RuntimeError):
            return
        self.load(name, seed)

    @contextlib.contextmanager
    def using(self, names):
        """The slots of those that can be had."""
        with contextlib.ExitStack() as held:
            slots = {}
            for name in names:
                with contextlib.suppress(LookupError, PoolFullError):
                    slots[name] = held.enter_context(self.pool.using(name))
            yield slots

    def fill(self, rng, slots):
        """Another step: x, and an adapter or none for each row, which are returned."""
        tenants = rng.choices([None, *slots], k=len(self.plan))
        self.x.copy_(ternary(torch.Generator().manual_seed(rng.randrange(2**31)), *self.x.shape))
        self.plan.update(torch.tensor([slots.get(name, -1) for name in tenants], dtype=torch.int32).to(DEVICE))
        return tenants

    def y(self):
        options = dict(bias=self.bias, backend="triton", strategy=self.strategy)
        with TURN:
            return lora_linear_batched(self.x, self.weight, self.pool.layer("proj"), self.plan, **options)

    def truth(self, tenants):
        x, weight, bias = (t.double() for t in (self.x, self.weight, self.bias))
        y = x @ weight.mT + bias
        for name in {*tenants} - {None}:
            a, b, scaling = adapter_on_device(self.seeds[name])
            rows = [i for i, tenant in enumerate(tenants) if tenant == name]
            y[rows] += scaling * (x[rows] @ a.mT) @ b.mT
        return y.to(self.x.dtype)


def synchronize():
    if ON_GPU:
        torch.cuda.synchronize()


def streams(count):
    return [torch.cuda.Stream() if ON_GPU else None for _ in range(count)]


def on(stream):
    return contextlib.nullcontext() if stream is None else torch.cuda.stream(stream)


def capture(call):
    """`(replay, y)`: a CUDA graph of `call`, and what it writes."""
    y = call()  # compiles
    if not ON_GPU:
        return lambda: y.copy_(call()), y
    synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = call()
    return graph.replay, y


@every_batch
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_graph_replays_with_other_slots_ranks_and_adapters(strategy, rows, dtype):
    served, rng = Served(strategy, ROWS[rows], dtype), random.Random(0)
    replay, y = capture(served.y)
    for step in range(STEPS):
        served.replace(rng.choice(NAMES), len(NAMES) + step)
        with served.using(rng.sample(NAMES, rng.choice((1, 2, 3)))) as slots:
            assert slots
            tenants = served.fill(rng, slots)
            y.fill_(math.nan)
            replay()
            assert torch.equal(y, served.truth(tenants)), f"step {step}"
    assert served.pool.statistics.misses > STEPS


@every_strategy
def test_hot_swap_under_load(strategy):
    """A graph replays on one stream; a thread loads, evicts, replaces and uses adapters on another. Every row is checked."""
    served = Served(strategy)
    other = Served(strategy, like=served, seed=1)
    replay, y = capture(served.y)
    wrong = [torch.zeros((), dtype=torch.int64, device=DEVICE) for _ in range(2)]
    main, side = streams(2)
    stop, faults, done = threading.Event(), [], []

    def step(layer, run, rng, wrong):
        with layer.using(rng.sample(NAMES, rng.choice((1, 2)))) as slots:
            tenants = layer.fill(rng, slots)
            y = run()
            wrong += (y != layer.truth(tenants)).any(dim=1).sum()

    def churn():
        rng = random.Random(1)
        kinds = {
            "use": lambda: step(other, other.y, rng, wrong[1]),
            "replace": lambda: served.replace(rng.choice(NAMES), rng.randrange(64)),
            "prefetch": lambda: served.pool.prefetch(rng.choice(NAMES)),
        }
        try:
            with on(side):
                while not stop.is_set():
                    kind = rng.choice([*kinds])
                    kinds[kind]()
                    done.append(kind)
        except BaseException as error:
            faults.append(error)

    def replayed():
        y.fill_(math.nan)
        replay()
        return y.clone()

    synchronize()
    thread = threading.Thread(target=churn)
    thread.start()
    rng, steps = random.Random(0), 0
    try:
        with on(main):
            while not faults and min(steps, len(done)) < 5 * STEPS:
                step(served, replayed, rng, wrong[0])
                steps += 1
    finally:
        stop.set()
        thread.join()
    synchronize()
    assert not faults and not sum(map(int, wrong))
    assert {*done} == {"use", "replace", "prefetch"} and served.pool.statistics.evictions > STEPS
    for name in NAMES:
        served.pool.unload(name)  # raises if a reference leaked
    synchronize()
    assert not served.pool.layer("proj").ranks.any()


def test_streams_have_counters_of_their_own():
    pair, lanes = [Served("one_launch", seed=seed) for seed in range(2)], streams(2)
    rng = random.Random(0)
    with pair[0].using(NAMES[:2]) as first, pair[1].using(NAMES[2:4]) as second:
        tenants = [served.fill(rng, slots) for served, slots in zip(pair, (first, second), strict=True)]
        expected = [served.truth(names) for served, names in zip(pair, tenants, strict=True)]
        synchronize()
        results = [[], []]
        for _ in range(STEPS):
            for served, lane, ys in zip(pair, lanes, results, strict=True):
                with on(lane):
                    ys.append(served.y())
        synchronize()
    assert all(torch.equal(y, want) for ys, want in zip(results, expected, strict=True) for y in ys)
    counters = []
    for lane in lanes:
        with on(lane):
            counters.append(launcher.counters(pair[0].x.device, 1))
            assert not counters[-1].any()
    assert not ON_GPU or counters[0].data_ptr() != counters[1].data_ptr()


@every_strategy
def test_two_graphs_replay_at_once(strategy):
    """The one captured last goes first: what the other's capture left to be done at its replay has not been done."""
    pair, lanes, rng = [Served(strategy, seed=seed) for seed in range(2)], streams(2), random.Random(0)
    graphs = [capture(served.y) for served in pair]
    with pair[0].using(NAMES[:2]) as first, pair[1].using(NAMES[2:4]) as second:
        tenants = [served.fill(rng, slots) for served, slots in zip(pair, (first, second), strict=True)]
        synchronize()
        for _ in range(STEPS):
            for (replay, y), lane in zip(reversed(graphs), lanes, strict=True):
                with on(lane):
                    y.fill_(math.nan)
                    replay()
            synchronize()
            for served, names, (_, y) in zip(pair, tenants, graphs, strict=True):
                assert torch.equal(y, served.truth(names))


def check_repeats(served):
    """The same bits a thousand times, and the counters back at zero."""
    with served.using(NAMES[:3]) as slots:
        tenants = served.fill(random.Random(0), slots)
        served.x.mul_(torch.rand(served.x.shape, device=DEVICE).to(served.x.dtype))  # sums depend on their order
        first = served.y()
        different = torch.zeros((), dtype=torch.bool, device=DEVICE)
        for _ in range(REPEATS):
            different |= (served.y() != first).any()
    assert not different and not launcher.counters(served.x.device, 1).any()
    torch.testing.assert_close(first, served.truth(tenants), atol=0.05, rtol=0.01)


def test_one_launch_gives_the_same_bits_a_thousand_times():
    check_repeats(Served("one_launch"))


@pytest.mark.gpu
def test_copies_leave_no_device_memory_behind():
    pool = Served("extended").pool
    before = torch.cuda.memory_allocated()
    for name in NAMES * 20:
        with pool.using(name):
            pass
    synchronize()
    assert torch.cuda.memory_allocated() == before and pool.statistics.evictions > 100


def run_small_batches():
    """What compute-sanitizer watches; it slows a kernel down a hundredfold."""
    for strategy in STRATEGIES:
        served, rng = Served(strategy, rows=19), random.Random(0)
        with served.using(NAMES[:3]) as slots:
            tenants = served.fill(rng, slots)
            for _ in range(2):
                assert torch.equal(served.y(), served.truth(tenants)), strategy


def test_what_the_sanitizer_watches_is_right():
    run_small_batches()


@triton.jit
def store_past_the_end(y):
    tl.store(y + 4096 + tl.arange(0, 32), 1.0)


def overrun():
    store_past_the_end[(1,)](torch.zeros(256, device=DEVICE))
    synchronize()


def find_sanitizer():
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    folders = [Path(home, part) for home in homes if home for part in ("bin", "compute-sanitizer")]
    return shutil.which("compute-sanitizer", path=os.pathsep.join([os.environ.get("PATH", ""), *map(str, folders)]))


def sanitized(tool, action, file=__file__):
    """A run of a file under compute-sanitizer; each tensor is an allocation of its own, whose end memcheck knows."""
    program = find_sanitizer()
    if program is None:
        pytest.skip("compute-sanitizer is not installed (looked in PATH, and in CUDA_HOME and CUDA's usual place)")
    command = [program, "--tool", tool, "--error-exitcode", "3", sys.executable, file, action]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    run = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=900)
    return run.returncode, run.stdout + run.stderr


@pytest.mark.gpu
@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "synccheck"])
def test_compute_sanitizer_finds_nothing(tool):
    status, output = sanitized(tool, "run_small_batches")
    assert status == 0 and "SUMMARY: 0 " in output, output[-4000:]


@pytest.mark.gpu
def test_compute_sanitizer_finds_an_overrun():
    status, output = sanitized("memcheck", "overrun")
    assert status != 0 and "Invalid __global__ write" in output, output[-4000:]


if __name__ == "__main__":
    {"run_small_batches": run_small_batches, "overrun": overrun}[sys.argv[1]]()
