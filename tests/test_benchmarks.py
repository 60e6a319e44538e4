"""The benchmarks at toy size: every suite and every provider runs, what is wrong is not timed, and a run goes on."""

import json
from dataclasses import replace
from functools import partial
from importlib import import_module

import pytest
import rivals
import torch

from benchmarks import __main__ as command_line
from benchmarks import ceilings, plots, providers, readme, report, runner, timing, trace
from benchmarks.problems import BACKWARD, BOTH, FORWARD, INFERENCE, Batched, Linear, roofline_seconds
from benchmarks.providers import BASE, Provider, eager
from benchmarks.suites import host, layer, memory, merge, prefill, qlora
from lora_kernels import dispatch, testing
from lora_kernels.roofline import Ceilings

CPU = torch.device("cpu")
SMALL = Linear(32, 64, 128, 8)
TOYS = {
    "train": (SMALL, replace(SMALL, dtype="float32", dropout=0.1)),
    "decode": (Batched(8, 64, 128, 4, (4, 8)),),
    "prefill": (prefill.Prefill(16, 64, 128, 4, (8,)),),
    "merge": (merge.Merge(1, 64, 128, 8),),
    "host": tuple(replace(problem, sets=1) for problem in host.problems("float32")),
    "memory": (memory.Saving(32, 64, 128, 8), memory.QuantizedSaving(32, 64, 128, 8)),
    "layer": (layer.Block(32, 192, 128, 128, 8),),
    "qlora": tuple(
        kind
        for name in ("nf4", "int8")
        for kind in (
            qlora.QuantizedLinear(32, 64, 128, 8, format=name),
            qlora.QuantizedBatched(8, 64, 128, 4, format=name),
        )
    ),
    "cpu": (Batched(8, 64, 128, 1, (8,), "float32"), replace(SMALL, sets=2)),
}


@pytest.fixture(autouse=True)
def small(monkeypatch, tmp_path):
    """Nothing is written outside `tmp_path`, nothing takes long, and the commit is what is there."""
    monkeypatch.setenv("TRITON_INTERPRET", "0")  # as where benchmarks run
    dispatch.choose.cache_clear()
    monkeypatch.setattr(report, "RESULTS", tmp_path / "benchmarks" / "results")
    monkeypatch.setattr(runner, "QUICK", 3)
    monkeypatch.setattr(runner, "FULL", 4)
    monkeypatch.setattr(host, "CALLS", 2)
    monkeypatch.setattr(ceilings, "GEMM", {"cpu": 64})
    monkeypatch.setattr(ceilings, "COPY_BYTES", {"cpu": 4096})
    origin = report.origin()
    monkeypatch.setattr(report, "origin", lambda: origin | {"uncommitted_changes": False})
    yield
    dispatch.choose.cache_clear()


@pytest.fixture
def uncompiled(monkeypatch):
    """Compiling costs seconds, once is enough."""
    monkeypatch.setattr(providers, "MODULES", tuple(name for name in providers.MODULES if name != "compiled"))


def toy(name):
    suite = import_module(f"benchmarks.suites.{name}").SUITE
    return replace(suite, problems={"cpu": TOYS[name]}, quick={"cpu": len(TOYS[name])})


def own(**operations):
    return Provider("mine", **operations)


