"""What dispatch chooses, for GPUs that are not here, and what it says."""

import logging
from unittest import mock

import pytest
import torch
from batches import Batch

from lora_kernels import BatchPlan, dispatch, lora_linear_batched, roofline
from lora_kernels.backends import BATCHED_BACKENDS, triton
from lora_kernels.dispatch import Problem, choose, explain

H200 = roofline.Ceilings(788e12, 4.3e12)


def problem(
    m=8192, n=4096, k=4096, r=16, dtype=torch.bfloat16, dropout=False, capability=90, tma=True, tf32=False, distinct=0
):  # fmt: skip
    return Problem(m, n, k, r, dtype, dtype, dropout, "cuda", capability, 132, tma, tf32, distinct)


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
    ("change", "strategy"),
    [
        (dict(m=1, distinct=1), "one_launch"),
        (dict(m=64), "one_launch"),
        (dict(m=256, distinct=256), "one_launch"),
        (dict(m=64, capability=80, tma=False), "one_launch"),
        (dict(m=64, capability=100), "one_launch"),
        (dict(), "extended"),
        (dict(m=257), "extended"),
        (dict(m=64, dtype=torch.float32), "chained"),
        (dict(m=64, dtype=torch.float32, tf32=True), "extended"),
        (dict(m=64, tma=False), "chained"),
    ],
)
def test_batched_default_strategy(change, strategy):
    plan = choose(problem(**dict(distinct=8) | change))
    assert (plan.backend, plan.strategy) == (BATCHED_BACKENDS["triton"], strategy)


@pytest.mark.parametrize(
    ("change", "strategy", "reason"),
    [
        (dict(dropout=True), "one_launch", "dropout"),
        (dict(dropout=True), "single_pass", "dropout"),
        (dict(r=65), "single_pass", "rank 65 > 64"),
        (dict(tma=False), "one_launch", "16-byte"),
        (dict(dtype=torch.float64), "extended", "float64"),
        (dict(capability=75), "extended", "expected 8.0 or newer"),
        (dict(m=257, distinct=8), "one_launch", "no tile for 257 rows, torch.bfloat16, on capability 90"),
        (dict(m=16, distinct=8, dtype=torch.float32), "one_launch", "no tile for 16 rows, torch.float32"),
    ],
)
def test_what_cannot_run_is_refused_with_the_reason(change, strategy, reason):
    with pytest.raises(NotImplementedError, match=reason):
        choose(problem(**change), "triton", strategy)


def test_unknown_names():
    with pytest.raises(ValueError, match="backend: got 'cuda'.*triton, cpu, eager"):
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
    monkeypatch.setitem(BATCHED_BACKENDS, "of_batches", None)
    monkeypatch.setenv("LORA_KERNELS_BACKEND", "of_batches")
    dispatch.plan_for(x, weight, lora_a, lora_b, 0.0)
    with pytest.raises(ValueError, match="backend: got 'of_batches'"):
        dispatch.plan_for(x, weight, lora_a, lora_b, 0.0, backend="of_batches")


def test_environment_overrides_batches_and_explanations(monkeypatch):
    batch = Batch()
    operands = batch.x, batch.weight, batch.adapters, BatchPlan(batch.slots)
    monkeypatch.setenv("LORA_KERNELS_BACKEND", "eager")
    assert dispatch.batched_plan_for(*operands).backend is BATCHED_BACKENDS["eager"]
    assert "runs     eager / looped" in str(explain(64, 4096, 4096, 16, adapters=8, capability=90))
    assert "runs     triton / one_launch" in str(
        explain(64, 4096, 4096, 16, adapters=8, capability=90, backend="triton")
    )
    monkeypatch.setenv("LORA_KERNELS_BACKEND", "nonsense")
    assert dispatch.batched_plan_for(*operands, backend="eager").strategy == "looped"
    with pytest.raises(ValueError, match="nonsense"):
        lora_linear_batched(*operands)


def test_a_batch_counts_its_adapters_and_ranks():
    """All slots there are, unless there are fewer rows; the largest rank of all slices."""
    for m, slots, per_row, distinct in ((40, 5, 1, 5), (3, 5, 1, 3), (3, 5, 3, 5), (0, 5, 1, 1)):
        batch = Batch(m=m, widths=(8, 8), k=16, slots=slots, per_row=per_row)
        with mock.patch.object(dispatch, "choose") as chosen:
            dispatch.batched_plan_for(batch.x, batch.weight, batch.adapters, BatchPlan(batch.slots))
        asked = chosen.call_args.args[0]
        assert (asked.distinct, asked.r, asked.m, asked.n, asked.k) == (distinct, 33, m, 16, 16)


