"""What dispatch chooses, for GPUs that are not here, and what it says."""

import logging

import pytest
import torch

from lora_kernels import dispatch, roofline
from lora_kernels.backends import triton
from lora_kernels.dispatch import Problem, choose, explain

H200 = roofline.Ceilings(788e12, 4.3e12)


def problem(m=8192, n=4096, k=4096, r=16, dtype=torch.bfloat16, dropout=False, capability=90, tma=True, tf32=False):
    return Problem(m, n, k, r, dtype, dtype, dropout, "cuda", capability, 132, tma, tf32)


@pytest.fixture(autouse=True)
def no_override(monkeypatch):
    monkeypatch.delenv("LORA_KERNELS_BACKEND", raising=False)


@pytest.mark.parametrize(
    ("change", "strategy"),
    [
        (dict(), "extended"),
        (dict(n=14336), "extended"),
        (dict(n=1024), "single_pass"),
        (dict(m=16), "single_pass"),
        (dict(m=16, r=128), "extended"),
        (dict(n=1024, dropout=True), "extended"),
        (dict(tma=False), "chained"),
        (dict(tma=False, capability=80), "extended"),
        (dict(dtype=torch.float32), "chained"),
        (dict(dtype=torch.float32, tf32=True), "extended"),
    ],
)
def test_default_strategy(change, strategy):
    assert choose(problem(**change)).strategy == strategy


def test_one_launch_runs_on_request():
    assert choose(problem(), strategy="one_launch").strategy == "one_launch"


@pytest.mark.parametrize(
    ("change", "strategy", "reason"),
    [
        (dict(dropout=True), "one_launch", "dropout"),
        (dict(dropout=True), "single_pass", "dropout"),
        (dict(r=65), "single_pass", "rank 65 > 64"),
        (dict(tma=False), "one_launch", "16-byte"),
        (dict(dtype=torch.float64), "extended", "float64"),
        (dict(capability=75), "extended", "expected 8.0 or newer"),
    ],
)
def test_what_cannot_run_is_refused_with_the_reason(change, strategy, reason):
    with pytest.raises(NotImplementedError, match=reason):
        choose(problem(**change), "triton", strategy)


def test_unknown_names():
    with pytest.raises(ValueError, match="backend: got 'cuda'.*triton, eager"):
        choose(problem(), backend="cuda")
    with pytest.raises(ValueError, match="strategy: got 'fast'.*chained, extended"):
        choose(problem(), strategy="fast")


def test_environment_overrides_and_argument_wins(monkeypatch):
    x, weight, lora_a, lora_b = torch.ones(4, 8), torch.ones(6, 8), torch.ones(2, 8), torch.ones(6, 2)
    monkeypatch.setenv("LORA_KERNELS_BACKEND", "eager")
    assert dispatch.plan_for(x, weight, lora_a, lora_b, 0.0).backend.__name__.endswith("eager")
    monkeypatch.setenv("LORA_KERNELS_BACKEND", "nonsense")
    assert dispatch.plan_for(x, weight, lora_a, lora_b, 0.0, backend="eager").strategy == "chained"
    with pytest.raises(ValueError, match="nonsense"):
        dispatch.plan_for(x, weight, lora_a, lora_b, 0.0)


def test_a_fast_path_that_does_not_apply_is_said_once(caplog):
    dispatch._say_once.cache_clear()
    choose.cache_clear()
    with caplog.at_level(logging.INFO, logger="lora_kernels"):
        choose(problem(m=100, tma=False))
        choose(problem(m=200, tma=False))
        choose(problem(m=100, dtype=torch.float64))
    messages = [record.message for record in caplog.records]
    assert sum("no TMA" in message for message in messages) == 1
    assert sum("float64 has no Triton kernel" in message for message in messages) == 1
    assert len(messages) == 2


def test_explanation_says_what_why_and_that_nothing_is_measured():
    text = str(explain(8192, 4096, 4096, 16, capability=90))
    assert "runs     triton / extended" in text
    assert "none of them is measured" in text
    for strategy in ("one_launch", "extended", "single_pass", "chained", "base only"):
        assert strategy in text
    assert "dropout > 0" in str(explain(8192, 4096, 4096, 16, capability=90, dropout=True))
    assert "one_launch" not in str(explain(8192, 4096, 4096, 16, capability=80))


def test_roofline_reproduces_the_published_arithmetic():
    """8192×4096², r = 16 on an H200: the base is bound by flops, the shrink by bytes."""
    shape = (8192, 4096, 4096)
    base = roofline.base_cost(*shape, 2, H200)
    assert base.seconds - roofline.LAUNCH == pytest.approx(2 * 8192 * 4096**2 / 788e12)
    extended = roofline.forward_cost("extended", *shape, 16, 2, H200)
    assert extended.flops == 2 * 8192 * (4096**2 + 16 * 4096 + 16 * 4096)
    assert extended.seconds - base.seconds == pytest.approx(15.6e-6 + 1.4e-6 + roofline.LAUNCH, rel=0.05)
    chained = roofline.forward_cost("chained", *shape, 16, 2, H200)
    assert chained.seconds - extended.seconds == pytest.approx(15.6e-6 - 1.4e-6 + roofline.LAUNCH, rel=0.05)


def test_single_pass_wins_only_below_the_crossover():
    """N* = (P / BW) BN / r (docs/kernels.md): 2,932 for r = 16 and 256-wide tiles."""

    def better(n):
        shape = (8192, n, 8192, 16, 2, H200)
        return roofline.forward_cost("single_pass", *shape).seconds < roofline.forward_cost("extended", *shape).seconds

    assert better(2560)
    assert not better(4096)


def test_tf32_follows_torch():
    before = torch.get_float32_matmul_precision()
    try:
        for precision, allowed in (("high", True), ("highest", False)):
            torch.set_float32_matmul_precision(precision)
            assert triton.tf32_allowed() is allowed
    finally:
        torch.set_float32_matmul_precision(before)
