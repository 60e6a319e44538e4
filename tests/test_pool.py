"""The adapter pool: a plain dict's behaviour, whatever happens in which thread, and nothing changed by a refusal."""

import contextlib
import math
from unittest import mock

import pytest
import torch
from conftest import DEVICE
from torch import nn

from lora_kernels import BatchPlan, apply_lora, lora_linear_batched, save_adapter
from lora_kernels.adapters import pool as pool_module
from lora_kernels.adapters.packed import PackedAdapter
from lora_kernels.adapters.placement import Gaps, find_place
from lora_kernels.adapters.pool import AdapterPool, PoolFullError, PoolStatistics

LAYERS = {"q": (8, 6), "v": (8, 3)}
MAX_RANK = 4
EAGER = dict(backend="eager", strategy="looped")


def make_pool(slots=2, dtype=torch.float32, device=DEVICE, rows=None):
    pool = AdapterPool(LAYERS, slots, MAX_RANK, dtype, device, rows)
    for layer in LAYERS:  # what is not copied is NaN
        pool.layer(layer).a.fill_(math.nan)
        pool.layer(layer).b.fill_(math.nan)
    finish_copies()
    return pool


def finish_copies():
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def make_adapter(seed, ranks=None):
    """`{layer: (a, b, scaling)}` of small whole numbers, so that fp32 products are exact in any order."""
    generator = torch.Generator().manual_seed(seed)
    if ranks is None:
        ranks = [1 + seed % MAX_RANK, MAX_RANK - seed % MAX_RANK]
    return {
        layer: (
            torch.randint(-3, 4, (r, k), generator=generator).float(),
            torch.randint(-3, 4, (n, r), generator=generator).float(),
            float(1 + seed % 3),
        )
        for (layer, (k, n)), r in zip(LAYERS.items(), ranks, strict=True)
        if r
    }


def pool_of(count, slots=2, **kwargs):
    pool = make_pool(slots, **kwargs)
    for seed in range(count):
        pool.load_tensors("abcdefgh"[seed], make_adapter(seed))
    return pool


def assert_slot_holds(pool, slot, adapter):
    finish_copies()
    for layer in LAYERS:
        adapters = pool.layer(layer)
        a, b, scaling = adapter.get(layer, (torch.empty(0, 1), torch.empty(1, 0), 0.0))
        r = a.shape[0]
        assert adapters.ranks[slot] == r and adapters.scalings[slot] == scaling
        if r:
            held = adapters.slot(slot, r)
            assert all(torch.equal(t.cpu(), want.to(pool.dtype)) for t, want in zip(held, (a, b), strict=True))


def tensors_of(layer):
    return layer.a, layer.b, layer.ranks, layer.scalings, layer.first_row


def state(pool):
    """All that a refusal must not change."""
    finish_copies()
    tensors = [t for layer in LAYERS for t in tensors_of(pool.layer(layer))]
    references = {name: adapter.references for name, adapter in pool._adapters.items()}
    return [pool.resident, pool.statistics, references, len(pool), [t.nan_to_num(nan=-99.0).tolist() for t in tensors]]


@contextlib.contextmanager
def refused(pool, error, message):
    before = state(pool)
    with pytest.raises(error, match=message):
        yield
    before[1].refusals += error is PoolFullError
    assert state(pool) == before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_acquired_adapters_are_in_their_slots(dtype):
    pool = pool_of(2, dtype=dtype)
    slots = [pool.acquire("b"), pool.acquire("a")]
    assert sorted(slots) == [0, 1]
    assert_slot_holds(pool, slots[0], make_adapter(1))
    assert_slot_holds(pool, slots[1], make_adapter(0))