@pytest.mark.parametrize("name", TOYS)
def test_every_suite_runs(name, uncompiled):
    record = runner.run(toy(name), CPU)
    rows = record["rows"]
    assert {"device", "versions", "commit", "ceilings", "not_run", "threads"} <= record.keys()
    assert {row["problem"] for row in rows} == {str(problem) for problem in TOYS[name]}
    assert not [row for row in rows if row["gate"].startswith(("raised", "failed"))]
    figures = [row for row in rows if "peak_mib" in row]
    assert {"ours", "base only"} <= {row["provider"].split(":")[0] for row in figures}
    if name == "memory":
        assert all(row["saved_mib"] > 0 for row in figures if row["provider"] != BASE)
        scratch = {
            ("nf4" in row["problem"], row["scratch_mib"]) for row in figures if row["provider"].startswith("ours")
        }
        assert scratch == {(False, 0.0), (True, round(64 * 128 * 2 / 2**20, 3))}
        return
    assert all(len(row["samples_us"]) == 3 and row["launches"] is None and row["peak_mib"] >= 0 for row in figures)
    assert {row["ratio_to_base"] for row in figures if row["provider"] == BASE} == {1.0}
    for row in figures:
        assert row["of_roofline"] == pytest.approx(row["roofline_us"] / row["median_us"], abs=1e-3)


def test_every_provider_passes_its_gate(uncompiled):
    found, missing = providers.load(CPU)
    assert set(missing) == {"cublas", "vllm", "sglang", "nemo", "axolotl", "unsloth"} - _importable()
    for problem in (replace(SMALL, dtype="float32"), SMALL, Batched(8, 64, 128, 4, (4, 8)), Batched(8, 64, 128, 1)):
        verdicts = {p.name: runner.gate(problem, p, CPU).words for p in found if getattr(p, problem.operation)}
        assert {words for words in verdicts.values() if not words.startswith("cannot run")} == {
            "passed", "is the yardstick"
        }, verdicts  # fmt: skip


def _importable():
    from importlib.util import find_spec

    return {name for name in ("axolotl", "unsloth") if find_spec(name)}


def test_torch_compile_is_a_provider(monkeypatch):
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))  # Inductor's C++ takes seconds
    [provider] = import_module("benchmarks.providers.compiled").providers(CPU)
    assert runner.gate(replace(SMALL, dtype="float32"), provider, CPU).words == "passed"


@pytest.mark.parametrize("name", rivals.PACKAGES)
def test_a_rival_is_called_as_its_interface_wants(name, monkeypatch):
    rivals.install(monkeypatch, name)
    module = import_module(f"benchmarks.providers.{name}")
    monkeypatch.setattr(module, "needs_gpu", lambda device: None, raising=False)
    for provider in module.providers(CPU):
        problem = SMALL if provider.linear else Batched(40, 64, 128, 3, (8,))
        assert runner.gate(problem, provider, CPU).words == "passed"


def test_what_fails_its_gate_is_not_timed(monkeypatch, uncompiled):
    def over_budget(*_):
        raise AssertionError("y: over budget")

    monkeypatch.setattr(testing, "check", over_budget)
    rows = runner.run(replace(toy("train"), problems={"cpu": (SMALL,)}), CPU)["rows"]
    judged = [row for row in rows if row["provider"] == "ours: eager / chained"]
    assert judged and all(
        row["gate"] == "failed: AssertionError: y: over budget" and "median_us" not in row for row in judged
    )


class _DoubledDb(torch.autograd.Function):
    @staticmethod
    def forward(ctx, b):
        return b.clone()

    @staticmethod
    def backward(ctx, db):
        return 2 * db


def test_the_gate_sees_a_wrong_gradient():
    def doubled(problem, t):
        return eager.linear(problem, t._replace(lora_b=_DoubledDb.apply(t.lora_b)))[0], (t.lora_a, t.lora_b)

    verdict = runner.gate(SMALL, own(linear=doubled), CPU)
    assert verdict.words.startswith("failed: ") and verdict.error > runner.SLACK


def test_the_gate_sees_a_wrong_adapter():
    def neighbours(problem, t):
        [provider] = import_module("benchmarks.providers.gathered").providers(CPU)
        return provider.batched(problem, t._replace(slots=t.slots.roll(1)))

    assert runner.gate(Batched(8, 64, 128, 4), own(batched=neighbours), CPU).words.startswith("failed: ")


