"""The base layer by the compiled CPU kernels: csrc/cpu/base.h, and dx in csrc/cpu/linear.h."""

import math
from dataclasses import replace

import pytest
import torch
from batches import Batch, assert_within_budget
from compiled import SETS, needs_library, on_threads

from lora_kernels import testing
from lora_kernels.backends import cpu_library
from lora_kernels.configs import cpu as configs_cpu
from lora_kernels.testing import Case

pytestmark = needs_library
CHOICE = ("cpu", "chained")
PAIRS = ("amx", "avx512_bf16")  # the sets that multiply pairs of bf16
SHAPES = [
    dict(m=1, widths=(64,), k=2),
    dict(m=17, widths=(72, 40, 33), k=96),  # tiles that end in the next slice, and at the end of W
    dict(m=5, widths=(65,), k=94, bias=False),
    dict(m=49, widths=(130,), k=1000),  # past a panel by one
    dict(m=100, widths=(64, 1, 2), k=30),
    dict(m=33, widths=(1100,), k=34, slots=2, rank=4),
    dict(m=16, widths=(79,), k=4098, slots=2, rank=4),  # past several pieces of the depth
    dict(m=3, widths=(64,), k=1),
    dict(m=33, widths=(70, 33), k=31),  # every other row begins between pairs
    dict(m=50, widths=(81,), k=95, bias=False),
    dict(m=16, widths=(65,), k=4099, slots=2, rank=4),
    dict(m=20, widths=(16,), k=33),  # fewer columns than are multiplied at once
    dict(m=20, widths=(50,), k=94),
    dict(m=7, widths=(33, 17), k=63),
    dict(m=7, widths=(49, 1, 13), k=65),
]


@pytest.fixture(
    params=[(isa, torch.float32) for isa in SETS] + [(isa, torch.bfloat16) for isa in SETS if isa in PAIRS], ids=str
)
def dtype(request, ask_for, monkeypatch):
    """Each instruction set and dtype, with any number of rows."""
    isa, dtype = request.param
    ask_for(isa)
    for rows in (configs_cpu.BASE_ROWS, configs_cpu.DX_ROWS):
        monkeypatch.setitem(rows, (*cpu_library.measured_as(), str(dtype)), (1, 10**6))
    return dtype


