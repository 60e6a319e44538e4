"""The adapter pool in the long run: any order of calls, any thread, streams, and CUDA graphs."""

import contextlib
import itertools
import random
import sys
import threading

import pytest
import torch
from test_pool import EAGER, LAYERS, MAX_RANK, assert_slot_holds, make_adapter, make_pool, pool_of

from lora_kernels import BatchPlan, lora_linear_batched
from lora_kernels.adapters import pool as pool_module
from lora_kernels.adapters.pool import AdapterPool, PoolFullError, PoolStatistics


class _Stream:
    """Stands for a CUDA stream, and writes down what is asked of it."""

    def __init__(self, name, log):
        self.name, self.log, self.events = name, log, itertools.count(1)

    def wait_event(self, event):
        self.log.append(f"{self.name} waits for {event.name}")

    def record_event(self):
        event = _Event()
        event.record(self)
        return event


class _Event:
    done = False

    def record(self, stream):
        self.name = f"{stream.name}{next(stream.events)}"

    def query(self):
        return self.done


def test_streams_wait_for_each_other(monkeypatch):
    """The order of waits, with streams that only note them: whether a GPU keeps it is for the GPU tests."""
    pool, log = pool_of(3, slots=1, device="cpu"), []
    current, other = _Stream("compute", log), _Stream("other", log)
    pool._copies = _Stream("copy", log)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: current)
    monkeypatch.setattr(torch.cuda, "Event", _Event)

    pool.acquire("a")
    assert log == ["compute waits for copy1"]
    current, compute = other, current
    pool.acquire("a")
    assert log[1:] == ["other waits for copy1"] and pool.statistics.waits == 2
    pool._adapters["a"].copied.done = True
    pool.acquire("a")
    assert log[2:] == [] and pool.statistics.waits == 2  # no wait for what is there
    pool.release("a")
    current = compute
    pool.release("a"), pool.release("a")
    assert pool.prefetch("b")
    assert log[2:] == ["copy waits for other1", "copy waits for compute2"]  # the last use on each stream
    pool.acquire("b")
    assert log[4:] == ["compute waits for copy2"] and pool.statistics.waits == 3
    pool.release("b")
    pool.unload("b")
    assert log[5:] == ["copy waits for compute3"]


def test_two_loads_of_one_name(monkeypatch):
    pool, pack = make_pool(), pool_module.pack

    def overtaken(*args, **kwargs):
        monkeypatch.undo()
        pool.load_tensors("a", make_adapter(1))
        return pack(*args, **kwargs)

    monkeypatch.setattr(pool_module, "pack", overtaken)
    with pytest.raises(ValueError, match="'a' is loaded already"):
        pool.load_tensors("a", make_adapter(0))
    assert_slot_holds(pool, pool.acquire("a"), make_adapter(1))