def test_a_slot_is_bounded_by_its_rank():
    """A long adapter leaves its rows behind a short one: they are there, and never used."""
    pool = make_pool(slots=1)
    pool.load_tensors("long", make_adapter(0, ranks=(4, 4)))
    pool.load_tensors("short", make_adapter(1, ranks=(2, 0)))
    with pool.using("long"):
        pass
    slot = pool.acquire("short")
    assert_slot_holds(pool, slot, make_adapter(1, ranks=(2, 0)))
    x, weight = torch.randn(1, 8, device=DEVICE), torch.randn(3, 8, device=DEVICE)
    plan = BatchPlan(torch.tensor([slot], dtype=torch.int32, device=DEVICE))
    assert torch.equal(lora_linear_batched(x, weight, pool.layer("v"), plan, **EAGER), x @ weight.mT)


def test_the_least_recently_used_goes_first():
    pool = make_pool(slots=3)
    for seed, name in enumerate("abcde"):
        pool.load_tensors(name, make_adapter(seed, ranks=(4, 4)))
    for name in "abc":
        with pool.using(name):
            pass
    assert list(pool.resident) == ["a", "b", "c"]
    with pool.using("a"):
        assert list(pool.resident) == ["b", "c", "a"]  # those that are acquired come last
        pool.acquire("d")
        assert list(pool.resident) == ["c", "a", "d"]
    assert list(pool.resident) == ["c", "a", "d"]  # what counts is when a use ends
    pool.prefetch("c")
    pool.acquire("e")
    assert set(pool.resident) == {"c", "d", "e"}
    assert pool.statistics.evictions == 2


def test_acquired_adapters_stay_until_the_last_release():
    pool = pool_of(3)
    assert pool.acquire("a") == pool.acquire("a")
    pool.acquire("b")
    pool.release("a")
    with refused(
        pool, PoolFullError, "no slot with 3 rows .* 'c'.*Acquired: 'a' once, 4 rows, 'b' once, 3 rows; release"
    ):
        pool.acquire("c")
    pool.acquire("b")
    with refused(pool, PoolFullError, "'b' 2 times"):
        pool.acquire("c")
    pool.release("a")
    assert_slot_holds(pool, pool.acquire("c"), make_adapter(2))
    assert set(pool.resident) == {"b", "c"}


def test_ranks_share_rows():
    """Eight rows: two adapters of rank 4, or eight of rank 1, and only those in the way give up theirs."""
    pool = make_pool(slots=8, rows=8)
    for seed in range(8):
        pool.load_tensors("abcdefgh"[seed], make_adapter(seed, ranks=(1, 1)))
        pool.acquire("abcdefgh"[seed])
    pool.load_tensors("wide", make_adapter(8, ranks=(4, 2)))
    for name in "hagfce":  # e, f, g and h lie side by side, and e is the most recent
        pool.release(name)
    pool.acquire("h")
    with refused(
        pool, PoolFullError, r"no slot with 4 rows .* 8 slots, 8 rows\. Acquired: .*'b' once, 1 rows, 'd' once"
    ):
        pool.acquire("wide")
    pool.release("h")
    slot = pool.acquire("wide")
    assert set(pool.resident) == {"a", "b", "c", "d", "wide"} and pool.statistics.evictions == 4
    assert_slot_holds(pool, slot, make_adapter(8, ranks=(4, 2)))
    for name in "bd":
        assert_slot_holds(pool, pool.resident[name], make_adapter("abcdefgh".index(name), ranks=(1, 1)))


def test_slots_run_out_before_rows():
    pool = make_pool(slots=2, rows=8)
    for name, rank in {"a": 1, "b": 1, "c": 2}.items():  # c fits beside both
        pool.load_tensors(name, make_adapter(rank, ranks=(rank, rank)))
        with pool.using(name):
            pass
    assert list(pool.resident) == ["b", "c"]


def test_statistics():
    pool = pool_of(3)
    nbytes = [sum(a.nbytes + b.nbytes for a, b, _ in make_adapter(seed).values()) + 2 * 8 for seed in range(3)]
    for name in "aabac":
        with pool.using(name):
            pass
    waits = pool.statistics.waits
    assert pool.statistics == PoolStatistics(2, 3, 1, sum(nbytes), waits)
    assert waits == 0 if DEVICE == "cpu" else waits <= 5
    assert pool.nbytes == sum(2 * 4 * MAX_RANK * (k + n) + 2 * 8 for k, n in LAYERS.values()) + 16