@pytest.fixture
def ours(monkeypatch):
    """Of each call whether the kernels multiplied the base layer."""
    seen, decide = [], cpu_library.multiplies_base
    monkeypatch.setattr(cpu_library, "multiplies_base", lambda *operands: seen.append(decide(*operands)) or seen[-1])
    return seen


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: f"{shape['m']}-{shape['widths']}-{shape['k']}")
def test_rows_are_right_whatever_their_company_and_the_threads(dtype, ours, shape):
    batch = Batch(**shape, dtype=dtype)
    y = batch.run(CHOICE)
    assert_within_budget(batch, y)
    for threads in (2, 3, 16):
        assert torch.equal(on_threads(threads, batch.run, CHOICE), y)
    for rows in (slice(0, 1), slice(-2, None), slice(len(y) // 2, None)):
        assert torch.equal(batch.run(CHOICE, rows=rows), y[rows])
    assert all(ours)


def apart(matrix, stride, start=0):
    """The same values, in rows `stride` elements apart, with NaN around them."""
    wide = torch.full((len(matrix), stride), math.nan, dtype=matrix.dtype)
    wide[:, start : start + matrix.shape[1]] = matrix
    return wide[:, start : start + matrix.shape[1]]


@pytest.mark.parametrize("k", [66, 67])
def test_operands_as_they_lie(dtype, ours, k):
    batch = Batch(m=19, k=k, widths=(80,), dtype=dtype)
    y = batch.run(CHOICE)
    for change in (
        {"x": apart(batch.x, k + 1), "weight": apart(batch.weight, k + 1)},
        {"x": apart(batch.x, k + 2), "weight": apart(batch.weight, k + 2)},
        {"x": apart(batch.x, k + 3, start=1), "weight": apart(batch.weight, k + 4, start=1)},
        {"x": apart(batch.x, k + 4, start=1), "weight": apart(batch.weight, k + 3, start=1)},
        {"x": batch.x.mT.contiguous().mT},
        {"bias": apart(batch.bias[:, None], 3)[:, 0]},
    ):
        assert torch.equal(batch.run(CHOICE, **change), y)
    assert all(ours)


CASES = [
    Case(1, 64, 64, 4),
    Case(17, 145, 96, 16, bias=True),
    Case(49, 130, 1000, 5, dropout_p=0.3),
    Case(21, 1100, 66, 33, needs=()),
    Case(16, 79, 4098, 1, bias=True, dropout_p=0.5),
    Case(13, 200, 96, 33, layouts={"x": "strided", "lora_a": "transposed", "dy": "misaligned"}),
    Case(17, 145, 97, 16, bias=True, dropout_p=0.3),
    Case(49, 31, 33, 5),
    Case(13, 200, 95, 33, layouts={"x": "misaligned", "weight": "misaligned"}),
    # past blocks of dy's rows
    Case(130, 95, 500, 7, dropout_p=0.2, layouts={"weight": "misaligned", "dy": "misaligned"}),
    Case(70, 4099, 80, 3),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.m}-{case.n}-{case.k}-{case.r}")
def test_one_adapter(dtype, ours, case):
    case = replace(case, dtype=dtype)
    testing.check(case, *CHOICE)
    tensors = testing.make_tensors(case)
    expected = testing.run(case, tensors, *CHOICE)
    for threads in (2, 3, 16):
        for name, result in on_threads(threads, testing.run, case, tensors, *CHOICE).items():
            assert torch.equal(result, expected[name]), name
    assert ours and all(ours)


@pytest.mark.parametrize("n", [66, 67])
def test_a_nan_of_dy_stays_in_its_row_and_one_of_w_in_its_column(dtype, n):
    case = Case(85, n, 210, 4, dtype)
    tensors = testing.make_tensors(case)
    dx = testing.run(case, tensors, *CHOICE)["dx"]
    for row, column in ((7, n - 1), (8, 0), (84, 3)):  # an odd row ends in the middle of a pair
        tensors.dy[row, column] = math.nan
    tensors.weight[n - 1, 200] = math.nan
    z = testing.run(case, tensors, *CHOICE)["dx"]
    rows, columns = torch.tensor([7, 8, 84]), torch.tensor([200])
    assert z[rows].isnan().all() and z[:, columns].isnan().all()
    z[rows], z[:, columns] = dx[rows], dx[:, columns]
    assert torch.equal(z, dx)


@pytest.mark.parametrize("n", [2200, 2201])
def test_rows_of_dx_do_not_depend_on_their_company(dtype, n):
    case = Case(85, n, 70, 4, dtype)
    tensors = testing.make_tensors(case)
    dx = testing.run(case, tensors, *CHOICE)["dx"]
    for rows in (slice(0, 1), slice(83, 85), slice(50, 80)):
        few = tensors._replace(x=tensors.x[rows], dy=tensors.dy[rows])
        assert torch.equal(testing.run(replace(case, m=len(few.x)), few, *CHOICE)["dx"], dx[rows])


@pytest.mark.parametrize("isa", SETS)
def test_fp32_sums_are_as_exact_as_those_of_a_blas(ask_for, monkeypatch, isa):
    """Which adds up a long depth in parts: one running sum of 4096 has four times the error."""
    ask_for(isa)
    for rows in (configs_cpu.BASE_ROWS, configs_cpu.DX_ROWS):
        monkeypatch.setitem(rows, (*cpu_library.measured_as(), "torch.float32"), (1, 10**6))
    case = Case(16, 4096, 4096, 1, torch.float32)
    tensors = testing.make_tensors(case)
    tensors.lora_b.zero_()
    results = testing.run(case, tensors, *CHOICE)
    for name, left, right in (("y", tensors.x, tensors.weight.mT), ("dx", tensors.dy, tensors.weight)):
        exact = left.double() @ right.double()
        assert (results[name] - exact).pow(2).mean().sqrt() < 2**-21 * exact.pow(2).mean().sqrt(), name


def test_nothing_is_left_of_the_call_before(dtype):
    """Whose scratch is used again."""
    small = Case(21, 83, 105, 9, dtype, dropout_p=0.2)
    tensors = testing.make_tensors(small)
    expected = testing.run(small, tensors, *CHOICE)
    large = Case(200, 300, 500, 40, dtype)
    nans = testing.Tensors(*(t if t is None else torch.full_like(t, math.nan) for t in testing.make_tensors(large)))
    testing.run(large, nans, *CHOICE)
    Batch(m=100, k=300, dtype=dtype).run(CHOICE)
    for name, result in testing.run(small, tensors, *CHOICE).items():
        assert torch.equal(result, expected[name]), name


@pytest.mark.parametrize("k", [66, 67])
def test_a_nan_stays_in_its_row_and_its_column(dtype, k):
    batch = Batch(m=20, k=k, widths=(80,), dtype=dtype)
    y = batch.run(CHOICE)
    batch.x[7, 3] = batch.weight[40, 0] = math.nan
    z = batch.run(CHOICE)
    assert z[7].isnan().all() and z[:, 40].isnan().all()
    others = torch.arange(20)[:, None] != 7, torch.arange(80) != 40
    assert torch.equal(z[others[0] & others[1]], y[others[0] & others[1]])


def test_the_rest_is_pytorchs(dtype, ours, monkeypatch):
    def transposed(batch):
        batch.weight = batch.weight.mT.contiguous().mT

    few, many = Batch(m=4, dtype=dtype), Batch(m=11, dtype=dtype)
    monkeypatch.setattr(configs_cpu, "BASE_ROWS", {key: (5, 10) for key in configs_cpu.BASE_ROWS})
    for batch, change in (
        (few, None), (many, None), (Batch(m=8, widths=(15,), dtype=dtype), None), (Batch(m=8, dtype=dtype), transposed),
    ):  # fmt: skip
        if change:
            change(batch)
        assert_within_budget(batch, batch.run(CHOICE))
        assert not ours[-1], (batch.x.shape, batch.weight.stride())
    Batch(m=8, dtype=dtype).run(CHOICE)
    assert ours[-1]
    monkeypatch.setattr(configs_cpu, "DX_ROWS", {key: (5, 10) for key in configs_cpu.DX_ROWS})
    for m in (4, 8, 11):
        testing.check(Case(m, 40, 70, 3, dtype), *CHOICE)
        assert ours[-1] == (5 <= m <= 10)