def test_a_provider_that_raises_is_a_line(uncompiled):
    def broken(problem, tensors):
        def step(x):
            raise RuntimeError("no such kernel\nand more")

        return step, ()

    suite = replace(toy("train"), problems={"cpu": (SMALL,)}, more=(own(linear=broken),))
    rows = runner.run(suite, CPU)["rows"]
    assert {row["gate"] for row in rows if row["provider"] == "mine"} == {"raised: RuntimeError: no such kernel"}
    assert [row for row in rows if row["provider"] != "mine" and "median_us" in row]


def test_a_provider_that_cannot_be_imported_is_a_line(monkeypatch):
    def missing(name):
        raise ImportError(f"{name} wants another torch")

    monkeypatch.setattr(providers, "import_module", missing)
    found, reasons = providers.load(CPU, without=("vllm",))
    assert not found and reasons["vllm"] == "left out on request"
    assert reasons["peft"] == "ImportError: benchmarks.providers.peft wants another torch"


@pytest.fixture
def measured(monkeypatch, uncompiled):
    """The cells that were measured since the last call."""
    cells, measure = [], runner.timed_rows
    monkeypatch.setattr(
        runner,
        "timed_rows",
        lambda suite, problem, what, *rest: cells.append(what) or measure(suite, problem, what, *rest),
    )

    def since():
        seen = list(cells)
        cells.clear()
        return seen

    return since


def test_a_run_goes_on_where_it_stopped(measured, monkeypatch):
    suite = replace(toy("train"), problems={"cpu": (SMALL,)})
    asked = iter((False, True))
    with pytest.raises(runner.Stopped, match=r"train: no time for 32 × 64 × 128.*backward"):
        runner.run(suite, CPU, stop=lambda: next(asked))
    first = report.read("train", CPU)["rows"]
    assert measured() == [FORWARD]
    rows = runner.run(suite, CPU)["rows"]
    assert measured() == [BACKWARD, BOTH]
    assert rows[: len(first)] == first
    runner.run(suite, CPU)
    assert measured() == []
    runner.run(suite, CPU, full=True)  # more rounds than there are
    assert measured() == [FORWARD, BACKWARD, BOTH]
    runner.run(suite, CPU)
    assert measured() == []
    runner.run(suite, CPU, fresh=True)
    assert measured() == [FORWARD, BACKWARD, BOTH]
    origin = report.origin()
    dirty = {"uncommitted_changes": True}  # twice: then not even the run before tells what ran
    for change in ({"commit": "another"}, {"versions": {"torch": "0"}}, dirty, dirty):
        monkeypatch.setattr(report, "origin", lambda change=change: origin | change)
        runner.run(suite, CPU)
        assert measured() == [FORWARD, BACKWARD, BOTH]


def test_the_least_cost_of_a_layer():
    # x 2·4, W 3·4, y 2·3; A 1·4, B 3·1; backward also writes dx and reads h, and writes dA and dB.
    problem = Linear(2, 3, 4, 1, "float32")
    assert problem.cost(FORWARD, base=True) == (4 * (8 + 12 + 6), 2 * 24)
    assert problem.cost(FORWARD, base=False) == (4 * (26 + 7), 2 * 24 + 2 * 2 * 7)
    assert problem.cost(BACKWARD, base=False) == (4 * (26 + 8 + 2 + 2 * 7), 2 * 24 + 4 * 2 * 7)
    assert problem.cost(BOTH, base=True) == (4 * 52, 4 * 24)
    assert roofline_seconds(problem, FORWARD, True, Ceilings(flops=1.0, bandwidth=1.0)) == 104.0
    assert roofline_seconds(problem, FORWARD, True, Ceilings(flops=0.1, bandwidth=1.0)) == 480.0