def test_prefetch_holds_nothing_and_takes_nothing():
    pool = pool_of(4)
    assert pool.prefetch("a") and pool.prefetch("b") and pool.prefetch("c")
    assert list(pool.resident) == ["b", "c"]
    pool.acquire("c"), pool.acquire("c")
    assert pool.statistics.hits == 2 and pool.statistics.misses == 0
    assert pool.statistics.prefetch_hits == 1  # the second would have been a hit without it
    pool.acquire("b")
    before = state(pool)
    assert pool.prefetch("b") and not pool.prefetch("d")
    assert state(pool)[1:] == before[1:]


def test_unloading_frees_the_slot_and_the_name():
    pool = pool_of(2)
    with pool.using("a") as slot:
        pass
    pool.unload("a")
    assert "a" not in pool and len(pool) == 1 and not pool.resident
    finish_copies()
    assert all(pool.layer(layer).ranks[slot] == 0 for layer in LAYERS)
    pool.load_tensors("a", make_adapter(7))
    assert_slot_holds(pool, pool.acquire("a"), make_adapter(7))


def test_using_releases_after_an_error():
    pool = pool_of(1)
    with pytest.raises(ZeroDivisionError), pool.using("a"):
        raise ZeroDivisionError
    pool.unload("a")


def test_no_memory_for_a_copy_changes_nothing(monkeypatch):
    pool = pool_of(3)
    with pool.using("a"), pool.using("b"):
        pass
    exhausted = torch.OutOfMemoryError("no memory for the copy")
    monkeypatch.setattr(PackedAdapter, "to", mock.Mock(side_effect=exhausted))
    for refusing in (pool.acquire, pool.prefetch):
        with refused(pool, torch.OutOfMemoryError, "no memory"):
            refusing("c")
    monkeypatch.undo()
    assert_slot_holds(pool, pool.acquire("c"), make_adapter(2))


def test_a_copy_that_breaks_off_loses_no_slot(monkeypatch):
    """Whoever was evicted for it is gone; nobody is there by half."""
    pool = pool_of(3)
    with pool.using("a"), pool.using("b"):
        pass

    def views(self, flat, shapes):
        yield next(whole(self, flat, shapes))
        raise KeyboardInterrupt

    whole = PackedAdapter.views
    monkeypatch.setattr(PackedAdapter, "views", views)
    with pytest.raises(KeyboardInterrupt):
        pool.acquire("c")
    assert list(pool.resident) == ["a"] and pool.statistics.misses == 2
    monkeypatch.undo()
    for name, seed in {"c": 2, "a": 0}.items():
        assert_slot_holds(pool, pool.acquire(name), make_adapter(seed))


def test_files_are_read_and_checked_outside_the_lock(monkeypatch, tmp_path):
    pytest.importorskip("safetensors")
    save(tmp_path)
    pool, free = make_pool(), []
    for name in ("read_adapter", "pack"):
        whole = getattr(pool_module, name)

        def noted(*args, whole=whole, **kwargs):
            free.append(not pool._lock.locked())
            return whole(*args, **kwargs)

        monkeypatch.setattr(pool_module, name, noted)
    pool.load("a", tmp_path)
    assert free == [True, True]


def test_a_miss_looks_no_further_than_it_must():
    """At 4,096 slots, going through all of them for every miss takes milliseconds under the lock."""
    gaps = Gaps(8 * 4096)
    places = [range(8 * i, 8 * i + 8) for i in range(4096)]
    for place in places:
        gaps.take(place)
    idle = ((str(i), place) for i, place in enumerate(places))
    assert find_place(20, gaps, idle, slot_is_free=False) == (range(0, 20), ["0", "1", "2"])
    assert next(idle)[0] == "3"
    assert gaps.first(1) is None  # nobody has gone yet