def test_threads(request):
    """20,000 operations of four threads, adapters replaced under their names among them: no wrong row, no leak."""
    names, pool = [f"tenant-{i}" for i in range(12)], make_pool(slots=5, device="cpu")
    seeds, versions = {name: i for i, name in enumerate(names)}, itertools.count(len(names))
    weight = {layer: torch.randint(-3, 4, (n, k)).float() for layer, (k, n) in LAYERS.items()}
    acquisitions, batches, wrong, errors = [], [], [], []
    for name, seed in seeds.items():
        pool.load_tensors(name, make_adapter(seed))

    def expected(x, layer, name):
        base = x @ weight[layer].mT
        if name is None or layer not in (adapter := make_adapter(seeds[name])):
            return base
        a, b, scaling = adapter[layer]
        return base + scaling * (x @ a.mT) @ b.mT

    def batch(rng):
        with contextlib.ExitStack() as held:
            slots = {None: -1}
            for name in rng.sample(names, rng.choice((1, 2))):
                with contextlib.suppress(PoolFullError, LookupError):
                    slots[name] = held.enter_context(pool.using(name))
                    acquisitions.append(name)
            rows = rng.choices(list(slots), k=4)
            plan = BatchPlan(torch.tensor([slots[name] for name in rows], dtype=torch.int32))
            layer, x = (
                rng.choice(list(LAYERS)),
                torch.tensor([[rng.randint(-3, 3) for _ in range(8)] for _ in rows]).float(),
            )
            y = lora_linear_batched(x, weight[layer], pool.layer(layer), plan, **EAGER)
            wrong.extend(name for i, name in enumerate(rows) if not torch.equal(y[i], expected(x, layer, name)[i]))
            batches.append(rows)

    def replace(rng):
        name = rng.choice(names)
        with contextlib.suppress(RuntimeError, LookupError):
            pool.unload(name)  # whoever succeeds owns the name until it is loaded again
            seeds[name] = next(versions)
            pool.load_tensors(name, make_adapter(seeds[name]))

    def touch(rng):
        with contextlib.suppress(PoolFullError, LookupError), pool.using(name := rng.choice(names)) as slot:
            acquisitions.append(name)
            assert pool.resident[name] == slot

    def prefetch(rng):
        with contextlib.suppress(LookupError):
            pool.prefetch(rng.choice(names))

    def work(seed):
        rng = random.Random(seed)
        try:
            for operation in rng.choices((batch, replace, touch, prefetch), (2, 2, 10, 6), k=5000):
                operation(rng)
        except BaseException as error:
            errors.append(error)

    interval = sys.getswitchinterval()
    request.addfinalizer(lambda: sys.setswitchinterval(interval))
    sys.setswitchinterval(1e-4)
    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors and not wrong
    assert len(batches) > 1000
    counted = pool.statistics
    assert counted.hits + counted.misses == len(acquisitions) and counted.evictions > 100
    for name, slot in pool.resident.items():
        assert_slot_holds(pool, slot, make_adapter(seeds[name]))
    for name in names:
        pool.unload(name)  # raises if a reference leaked
    assert sorted(pool._free) == list(range(5)) and not pool.layer("q").ranks.any()


hypothesis = pytest.importorskip("hypothesis")
from hypothesis import strategies as st  # noqa: E402
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule  # noqa: E402

NAMES = st.sampled_from("abcde")


