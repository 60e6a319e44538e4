"""The compiled CPU kernels of `lora_linear`: every instruction set, tile edges, masks, and any number of threads.

All of tests/test_functional.py and tests/test_properties.py runs against them too.
"""

import dataclasses

import pytest
import torch
from compiled import every_set, needs_library, on_threads

from lora_kernels import reference, testing
from lora_kernels.backends import cpu, cpu_library, eager
from lora_kernels.configs import cpu as configs_cpu
from lora_kernels.dispatch import Problem, choose
from lora_kernels.testing import Case

pytestmark = needs_library
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
SHAPES = [
    Case(1, 1, 1, 1, dropout_p=0.5),
    Case(2, 8, 8, 8),
    Case(65, 193, 197, 17, dropout_p=0.3),  # past a block of rows, a sweep of columns, and a panel, by one
    Case(37, 577, 1031, 5),
    Case(33, 49, 521, 49, dropout_p=0.9, bias=True, needs=testing.TRAINABLE),
    Case(40, 97, 95, 512, dropout_p=0.05),
    Case(13, 200, 96, 33, layouts={"x": "strided", "lora_a": "transposed", "lora_b": "strided", "dy": "misaligned"}),
]


@every_set
@DTYPES
@pytest.mark.parametrize("case", SHAPES, ids=lambda case: f"{case.m}-{case.n}-{case.k}-{case.r}")
def test_every_instruction_set_keeps_the_budget(ask_for, isa, dtype, case):
    ask_for(isa)
    testing.check(dataclasses.replace(case, dtype=dtype), "cpu", "chained")


@every_set
@DTYPES
def test_fp32_adapters_get_fp32_gradients(ask_for, isa, dtype):
    """They come straight from the sums: none is a value of 16 bits."""
    ask_for(isa)
    case = Case(70, 96, 100, 7, dtype, lora_dtype=torch.float32)
    testing.check(case, "cpu", "chained")
    results = testing.run(case, testing.make_tensors(case), "cpu", "chained")
    for name in ("da", "db"):
        assert results[name].dtype == torch.float32
        assert not torch.equal(results[name], results[name].bfloat16().float())


@every_set
@DTYPES
@pytest.mark.parametrize("m", [1, 63, 130])
def test_bits_do_not_depend_on_the_number_of_threads(ask_for, isa, dtype, m):
    ask_for(isa)
    case = Case(m, 211, 389, 19, dtype, dropout_p=0.2, base=False)  # the base layer's sums are PyTorch's
    tensors = testing.make_tensors(case)
    expected = testing.run(case, tensors, "cpu", "chained")
    for threads in (2, 3, 16):
        for name, result in on_threads(threads, testing.run, case, tensors, "cpu", "chained").items():
            assert torch.equal(result, expected[name]), name


@every_set
@DTYPES
@pytest.mark.parametrize("dropout_p", [0.0001, 0.25, 0.999, 0.999999])
def test_the_mask_is_the_references(ask_for, isa, dtype, dropout_p):
    """With A = B = 1 on one output and dy = 1, dx is the mask; with one x at a time h is; da is the masked x itself."""
    ask_for(isa)
    m, k, seed = 35, 203, torch.tensor(-(2**62) + 12345)
    keep = reference.dropout_keep(seed, m, k, dropout_p)
    x, one = torch.ones(m, k, dtype=dtype), torch.ones(1, 1, dtype=dtype)
    arguments = (torch.zeros(1, k, dtype=dtype), torch.ones(1, k, dtype=dtype), one)
    scaling = 1.0 - dropout_p  # cancels 1 / (1 - p), up to its rounding
    weight, lora_a, lora_b = arguments
    _, h = cpu.forward(x, weight, None, lora_a, lora_b, scaling, dropout_p, seed, "chained")
    torch.testing.assert_close(h[:, 0].float(), keep.sum(1).float(), rtol=1e-2, atol=0)
    needs = (True, True, False)
    dy = torch.ones(m, 1, dtype=dtype)
    dx, *_ = cpu.backward(dy, x, h, weight, lora_a, lora_b, 1.0, dropout_p, seed, needs, "chained")
    assert torch.equal(dx != 0, keep)
    one_row = torch.zeros_like(dy)
    one_row[m - 1] = 1
    _, da, _ = cpu.backward(one_row, x, h, weight, lora_a, lora_b, 1.0, dropout_p, seed, needs, "chained")
    assert torch.equal(da[0] != 0, keep[m - 1])


