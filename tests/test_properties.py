"""Laws that hold for every problem, whatever the kernel: found by hypothesis, on every strategy."""

from dataclasses import replace

import pytest
import torch
from conftest import DEVICE, INTERPRETED, supports

hypothesis = pytest.importorskip("hypothesis")
from hypothesis import assume, given  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from lora_kernels import lora_linear, testing  # noqa: E402
from lora_kernels.testing import Case  # noqa: E402

NAMES = ("x", "lora_a", "lora_b")
# Without atomics, split sums that depend on M, or a GEMM of the vendor's, a row's result does not depend on other rows.
ROW_BY_ROW = (("triton", "single_pass"), ("triton", "one_launch"))

aligned = st.integers(1, 9).map(lambda eights: 8 * eights)
extents = st.one_of(aligned, st.integers(1, 70))


@st.composite
def cases(draw, **fixed):
    """Small problems; about half of them where TMA applies."""
    of = draw(st.sampled_from((aligned, extents)))
    drawn = {"m": draw(st.integers(1, 70)), "n": draw(of), "k": draw(of), "r": draw(of)}
    return Case(**drawn | {"dtype": draw(st.sampled_from(testing.HALF)), "seed": draw(st.integers(0, 9999))} | fixed)


def tensors(case, pair):
    assume(supports(case, *pair))
    t = testing.make_tensors(case, DEVICE)
    return {name: getattr(t, name) for name in ("x", "weight", "lora_a", "lora_b")}, t.dy


def run(inputs, dy, pair, scaling=1.0):
    """y, dx, da, db."""
    inputs = {name: value.detach().requires_grad_(name in NAMES) for name, value in inputs.items()}
    y = lora_linear(**inputs, scaling=scaling, backend=pair[0], strategy=pair[1])
    return y.detach(), *torch.autograd.grad(y, [inputs[name] for name in NAMES], dy)


def assert_equal(actual, expected):
    for name, a, b in zip(("y", "dx", "da", "db"), actual, expected, strict=True):
        assert torch.equal(a, b), name


def assert_close(actual, expected):
    """Up to the order of fp32 sums."""
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * float(b.abs().max()) if b.numel() else 0.0)


@given(data=st.data())
def test_adapter_alone_is_linear_in_scaling(pair, data):
    """Twice the scaling is exactly twice everything, since no rounding changes under a power of two."""
    case = data.draw(cases(base=False, dtype=torch.bfloat16))
    inputs, dy = tensors(case, pair)
    once, twice = run(inputs, dy, pair, 0.5), run(inputs, dy, pair, 1.0)
    assert_equal(twice, [2 * result for result in once])


@given(data=st.data())
def test_zero_rank_padding_changes_nothing(pair, data):
    case = data.draw(cases(dtype=torch.float32))
    inputs, dy = tensors(case, pair)
    rank = case.r + data.draw(aligned)
    padded = dict(inputs)
    padded["lora_a"] = torch.nn.functional.pad(inputs["lora_a"], (0, 0, 0, rank - case.r))
    padded["lora_b"] = torch.nn.functional.pad(inputs["lora_b"], (0, rank - case.r))
    assume(supports(replace(case, r=rank), *pair))
    y, dx, da, db = run(padded, dy, pair)
    assert not da[case.r :].any() and not db[:, case.r :].any(), "a gradient for zeros that meet zeros"
    assert_close((y, dx, da[: case.r], db[:, : case.r]), run(inputs, dy, pair))


@given(data=st.data())
def test_rows_do_not_know_each_other(pair, data):
    case = data.draw(cases(m=data.draw(st.integers(2, 70)), dtype=torch.float32))
    inputs, dy = tensors(case, pair)
    cut = data.draw(st.integers(1, case.m - 1))
    whole = run(inputs, dy, pair)
    parts = [run(inputs | {"x": inputs["x"][rows]}, dy[rows], pair) for rows in (slice(cut), slice(cut, None))]
    joined = [torch.cat([part[i] for part in parts]) for i in (0, 1)]
    if pair in ROW_BY_ROW and INTERPRETED:  # on a GPU the tile, and with it the order of sums, may depend on M
        assert torch.equal(joined[0], whole[0])
    assert_close(joined, whole[:2])
    assert_close([parts[0][i] + parts[1][i] for i in (2, 3)], whole[2:])


@given(data=st.data())
def test_layout_changes_nothing(pair, data):
    layout = st.sampled_from([name for name in testing.LAYOUTS if name != "expanded"])
    case = data.draw(cases(dtype=torch.float32))
    inputs, dy = tensors(case, pair)
    expected = run(inputs, dy, pair)
    scattered = replace(case, layouts={name: data.draw(layout) for name in ("x", "weight", "lora_a", "lora_b", "dy")})
    inputs, dy = tensors(scattered, pair)
    assert_close(run(inputs, dy, pair), expected)


@given(data=st.data())
def test_a_nan_stays_in_its_row(pair, data):
    """A NaN in x reaches its own row of y, and no other row; dx does not depend on x."""
    case = data.draw(cases(m=data.draw(st.integers(2, 70))))
    inputs, dy = tensors(case, pair)
    clean = run(inputs, dy, pair)
    row = data.draw(st.integers(0, case.m - 1))
    inputs["x"][row] = torch.nan
    y, dx, *_ = run(inputs, dy, pair)
    others = torch.arange(case.m) != row
    assert y[row].isnan().all() and torch.equal(y[others], clean[0][others])
    assert torch.equal(dx, clean[1])
