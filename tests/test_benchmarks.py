"""The benchmarks on toy shapes: they run, they record what is needed, and time nothing that is wrong."""

import json

import pytest
import torch

from benchmarks import contenders, cpu, host, report, timing, train
from lora_kernels import BatchPlan, testing


@pytest.fixture(autouse=True)
def results(monkeypatch, tmp_path):
    monkeypatch.setattr(report, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(host, "CALLS", 2)
    shapes = (train.Shape(32, 64, 128, 8), train.Shape(32, 64, 128, 8, "float32"))
    monkeypatch.setattr(train, "CPU_SHAPES", shapes)
    monkeypatch.setattr(train, "GPU_SHAPES", shapes)

    def load(name):
        [path] = tmp_path.glob(f"results/*/{name}.json")
        return json.loads(path.read_text())

    return load


def test_train_records_every_contender_and_its_samples(results, capsys):
    train.main()
    record = results("train")
    assert record["versions"]["torch"] and record["device"]
    rows = {(row["shape"]["dtype"], row["pass"], row["contender"]): row for row in record["rows"]}
    names = [contenders.BASE, contenders.COMPOSED, *contenders.strategies(report.local_device())]
    timed = [row for row in rows.values() if row["pass"] != "none"]
    assert {name for *_, name in rows} == set(names)
    assert all(len(row["samples_us"]) == 25 and row["median_us"] > 0 for row in timed)
    assert all(row["ratio_to_base"] == 1.0 for row in timed if row["contender"] == contenders.BASE)
    assert all(row["gate"] == "passed" for row in timed if row["contender"] not in names[:2])
    assert "composed" in capsys.readouterr().out


def test_what_fails_its_gate_is_not_timed(results, monkeypatch):
    def over_budget(*_):
        raise AssertionError("y: over budget")

    monkeypatch.setattr(testing, "check", over_budget)
    train.main()
    rows = results("train")["rows"]
    judged = [row for row in rows if row["contender"] not in (contenders.BASE, contenders.COMPOSED)]
    assert judged and all(row["gate"] == "failed: y: over budget" and "samples_us" not in row for row in judged)


def test_host_records_every_path(results):
    host.main()
    rows = results("host")["rows"]
    assert {row["pass"] for row in rows} == {"inference", "forward + backward"}
    assert {"lora_linear", "registered operator", contenders.COMPOSED} <= {row["contender"] for row in rows}


def test_contenders_take_turns():
    turns = []
    timers = {name: lambda name=name: turns.append(name) or 1.0 for name in "abc"}
    samples = timing.take_turns(timers, repeats=5)
    rounds = [turns[i : i + 3] for i in range(0, len(turns), 3)]
    assert all(sorted(round_) == ["a", "b", "c"] for round_ in rounds)
    assert len({tuple(round_) for round_ in rounds}) > 1
    assert samples == {name: [1.0] * 5 for name in "abc"}


def test_summary_keeps_the_samples():
    assert timing.summary([4e-6, 1e-6, 2e-6, 3e-6, 5e-6]) == {
        "median_us": 3.0,
        "quartiles_us": [1.5, 4.5],
        "samples_us": [4.0, 1.0, 2.0, 3.0, 5.0],
    }


def test_cpu_records_every_contender_as_a_ratio(results, monkeypatch, capsys):
    monkeypatch.setattr(cpu, "SHAPES", (cpu.Shape(64), cpu.Shape(64, "float32", layers=2)))
    run = cpu.run
    monkeypatch.setattr(cpu, "run", lambda shape, repeats: run(shape, 3))
    cpu.main()
    rows = results("cpu")["rows"]
    names = {"cpu / chained", "eager / looped", "gather and bmm", contenders.BASE}
    assert names <= {row["contender"] for row in rows}
    assert {row["median_ratio"] for row in rows if row["contender"] == contenders.BASE} == {1.0}
    assert "Batched decoding" in capsys.readouterr().out


def test_the_gathered_contender_computes_the_same():
    x, (weight, adapters) = torch.randn(cpu.ROWS, 64), cpu._layer(64, torch.float32)
    plan = BatchPlan(torch.arange(cpu.ROWS, dtype=torch.int32))
    expected = cpu._ours(x, plan, "eager", "looped", weight, adapters)
    torch.testing.assert_close(cpu._gathered(x, plan.slots, weight, adapters), expected)
    torch.testing.assert_close(cpu._peft(x, weight, adapters)(), expected)
