"""Tuned tables: what is measured decides, what is wrong is named once and decides nothing."""

import json
import logging
from dataclasses import asdict

import pytest
import torch

from lora_kernels import configs, dispatch
from lora_kernels.backends import triton
from lora_kernels.configs import Config, tuned
from lora_kernels.dispatch import Problem

GPU = "NVIDIA Test 9000"
TILE = Config(128, 128, 32, num_warps=8, num_stages=3)
GOAL = triton.Target(90, 132, True, GPU)


def figures(median):
    return {"median_us": median, "quartiles_us": [median - 1, median + 1], "samples_us": [median] * 3}


def entry(op="extended", **change):
    value = {"strategy": "one_launch"} if op in configs.STRATEGIES else {"config": asdict(TILE)}
    key = dict(op=op, m=8192, n=4096, k=4096, r=16, dtype="bfloat16", dropout=False, kn=False)
    measured = {"figures": figures(357.5), "heuristic": {"figures": figures(371.0)}, "commit": "0123456789abcdef"}
    return key | value | measured | change


@pytest.fixture
def shipped(tmp_path, monkeypatch):
    """Writes a table for GPU where the package would look, and forgets what was read before."""

    def forget():
        for cache in (tuned.table, triton._lookup, dispatch.choose):
            cache.cache_clear()

    def ship(*entries, **change):
        content = {"schema": tuned.SCHEMA, "device": GPU, "capability": 90, "entries": list(entries)} | change
        tuned.path_for(GPU).write_text(json.dumps(content))
        forget()
        return tuned.path_for(GPU)

    monkeypatch.setattr(tuned, "DIRECTORY", tmp_path)
    forget()
    yield ship
    forget()


def problem(gpu=GPU, **change):
    usual = dict(m=8192, n=4096, k=4096, r=16, dtype=torch.bfloat16, lora_dtype=torch.bfloat16, dropout=False,
                 device="cuda", capability=90, num_sms=132, tma=True, gpu=gpu)  # fmt: skip
    return Problem(**(usual | change))


def launched(m=8192, aligned=True, kn=False, dropout=False, goal=GOAL):
    return triton._lookup("extended", goal, torch.bfloat16, m, 4096, 4096, 16, dropout, aligned, kn)


def test_a_measured_tile_is_launched_and_no_other(shipped):
    usual = launched()
    shipped(entry())
    assert launched() == launched(m=4097) == TILE != usual
    others = (dict(m=4096), dict(aligned=False), dict(kn=True), dict(dropout=True), dict(goal=GOAL._replace(name="x")))
    assert TILE not in [launched(**change) for change in others]


def test_a_measured_strategy_runs_and_says_so(shipped):
    shipped(entry("lora_linear"))
    plan = dispatch.choose(problem())
    assert plan.strategy == "one_launch"
    assert plan.why == f"measured on {GPU}, 357.5 µs (the heuristics' choice took 371.0 µs), commit 0123456789"
    others = (dict(gpu=""), dict(n=8192), dict(dtype=torch.float16), dict(dropout=True), dict(distinct=8))
    for change in others:
        assert dispatch.choose(problem(**change)).why.startswith("modelled, not measured")


def test_a_measured_strategy_does_not_run_what_it_cannot(shipped):
    shipped(entry("lora_linear"))
    assert dispatch.choose(problem(tma=False)).strategy == "chained"
    shipped(entry("lora_linear_batched", m=64, strategy="extended"))
    assert dispatch.choose(problem(m=64, distinct=64)).strategy == "extended"


def test_explain_names_what_was_measured(shipped, monkeypatch):
    shipped(entry("lora_linear", strategy="extended"), entry())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(triton, "target", lambda device: GOAL)
    text = str(dispatch.explain(8192, 4096, 4096, 16))
    assert f"because  measured on {GPU}, 357.5 µs" in text
    assert "tile     shrink 64 × 128, 8 warps, 4 stages: modelled, not measured" in text
    assert f"tile     extended 128 × 128 × 32, 8 warps, 3 stages: measured on {GPU}, 357.5 µs" in text
    assert "measured on" not in str(dispatch.explain(8192, 4096, 4096, 16, capability=90))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (dict(op="gemm"), "op='gemm', expected one of"),
        (dict(op="lora_linear", strategy="fastest"), "strategy='fastest', expected one of one_launch"),
        (dict(config=asdict(TILE) | {"block_m": 48}), "block_m=48, expected a power of two"),
        (dict(config=asdict(TILE) | {"num_stages": 15}), "shared memory"),
        (dict(config=asdict(TILE) | {"clusters": 2}), "clusters, which this version does not know"),
        (dict(config={}), "block_m"),
        (dict(op="one_launch", r=128), "rank 128 > 64"),
        (dict(dtype="float32"), "dtype='float32'"),
        (dict(m=5000), "m=5000, expected a bucket"),
        (dict(n="4096"), "n='4096', expected a positive integer"),
        (dict(figures=None), "NoneType"),
    ],
)
def test_a_wrong_entry_is_named_once_and_left_out(shipped, caplog, change, reason):
    path = shipped({**entry(), **change}, entry(kn=True))
    with caplog.at_level(logging.ERROR, "lora_kernels"):
        assert launched(kn=True) == TILE  # the other entry holds
        assert launched() == configs.lookup("extended", 90, 2, 8192, 4096, 16, 132)
        launched(m=64)
    [message] = caplog.messages
    assert f"{path}: entry 0, op={change.get('op', 'extended')} m=" in message
    assert reason in message and "the heuristics decide" in message


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (dict(schema=tuned.SCHEMA + 1), f"schema {tuned.SCHEMA + 1}, expected {tuned.SCHEMA}"),
        (dict(device="NVIDIA Other"), f"measured on 'NVIDIA Other', but this is '{GPU}'"),
        (dict(entries=None), "schema"),
        (dict(dry_run=True), "a dry run"),
    ],
)
def test_a_wrong_file_is_named_once_and_left_out(shipped, caplog, change, reason):
    path = shipped(entry(), **change)
    with caplog.at_level(logging.ERROR, "lora_kernels"):
        assert launched() == configs.lookup("extended", 90, 2, 8192, 4096, 16, 132)
        launched(m=64)
    [message] = caplog.messages
    assert str(path) in message and reason in message


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", "null"])
def test_what_is_no_table_is_named(shipped, text):
    path = shipped()
    path.write_text(text)
    choices, [reason] = tuned.read(path)
    assert not choices and f"{path}: not a tuned table" in reason


def test_the_same_problem_twice_is_named(shipped):
    choices, [reason] = tuned.read(shipped(entry(), entry()))
    assert len(choices) == 1 and "entry 1" in reason and "the same problem" in reason


def test_buckets_and_files():
    assert [tuned.bucket(m) for m in (0, 1, 2, 3, 16, 17, 4097, 8192, 2**30)] == [1, 1, 2, 4, 16, 32, 8192, 8192, 2**20]
    assert tuned.path_for("NVIDIA H100 80GB HBM3").name == "nvidia-h100-80gb-hbm3.json"


def test_what_is_shipped_is_right():
    for path in tuned.DIRECTORY.glob("*.json"):
        assert not tuned.read(path).problems
        assert path == tuned.path_for(json.loads(path.read_text())["device"])