class AgainstADict(RuleBasedStateMachine):
    """The pool against what it should be: dicts of adapters and references, a list in order of last use."""

    def __init__(self):
        super().__init__()
        self.pool, self.slots, self.rows = make_pool(slots=3, rows=10), 3, 10
        self.adapters, self.references, self.recent, self.occupied = {}, {}, [], {}
        self.prefetched = set()
        self.counts = PoolStatistics()

    def place(self, name):
        """Whether the model finds `name` a slot."""
        if name in self.recent:
            return True
        parts = self.adapters[name].values()
        need, idle = max(a.shape[0] for a, _, _ in parts), [n for n in self.recent if not self.references[n]]
        for count in range(len(idle) + 1):
            staying = [other for other in self.recent if other not in idle[:count]]
            taken = set().union(*(self.occupied[other] for other in staying))
            places = [set(range(i, i + need)) for i in range(self.rows - need + 1)]
            place = next((place for place in places if not place & taken), None)
            if place and len(staying) < self.slots:
                break
        else:
            return False
        full = len(self.recent) == self.slots
        for other in [n for n in idle[:count] if self.occupied[n] & place] or idle[: int(full)]:
            self.recent.remove(other)
            self.prefetched.discard(other)
            self.counts.evictions += 1
        self.recent.append(name)
        self.occupied[name] = place
        self.counts.bytes_copied += sum(a.nbytes + b.nbytes for a, b, _ in parts) + 8 * len(LAYERS)
        return True

    @rule(name=NAMES, seed=st.integers(0, 99), ranks=st.tuples(*[st.integers(0, MAX_RANK + 1)] * 2))
    def load(self, name, seed, ranks):
        adapter = make_adapter(seed, ranks)
        good = name not in self.adapters and adapter and max(ranks) <= MAX_RANK
        with contextlib.nullcontext() if good else pytest.raises(ValueError):
            self.pool.load_tensors(name, adapter)
        if good:
            self.adapters[name], self.references[name] = adapter, 0

    @precondition(lambda self: self.adapters)
    @rule(data=st.data())
    def acquire(self, data):
        name = data.draw(st.sampled_from(sorted(self.adapters)))
        hit = name in self.recent
        if self.place(name):
            self.counts.hits += hit
            self.counts.misses += not hit
            self.counts.prefetch_hits += hit and name in self.prefetched
            self.prefetched.discard(name)
            self.references[name] += 1
            assert self.pool.acquire(name) == self.pool.resident[name]
        else:
            self.counts.refusals += 1
            with pytest.raises(PoolFullError):
                self.pool.acquire(name)

    @rule(name=NAMES)
    def acquire_unknown(self, name):
        if name not in self.adapters:
            with pytest.raises(LookupError):
                self.pool.acquire(name)

    @rule(name=NAMES)
    def release(self, name):
        if self.references.get(name):
            self.references[name] -= 1
            self.recent.append(self.recent.pop(self.recent.index(name)))
            self.pool.release(name)
        else:
            with pytest.raises((LookupError, RuntimeError)):
                self.pool.release(name)

    @rule(name=NAMES)
    def prefetch(self, name):
        if name not in self.adapters:
            return
        copied, placed = name not in self.recent, self.place(name)
        if copied and placed:
            self.prefetched.add(name)
        assert self.pool.prefetch(name) == placed
        if placed:
            self.recent.append(self.recent.pop(self.recent.index(name)))

    @rule(name=NAMES)
    def unload(self, name):
        if name in self.adapters and not self.references[name]:
            self.pool.unload(name)
            del self.adapters[name], self.references[name]
            self.recent = [other for other in self.recent if other != name]
            self.prefetched.discard(name)
        else:
            with pytest.raises((LookupError, RuntimeError)):
                self.pool.unload(name)

    @invariant()
    def agree(self):
        assert len(self.pool) == len(self.adapters) and all(name in self.pool for name in self.adapters)
        resident = self.pool.resident
        idle = [name for name in self.recent if not self.references[name]]
        assert list(resident)[: len(idle)] == idle and resident.keys() == set(self.recent)
        assert len(set(resident.values())) == len(resident)
        for name, slot in resident.items():
            assert_slot_holds(self.pool, slot, self.adapters[name])
        counts = vars(self.pool.statistics)
        assert counts | {"waits": 0} == vars(self.counts)


TestAgainstADict = AgainstADict.TestCase


@pytest.mark.gpu
def test_adapters_change_under_a_cuda_graph():
    """One graph, captured once; a thread brings other adapters into the free slots while it replays."""
    layers = {"proj": (1024, 1024)}
    pool = AdapterPool(layers, slots=3, max_rank=64, dtype=torch.bfloat16, device="cuda")
    ranks = (64, 1, 16, 33, 8)
    adapters = {f"tenant-{r}": (torch.randn(r, 1024) / 32, torch.randn(1024, r) / 8, 2.0) for r in ranks}
    for name, adapter in adapters.items():
        pool.load_tensors(name, {"proj": adapter})
    x, weight = (torch.randn(m, 1024, device="cuda").bfloat16() / 32 for m in (16, 1024))
    plan = BatchPlan(torch.full((16,), -1, dtype=torch.int32, device="cuda"))

    def call():
        return lora_linear_batched(x, weight, pool.layer("proj"), plan, backend="triton")

    call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = call()
    stop = threading.Event()

    def churn():
        while not stop.is_set():
            for name in adapters:
                pool.prefetch(name)

    thread = threading.Thread(target=churn)
    thread.start()
    try:
        for name in itertools.islice(itertools.cycle(adapters), 500):
            with pool.using(name) as slot:
                plan.update(torch.full((16,), slot, dtype=torch.int32, device="cuda"))
                graph.replay()
                got = y.clone()
            a, b, scaling = (t.to("cuda").bfloat16() if isinstance(t, torch.Tensor) else t for t in adapters[name])
            want = x.double() @ weight.double().mT + scaling * (x.double() @ a.double().mT) @ b.double().mT
            torch.testing.assert_close(got.double(), want, atol=0.02, rtol=0.02)
    finally:
        stop.set()
        thread.join()
    assert pool.statistics.evictions > 100
