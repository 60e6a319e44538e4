"""The adapter pool in the long run: any order of calls, and streams."""

import contextlib
import itertools

import pytest
import torch
from test_pool import LAYERS, MAX_RANK, assert_slot_holds, make_adapter, make_pool, pool_of

from lora_kernels.adapters import pool as pool_module
from lora_kernels.adapters.pool import PoolFullError, PoolStatistics


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
    pool.acquire("a"), pool.release("a")
    assert log[5:] == ["copy waits for compute3", "compute waits for copy3"]
    pool.unload("a")
    assert log[7:] == ["copy waits for compute4"]  # not for the uses of "a" before it was evicted


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