@every_set
def test_dropped_elements_never_reach_the_adapter(ask_for, isa):
    ask_for(isa)
    m, n, k, r, seed = 40, 24, 100, 4, torch.tensor(11)
    x, weight = torch.randn(m, k), torch.zeros(n, k)
    lora_a, lora_b, dy = torch.randn(r, k), torch.randn(n, r), torch.randn(m, n)
    x[~reference.dropout_keep(seed, m, k, 0.5)] = torch.nan
    _, h = cpu.forward(x, weight, None, lora_a, lora_b, 1.0, 0.5, seed, "chained")
    _, da, _ = cpu.backward(dy, x, h, weight, lora_a, lora_b, 1.0, 0.5, seed, (False, True, False), "chained")
    assert h.isfinite().all() and da.isfinite().all()


@pytest.mark.parametrize("needs", [(True, False, False), (False, True, False), (False, False, True)])
def test_each_gradient_alone_has_the_bits_it_has_among_all(needs):
    case = Case(50, 70, 90, 6, torch.bfloat16, dropout_p=0.1)
    t = testing.make_tensors(case)
    fixed = (t.weight, t.lora_a, t.lora_b, 2.0, case.dropout_p, t.seed)
    _, h = cpu.forward(t.x, t.weight, None, *fixed[1:], "chained")
    every = cpu.backward(t.dy, t.x, h, *fixed, (True, True, True), "chained")
    saved = (t.x if needs[1] else None, h if needs[2] else None)
    for need, one, among in zip(needs, cpu.backward(t.dy, *saved, *fixed, needs, "chained"), every, strict=True):
        assert torch.equal(one, among) if need else one is None


def test_it_is_the_default_without_a_gpu(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    choose.cache_clear()
    problem = Problem(32, 64, 64, 16, torch.bfloat16, torch.bfloat16, True, "cpu", 0, 3, False)
    assert choose(problem).backend is cpu
    fallback = choose(problem._replace(dtype=torch.float64))
    assert fallback.backend.__name__.endswith("eager") and "cpu: torch.float64 is none of" in fallback.why
    choose.cache_clear()


def test_what_pytorch_was_measured_to_do_faster_is_left_to_it(ask_for, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setattr(configs_cpu, "EAGER_FROM_RANK", {"generic": 32})
    ask_for("generic")
    bf16 = torch.bfloat16
    problem = Problem(512, 64, 64, 32, bf16, bf16, False, "cpu", 0, 3, False)
    plan = choose(problem)
    assert (
        plan.backend is eager and "cpu: with generic and without dropout PyTorch was faster from rank 32 on" in plan.why
    )
    assert choose(problem, "cpu").backend is cpu
    for other in (
        dict(r=31),
        dict(m=511),
        dict(dropout=True),
        dict(lora_dtype=torch.float32),
        dict(dtype=torch.float16),
    ):
        assert choose(problem._replace(**other)).backend is cpu, other


def test_a_seed_of_another_dtype_is_refused():
    x = torch.ones(3, 4)
    with pytest.raises(TypeError, match=r"seed: got torch\.int32, expected torch\.int64"):
        cpu.forward(x, x, None, x, torch.ones(3, 3), 1.0, 0.5, torch.tensor(7, dtype=torch.int32), "chained")


def test_memory_that_is_not_there_is_an_error():
    one, m, k = torch.ones(1, 1), 2**22, 2**24
    x, w, a, b = one.expand(m, k), one.expand(16, k), one.expand(1, k), one.expand(16, 1)  # of one element each
    forward, isa = cpu_library.operator("forward")
    with pytest.raises(RuntimeError, match=f"lora_linear: no memory for packed operands: m = {m}, n = 16, r = 1"):
        forward(x, w, None, a, b, 1.0, None, 0, 1.0, 1, isa)
    entry, table = torch.zeros(1, dtype=torch.int32), torch.zeros(1, dtype=torch.int64)
    slices = cpu_library.operator("slices")[0]([a], [b], [entry], [one[0]], [table], [1])
    y, slots, batched = one.expand(m, 16), entry.expand(m), cpu_library.operator("batched")[0]
    with pytest.raises(RuntimeError, match=f"lora_linear_batched: no memory for {m} x 1 elements of h"):
        batched(x, w, None, y, slots, slots, None, slices, 1, 1, isa)
