"""The CUDA decode kernel: on the GPU under test, or emulated, where every block and thread comes in any order."""

import math
import random

import emulated
import pytest
import torch
from batches import Batch, assert_within_budget, packed
from conftest import DEVICE

from lora_kernels import BatchPlan, lora_linear_batched, testing
from lora_kernels.backends import cuda_batched, cuda_library, eager_batched, launcher, triton_batched
from lora_kernels.dispatch import Problem, choose, explain

CHOICE = ("cuda", "one_launch")
ON_GPU = DEVICE == "cuda"
HALF = [torch.bfloat16, torch.float16]
every_dtype = pytest.mark.parametrize("dtype", HALF, ids=str)
needs_kernels = pytest.mark.skipif(
    isinstance(cuda_library.library(), str) if ON_GPU else emulated.COMPILER is None,
    reason="the CUDA kernels are not built" if ON_GPU else "no g++ for the emulator",
)
QKV = dict(m=11, widths=(72, 40, 130), k=264, slots=4, rank=24)
PAIRS = dict(m=7, widths=(40, 33), k=130, slots=6, rank=33, per_row=3)
SHAPES = [
    dict(m=1, widths=(1,), k=1, slots=1, rank=1),
    dict(m=16, widths=(64,), k=512, slots=300, rank=16),
    dict(m=8, widths=(100,), k=72, slots=3, rank=512),
    dict(m=9, widths=(65,), k=999, slots=5, rank=7),
    dict(m=16, widths=(48,), k=64, slots=200, rank=3, per_row=9),  # more adapters than threads
    QKV,
    PAIRS,
]
every_shape = pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "-".join(map(str, shape.values())))


@pytest.fixture
def shuffle():
    """Makes the launches that follow come in the order of a seed; on a GPU nothing can."""
    if ON_GPU:
        yield lambda seed: None
        return
    with emulated.emulating(emulated.build()) as emulator:
        yield emulator.seed


def twin(batch):
    """The same batch without a base term, behind which a wrong adapter could hide."""
    batch.weight, batch.bias = torch.zeros_like(batch.weight), None
    return batch


def check(batch, y):
    if batch.expected().any():
        assert_within_budget(batch, y)
    else:
        assert not y.any()


@needs_kernels
@every_shape
def test_shapes_and_ranks_in_any_order(shuffle, shape):
    shape = dict(shape, dtype=HALF[shape["m"] % 2], device=DEVICE)
    for batch in (Batch(**shape), twin(Batch(**shape))):
        ys = []
        for seed in range(2):
            shuffle(seed)
            ys.append(batch.run(CHOICE))
        check(batch, ys[0])
        assert all(torch.equal(y, ys[0]) for y in ys)
        assert not launcher.counters(torch.device(DEVICE), 1).any()


def random_batch(rng):
    widths = tuple(rng.choice((8, 64, rng.randint(1, 150))) for _ in range(rng.choice((1, 1, 2, 3))))
    return Batch(
        m=rng.randint(1, 16),
        widths=widths,
        k=rng.choice((8 * rng.randint(1, 60), rng.randint(1, 500))),
        slots=rng.randint(1, 20),
        rank=rng.choice((1, 8, 16, 17, 40, rng.randint(1, 100))),
        dtype=rng.choice(HALF),
        device=DEVICE,
        popularity=rng.choice(("uniform", "identical", "distinct", "zipf", "base")),
        bias=rng.random() < 0.5,
        per_row=rng.choice((1, 1, 1, 2, 5)),
    )


def run_guarded(batch, rng):
    """The batch with packed adapters, and x and the weight in any layout within NaN."""
    layouts = ("contiguous", "padded", "misaligned", "transposed")
    x, weight = (testing.guarded(t, rng.choice(layouts), DEVICE) for t in (batch.x, batch.weight))
    on_device = (None if t is None else t.to(DEVICE) for t in (batch.slots, batch.weights, batch.bias))
    slots, weights, bias = on_device
    adapters, plan = tuple(map(packed, batch.adapters)), BatchPlan(slots, weights)
    with testing.poisoned_empty():
        options = dict(bias=bias, backend=CHOICE[0], strategy=CHOICE[1])
        return lora_linear_batched(x, weight, adapters, plan, **options).cpu()