def test_a_fast_path_that_does_not_apply_is_said_once(caplog):
    dispatch._say_once.cache_clear()
    choose.cache_clear()
    with caplog.at_level(logging.INFO, logger="lora_kernels"):
        choose(problem(m=100, tma=False))
        choose(problem(m=200, tma=False))
        choose(problem(m=100, dtype=torch.float64))
        choose(problem(m=100, tma=False, distinct=8))
        choose(problem(m=200, tma=False, distinct=8))
    messages = [record.message for record in caplog.records]
    assert sum("lora_b or y are not on 16-byte boundaries, so no TMA" in message for message in messages) == 1
    assert sum("x, weight or y are not on 16-byte boundaries, so no TMA" in message for message in messages) == 1
    assert sum("float64 has no Triton kernel" in message for message in messages) == 1
    assert sum("cpu: x is on cuda, not the CPU" in message for message in messages) == 1
    assert len(messages) == 4


def test_explanation_says_what_why_and_that_nothing_is_measured():
    text = str(explain(8192, 4096, 4096, 16, capability=90))
    assert "runs     triton / extended" in text
    assert "none of them is measured" in text
    for strategy in ("one_launch", "extended", "single_pass", "chained", "base only"):
        assert strategy in text
    assert "dropout > 0" in str(explain(8192, 4096, 4096, 16, capability=90, dropout=True))
    assert "one_launch" not in str(explain(8192, 4096, 4096, 16, capability=80))


def test_explanation_of_a_batch_has_all_strategies_and_what_cannot_run():
    text = str(explain(64, 4096, 4096, 16, capability=90, adapters=8))
    assert "adapters = 8" in text and "runs     triton / one_launch" in text and "(" not in text.split("flops")[-1]
    text = str(explain(8192, 4096, 4096, 16, capability=90, adapters=8))
    lines = {line.split()[0]: line for line in text.splitlines()}
    assert lines.keys() >= {"one_launch", "extended", "chained"} and "single_pass" not in lines
    assert "no tile for 8192 rows" in lines["one_launch"] and "(" not in lines["extended"] + lines["chained"]
    assert explain(4, 4096, 4096, 16, adapters=100).problem.distinct == 4  # no more than rows
    assert explain(64, 4096, 4096, 31, adapters=8).plan.strategy == "one_launch"  # a rank need not be on 16 bytes
    assert explain(64, 4095, 4096, 16, adapters=8).plan.strategy == "chained"


def test_explanation_of_a_batch_refuses_what_makes_no_sense():
    for adapters in (0, -1):
        with pytest.raises(ValueError, match=f"adapters: got {adapters}, expected at least 1"):
            explain(64, 4096, 4096, 16, adapters=adapters)
    with pytest.raises(ValueError, match="dropout: got True"):
        explain(64, 4096, 4096, 16, adapters=1, dropout=True)


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


def test_roofline_of_a_decode_step():
    """64 rows, 4096², 8 adapters of rank 16: everything is bound by bytes."""
    m, n, k, r, distinct = 64, 4096, 4096, 16, 8
    base = roofline.base_cost(m, n, k, 2, H200)
    a, b, h = 2 * distinct * r * k, 2 * distinct * r * n, 4 * m * r
    cost = {s: roofline.batched_cost(s, m, n, k, r, distinct, 2, H200) for s in ("one_launch", "extended", "chained")}
    assert cost["one_launch"].bytes == base.bytes + a + b + 2 * h  # x and y once
    assert cost["extended"].bytes == base.bytes + a + b + 2 * h + 2 * m * k  # x twice
    assert cost["chained"].bytes == base.bytes + a + b + 2 * h + 2 * m * k + 4 * m * n  # and y three times
    for strategy, launches in (("one_launch", 1), ("extended", 2), ("chained", 2)):
        assert cost[strategy].seconds == pytest.approx(
            cost[strategy].bytes / H200.bandwidth + launches * roofline.LAUNCH
        )


@pytest.mark.parametrize("distinct", [1, 8, 64])
def test_what_runs_side_by_side_shares_the_bandwidth(distinct):
    """No strategy is faster than all of its bytes."""
    for strategy in ("one_launch", "extended", "chained"):
        cost = roofline.batched_cost(strategy, 64, 4096, 4096, 64, distinct, 2, H200)
        assert cost.seconds >= cost.bytes / H200.bandwidth


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