def test_layer_tensors_never_move():
    pool = pool_of(8)
    before = [pool.layer(layer) for layer in LAYERS]
    addresses = [t.data_ptr() for layer in before for t in tensors_of(layer)]
    for name in "abcdefgh":
        with pool.using(name):
            pass
    assert [pool.layer(layer) for layer in LAYERS] == before
    assert [t.data_ptr() for layer in before for t in tensors_of(layer)] == addresses


def test_what_was_loaded_belongs_to_the_pool():
    pool, adapter = make_pool(), make_adapter(3)
    pool.load_tensors("a", adapter)
    for a, b, _ in adapter.values():
        a.zero_(), b.zero_()
    assert_slot_holds(pool, pool.acquire("a"), make_adapter(3))


def test_inference_mode_and_gradients_do_not_matter():
    with torch.inference_mode():
        pool = pool_of(1)
    pool.load_tensors("b", {"q": (nn.Parameter(torch.ones(2, 8)), nn.Parameter(torch.ones(6, 2)), 1.0)})
    for name in "ab":
        with pool.using(name):
            pass
    with torch.inference_mode():
        pool.load_tensors("c", make_adapter(2))
        pool.acquire("c")
    pool.acquire("a")
    assert not any(pool.layer(layer).a.requires_grad for layer in LAYERS)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.v = nn.Linear(8, 6), nn.Linear(8, 3, bias=False)


def save(directory, **kwargs):
    """An adapter on disk, and the model that has it."""
    model = apply_lora(Model(), **({"target_modules": ["q", "v"], "r": 3, "lora_alpha": 6} | kwargs))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter)
    save_adapter(model, directory)
    return model


@pytest.mark.parametrize("kwargs", [{}, {"use_rslora": True}, {"target_modules": ["v"]}, {"r": 1}], ids=str)
def test_files_give_what_the_model_gives(kwargs, tmp_path):
    pytest.importorskip("safetensors")
    trained = save(tmp_path, **kwargs).to(DEVICE)
    pool = AdapterPool.for_model(trained, slots=2, max_rank=MAX_RANK)
    pool.load("tenant", tmp_path)
    x = torch.randn(5, 8, device=DEVICE)
    with pool.using("tenant") as slot:
        plan = BatchPlan(torch.full((5,), slot, dtype=torch.int32, device=DEVICE))
        for name, linear in trained.named_children():
            y = lora_linear_batched(x, linear.weight, pool.layer(name), plan, bias=linear.bias, **EAGER)
            torch.testing.assert_close(y, linear(x).detach())


def test_for_model():
    model = nn.ModuleDict({"layers": nn.ModuleList([Model(), Model()]), "head": nn.Linear(6, 10)})
    pool = AdapterPool.for_model(model.bfloat16(), 3, 4, ["v", "layers.0.q"])
    assert [pool.layer(name).b.shape for name in ("layers.0.q", "layers.0.v", "layers.1.v")] == [
        (12, 6),
        (12, 3),
        (12, 3),
    ]
    assert pool.dtype == torch.bfloat16
    for absent in ("layers.1.q", "head"):
        with pytest.raises(LookupError, match=f"layer: got '{absent}', expected one of 'layers.0.q', 'layers.0.v'"):
            pool.layer(absent)
    assert AdapterPool.for_model(model, 3, 4, rows=7).layer("head").a.shape == (7, 6)
    with pytest.raises(ValueError, match=r"target_modules: \['k'\] match no nn.Linear"):
        AdapterPool.for_model(model, 3, 4, ["k"])
    model["again"] = model["head"]
    with pytest.raises(LookupError, match="layer: got 'again'"):  # its files have nothing under this name
        AdapterPool.for_model(model, 3, 4).layer("again")
    model["head"].half()
    with pytest.raises(ValueError, match="model: its layers have .*float16.*make a pool for each"):
        AdapterPool.for_model(model, 3, 4)