@needs_kernels
@pytest.mark.parametrize("seed", range(25))
def test_random_problems_packed_and_padded_in_any_layout(shuffle, seed):
    rng = random.Random(seed)
    batch = random_batch(rng)
    if rng.random() < 0.3:
        twin(batch)
    shuffle(seed)
    y = batch.run(CHOICE)
    check(batch, y)
    assert torch.equal(run_guarded(batch, rng), y)


@needs_kernels
@every_dtype
def test_a_row_does_not_depend_on_its_company(shuffle, dtype):
    batch = Batch(m=16, widths=(72, 33), k=520, slots=5, rank=40, dtype=dtype, device=DEVICE, per_row=2)
    y = batch.run(CHOICE)
    for rows in (slice(0, 1), slice(3, 5), slice(5, 13), slice(7, 16)):
        assert torch.equal(batch.run(CHOICE, rows=rows), y[rows])


def assert_isolated(batch):
    """A tenant full of NaN, and a row full of NaN, change nothing for the others."""
    y = batch.run(CHOICE)
    for one_slice in batch.adapters:
        one_slice.a[1], one_slice.b[1], one_slice.scalings[1] = math.nan, math.inf, math.nan
    batch.x[2] = math.nan
    hit = (batch.slots.view(len(y), -1) == 1).any(dim=1) | (torch.arange(len(y)) == 2)
    poisoned = batch.run(CHOICE)
    assert torch.equal(poisoned[~hit], y[~hit]) and poisoned[hit].isnan().all() and not hit.all()


@needs_kernels
@every_dtype
@pytest.mark.parametrize("shape", [QKV, PAIRS], ids=["qkv", "pairs"])
def test_a_tenant_full_of_nan_does_not_reach_the_others(shuffle, shape, dtype):
    assert_isolated(Batch(**shape, dtype=dtype, device=DEVICE))


@needs_kernels
def test_a_slot_without_an_adapter_and_a_row_without_a_slot(shuffle):
    batch = Batch(m=6, widths=(40,), k=64, slots=3, rank=8, dtype=torch.float16, device=DEVICE)
    batch.adapters[0].ranks[1] = 0
    base = batch.run(CHOICE, slots=torch.full((6,), -1, dtype=torch.int32))
    assert torch.equal(batch.run(CHOICE, slots=torch.ones(6, dtype=torch.int32)), base)
    assert not torch.equal(batch.run(CHOICE, slots=torch.zeros(6, dtype=torch.int32)), base)
    assert batch.run(CHOICE, rows=slice(0)).shape == (0, 40)


@needs_kernels
def test_more_slices_than_a_launch_holds_are_refused(shuffle):
    batch = Batch(m=2, widths=(1,) * 17, k=8, slots=1, rank=1, dtype=torch.float16, device=DEVICE)
    with pytest.raises(NotImplementedError, match="got 17 slices, the cuda backend has at most 16"):
        batch.run(CHOICE)


BARRIER = "    barrier();  // "
FAULTS = {
    "a barrier before the arrival": ("  barrier();\n  if (thread() == 0) *shared", "  if (thread() == 0) *shared"),
    "a barrier before a stage is read": (f"  {BARRIER}this stage", "// "),
    "a barrier before the table is overwritten": (f"{BARRIER}what is overwritten", "// "),
    "a barrier after the sums": (f"{BARRIER}the sums have been read", ""),
    "the wait for a copy": ("copy_wait<kStages - 1>", "copy_wait<kStages>"),
    "the wait for a stage": ("copy_wait<kExpandStages - 2>", "copy_wait<kExpandStages - 1>"),
    "the release of an arrival": ("*shared = arrive(counter, 1)", "*shared = add_relaxed(counter, 1)"),
    "the reset of a tile": ("  if (thread() == 0) reset(p.arrived + 1 + tile);", ""),
    "the reset of the shrink": ("reset(p.arrived);", "(void)p;"),
    "a lane of a fragment": ("below.word[w], top.word[w + 1]", "top.word[w + 1], below.word[w]"),
    "a column of a fragment": ("lane % 4 * 2 + c % 2", "lane % 4 * 2 + c / 2"),
    "the mask of W's rows": ("8 * j + g < m.live ? live : 0", "live"),
    "the mask of K": ("left < 8 ? static_cast<int>(left) : 8", "8"),
    "the mask of the ranks": ("left[i] = below(left[i], here.r + 2 * t + i / 2 * 8, adapter.rank)", "left[i] += 0"),
    "the choice of rows after the product": ("if (users >> (4 * (2 * t + c % 2)) & 1) sums", "sums"),
    "the order of the parts": ("* p.parts + part) * (kColumns", "* p.parts) * (kColumns"),
    "who is last": ("== 2 * p.parts;", "== 2 * p.parts - 1;"),
}


