"""The adapter pool under threads: 100,000 operations while batches are decoded, and defects that this must find."""

import ast
import contextlib
import functools
import gc
import inspect
import itertools
import random
import threading
import time
import types
import weakref

import pytest
import torch
from test_pool import EAGER, LAYERS, MAX_RANK, assert_slot_holds, make_adapter

from lora_kernels import BatchPlan, lora_linear_batched
from lora_kernels.adapters import pool as pool_module

NAMES = [f"tenant-{i}" for i in range(12)]
SLOTS, ROWS, THREADS = 5, 14, 4
WEIGHT = {layer: torch.arange(n * k).remainder(7).sub(3).float().view(n, k) for layer, (k, n) in LAYERS.items()}
make_adapter = functools.cache(make_adapter)


@functools.cache
def merged(seed, layer):
    """The layer's weight with the adapter merged: small whole numbers, exact in fp32."""
    a, b, scaling = make_adapter(seed)[layer]
    return WEIGHT[layer] + scaling * b @ a


def pause():
    if random.random() < 0.02:
        time.sleep(0)  # somebody else's turn


def pool_with(method="", old="", new=""):
    """The pool's module, in which threads may switch before any statement, with a defect in one method."""
    head, definition, tail = inspect.getsource(pool_module).partition(f"def {method}(")
    assert not method or old in tail
    tree = ast.parse(head + definition + tail.replace(old, new, 1) if method else inspect.getsource(pool_module))
    [paused] = ast.parse("pause()").body
    for function in [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]:
        for node in ast.walk(function):
            for field in ("body", "orelse", "finalbody"):
                if isinstance(block := getattr(node, field, None), list):
                    setattr(node, field, [part for statement in block for part in (paused, statement)])
    module = types.ModuleType("paused_pool")
    module.pause = pause
    exec(compile(ast.fix_missing_locations(tree), module.__name__, "exec"), vars(module))
    return module