def test_the_least_cost_of_a_batch():
    # Ranks 1, 2 and 1 of three adapters; rows use them in turn, so four rows have ranks 1, 2, 1, 1.
    problem = Batched(4, 3, 5, 3, (1, 2), "float32")
    base = 4 * 5 + 3 * 5 + 4 * 3
    assert problem.cost(INFERENCE, base=True) == (4 * base, 2 * 60)
    assert problem.cost(INFERENCE, base=False) == (4 * (base + 4 * 8), 2 * 60 + 2 * 5 * 8)
    tensors = problem.tensors(CPU)
    assert tensors.ranks.tolist() == [1, 2, 1] and tensors.slots.tolist() == [0, 1, 2, 0]
    assert not tensors.a[0, 1].any() and not tensors.b[2, :, 1].any() and tensors.a[1, 1].any()


def test_peak_and_saved_bytes_are_of_the_step_alone():
    kept = torch.randn(1000, requires_grad=True)
    assert trace.costs(lambda: [torch.ones(1000), torch.ones(1000).sum()], CPU).peak in range(8000, 8200)
    assert trace.saved_bytes(lambda: kept * kept) == 4000
    assert trace.saved_bytes(lambda: kept * kept, frozen=(kept,)) == 0


def test_providers_take_turns():
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


def test_the_command_prints_tables_and_draws_plots(monkeypatch, tmp_path, capsys, uncompiled):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(report, "ROOT", tmp_path)
    monkeypatch.setattr(plots, "OUT", tmp_path / "out" / "bench")
    for name in ("decode", "memory", "cpu"):
        suite = toy(name) if name != "decode" else import_module("benchmarks.suites.decode").SUITE
        monkeypatch.setattr(import_module(f"benchmarks.suites.{name}"), "SUITE", suite)
    monkeypatch.setattr(command_line, "local_device", lambda: CPU)
    command_line.main(["decode", "memory", "cpu"])
    out = capsys.readouterr().out
    assert "Decoding, one layer: not run, it needs a GPU" in out
    assert "no figure: vllm: needs a GPU" in out and "PEFT adapter_names" in out and "saved MiB" in out
    drawn = {path.name for path in (tmp_path / "out" / "bench").glob("*/*.png")}
    assert drawn == {"overhead_cpu.png", "adapters_cpu.png", "roofline.png", "memory.png"}
    assert all(name in out for name in drawn)


def test_an_unknown_suite_is_refused(capsys):
    with pytest.raises(SystemExit):
        command_line.main(["nonsense"])
    assert "no suite nonsense; there are train, decode" in capsys.readouterr().err


def test_the_headline_is_unmeasured_without_files(tmp_path):
    report.RESULTS.mkdir(parents=True)
    assert readme.headline().count("unmeasured") == 3 * len(readme.GPU + readme.CPU)


def test_the_headline_takes_the_best_of_each(monkeypatch):
    (suite, problem, what, _), *_ = readme.CPU
    ratios = {BASE: 1.0, "ours: a": 1.5, "ours: b": 1.25, "PEFT": 2.0, "PEFT, as base": 1.75, "rival": 1.125}
    rows = [{"problem": str(problem), "pass": what, "provider": name, "median_us": 1.0, "ratio_to_base": ratio}
            for name, ratio in ratios.items()]  # fmt: skip
    report.write(suite, "", rows, CPU)
    line = next(line for line in readme.headline().splitlines() if "1.25" in line)
    assert [cell.strip() for cell in line.split("|")[3:6]] == ["1.25 (b)", "1.75 (as base)", "**1.12 (rival)**"]


def test_the_plots_are_up_to_date(monkeypatch):
    monkeypatch.undo()
    for name, record in plots.shown().items():
        image = (report.ROOT / "docs" / "images" / f"{name}.png").read_bytes()
        assert plots.digest(record).encode() in image, f"{name}: run make readme"


def test_results_name_their_device_and_commit():
    for path in (report.ROOT / "benchmarks" / "results").glob("*/*.json"):
        record = json.loads(path.read_text())
        assert record["commit"] and record["versions"]["torch"], path.name