@pytest.fixture(scope="module")
def faulty():
    return emulated.build_faulty("decode.cu", FAULTS)


@needs_kernels
@pytest.mark.skipif(ON_GPU, reason="faults are planted in the emulator")
@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found(faulty, fault):
    with pytest.raises((AssertionError, RuntimeError)), emulated.emulating(faulty[fault]) as emulator:
        launcher.reset()
        try:
            batch = Batch(m=9, widths=(40, 33, 70), k=200, slots=5, rank=24, dtype=torch.float16)
            for seed in range(50):
                emulator.seed(seed)
                y = batch.run(CHOICE)
                assert_within_budget(batch, y)
                if seed == 1:
                    assert torch.equal(run_guarded(batch, random.Random(seed)), y)
                    assert_isolated(Batch(m=9, widths=(40, 33, 70), k=200, slots=5, rank=24, dtype=torch.float16))
        finally:
            launcher.reset()


PROBLEM = Problem(
    16, 4096, 4096, 16, torch.bfloat16, torch.bfloat16, False, "cuda", 90, 132, tma=True, tf32=False, distinct=16
)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (dict(device="cpu"), "x is on cpu, not a GPU"),
        (dict(m=17), "17 rows are more than 16"),
        (dict(dtype=torch.float32), "torch.float32 is neither torch.bfloat16 nor torch.float16"),
        (dict(capability=75), "sm_75 is older than sm_80"),
    ],
)
def test_what_it_cannot_run_is_refused_with_the_reason(monkeypatch, change, reason):
    monkeypatch.setattr(cuda_library, "library", lambda: object())
    assert cuda_batched.reasons_unsupported(PROBLEM) == []
    choose.cache_clear()
    with pytest.raises(NotImplementedError, match=reason):
        choose(PROBLEM._replace(**change), "cuda")
    choose.cache_clear()


def test_it_runs_on_request_only_and_explain_says_so(monkeypatch):
    monkeypatch.setattr(cuda_library, "library", lambda: object())
    for module in (triton_batched, eager_batched):
        assert choose.__wrapped__(PROBLEM).backend is module
        monkeypatch.setattr(module, "reasons_unsupported", lambda problem: ["it is gone"])
    assert choose.__wrapped__(PROBLEM, "cuda").backend is cuda_batched
    choose.cache_clear()
    monkeypatch.undo()
    said = str(explain(16, 4096, 4096, 16, capability=90, backend="triton", adapters=4))
    assert "cuda         on request only: it has not been timed on a GPU yet" in said


@pytest.mark.parametrize(
    ("tiles", "steps", "num_sms", "parts"), [(64, 32, 132, 2), (224, 32, 132, 4), (16, 32, 132, 8), (1, 1, 132, 1)]
)
def test_parts_share_out_the_work(tiles, steps, num_sms, parts):
    assert cuda_batched.parts_of(tiles, steps, num_sms) == parts


@pytest.mark.skipif(isinstance(cuda_library.library(), str), reason="the CUDA kernels are not built")
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a driver")
def test_the_library_loads_without_a_driver_and_a_launch_says_what_is_wrong(monkeypatch):
    monkeypatch.setattr(cuda_batched, "reasons_unsupported", lambda problem: [])
    choose.cache_clear()
    with pytest.raises(RuntimeError, match="the CUDA kernel could not be launched: cudaError"):
        Batch(m=2, dtype=torch.float16).run(CHOICE)
    choose.cache_clear()
    assert cuda_library.architectures() == "sm_80, sm_90a, sm_100"