class Churn:
    """Threads that use one pool in every way at once; `faults` is what they saw go wrong."""

    def __init__(self, module):
        self.loaded, self.PoolFullError, pack = weakref.WeakSet(), module.PoolFullError, module.pack
        module.pack = lambda *args, **kwargs: self.note(pack(*args, **kwargs))
        self.pool = module.AdapterPool(LAYERS, SLOTS, MAX_RANK, torch.float32, rows=ROWS)
        self.seeds, self.versions = {}, itertools.count()
        self.acquired, self.refused, self.decoded, self.faults = [], [], [], []
        for name in NAMES:
            self.load(name)

    def note(self, packed):
        self.loaded.add(packed.flat)
        return packed

    def load(self, name):
        self.seeds[name] = next(self.versions) % 64
        self.pool.load_tensors(name, make_adapter(self.seeds[name]))

    @contextlib.contextmanager
    def using(self, name):
        """The adapter's slot, or None where it cannot be had."""
        with contextlib.ExitStack() as held:
            slot = None
            try:
                with maybe_unknown():
                    slot = held.enter_context(self.pool.using(name))
                    self.acquired.append(name)
            except self.PoolFullError:
                self.refused.append(name)
            yield slot

    def decode(self, rng):
        layer = rng.choice(list(LAYERS))
        with contextlib.ExitStack() as held:
            slots = {name: held.enter_context(self.using(name)) for name in rng.sample(NAMES, rng.choice((1, 2)))}
            tenants = rng.choices([None, *(name for name, slot in slots.items() if slot is not None)], k=4)
            plan = BatchPlan(torch.tensor([slots.get(name, -1) for name in tenants], dtype=torch.int32))
            x = torch.tensor([rng.choices(range(-3, 4), k=LAYERS[layer][0]) for _ in tenants]).float()
            y = lora_linear_batched(x, WEIGHT[layer], self.pool.layer(layer), plan, **EAGER)
            weights = [merged(self.seeds[name], layer) if name else WEIGHT[layer] for name in tenants]
        right = (y == (torch.stack(weights) @ x[..., None]).squeeze(-1)).all(1)
        self.decoded += tenants
        self.faults += [f"a wrong row of {name}" for name, ok in zip(tenants, right.tolist(), strict=True) if not ok]

    def use(self, rng):
        with self.using(name := rng.choice(NAMES)) as slot:
            assert slot is None or self.pool.resident[name] == slot

    def replace(self, rng):
        name = rng.choice(NAMES)
        with maybe_unknown():
            try:
                self.pool.unload(name)
            except RuntimeError:  # in use
                return
            self.load(name)  # whoever unloads a name owns it until it is loaded again

    def prefetch(self, rng):
        with maybe_unknown():
            self.pool.prefetch(rng.choice(NAMES))

    def look(self, rng):
        assert len(self.pool.resident) <= SLOTS and len(self.pool) <= len(NAMES)
        with pytest.raises(LookupError, match="got 'nobody', expected a loaded one: 'tenant-"):
            self.pool.release("nobody")

    def work(self, seed, operations):
        rng = random.Random(seed)
        kinds = (self.decode, self.use, self.replace, self.prefetch, self.look)
        for operation in rng.choices(kinds, (2, 9, 2, 6, 1), k=operations):
            if self.faults:
                return
            try:
                operation(rng)
            except BaseException as error:
                self.faults.append(f"{operation.__name__}: {error!r}")

    def run(self, operations):
        """`operations` by all threads together; then everything must be accounted for."""
        threads = [threading.Thread(target=self.work, args=(seed, operations // THREADS)) for seed in range(THREADS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if not self.faults:
            try:
                self.settle()
            except Exception as error:
                self.faults.append(f"in the end: {error!r}")
        return self.faults

    def settle(self):
        pool, counted = self.pool, self.pool.statistics
        assert counted.hits + counted.misses == len(self.acquired) and counted.refusals == len(self.refused)
        for name, slot in pool.resident.items():
            assert_slot_holds(pool, slot, make_adapter(self.seeds[name]))
        gc.collect()
        assert len(self.loaded) == len(pool) == len(NAMES)
        for name in NAMES:
            pool.unload(name)  # raises if a reference leaked
        gc.collect()
        assert not self.loaded and not pool.resident and not pool.layer("q").ranks.any()
        for name, rank in zip(NAMES, (4, 4, 4, 1, 1), strict=False):  # every slot and every row
            pool.load_tensors(name, make_adapter(0, (rank, rank)))
            pool.acquire(name)


@contextlib.contextmanager
def maybe_unknown():
    """Somebody else may be replacing the adapter."""
    try:
        yield
    except LookupError as error:
        if type(error) is not LookupError:  # a KeyError is the pool's own
            raise


def test_no_wrong_row_and_no_leak():
    churn = Churn(pool_with())
    assert not churn.run(100_000)
    assert len(churn.decoded) > 30_000 and churn.pool.statistics.evictions > 10_000 and len(churn.refused) > 100


LOCK = ("with self._lock:", "with contextlib.nullcontext():")
IF_LAST = "if not adapter.references:\n                self._idle"
DEFECTS = {
    "acquire without the lock": ("acquire", *LOCK),
    "release without the lock": ("release", *LOCK),
    "prefetch without the lock": ("prefetch", *LOCK),
    "unload without the lock": ("unload", *LOCK),
    "the second acquisition is not counted": ("acquire", "adapter.references += 1", "adapter.references = 1"),
    "the first of two releases makes it idle": ("release", IF_LAST, IF_LAST.replace("not adapter.references", "True")),
    "acquired adapters are evicted": ("_place", "self._idle.items()", "(*self._idle.items(), *self._held.items())"),
    "acquired adapters are unloaded": ("unload", "if adapter.references", "if False"),
    "a slot is lost": ("_vacate", "self._free.append(adapter.slot)", "pass"),
    "rows are lost": ("_vacate", "self._gaps.give(adapter.rows)", "pass"),
    "the rank stays": ("_vacate", "self._ranks[:, adapter.slot] = 0", "pass"),
    "rows of another": ("_place", "self._first_rows[slot] = rows.start", "pass"),
    "a hit is not counted": ("acquire", "counted.hits += 1", "pass"),
    "host memory leaks": ("unload", "del self._adapters[name]", "KEPT.append(self._adapters.pop(name))"),
}  # fmt: skip


@pytest.mark.parametrize("defect", DEFECTS)
def test_finds(defect):
    module = pool_with(*DEFECTS[defect])
    module.KEPT = []
    assert Churn(module).run(4_000)
