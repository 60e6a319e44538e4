"""`bench --compare`: what is faster, what slower, and what cannot be compared."""

import json

import pytest

from benchmarks import __main__ as bench
from benchmarks import compare, timing


def row(provider, median, spread=0.5, problem="a layer"):
    figures = timing.summary([(median + spread * step) * 1e-6 for step in (-2, -1, 0, 1, 2)])
    return {"problem": problem, "pass": "forward", "provider": provider, "gate": "passed", **figures}


@pytest.fixture
def files(tmp_path):
    def write(name, *rows, **change):
        record = {"benchmark": "train", "device": "a GPU", "threads": 1, "method": "replays", "rows": rows} | change
        path = tmp_path / name
        path.write_text(json.dumps(record))
        return str(path)

    return write


def run(*arguments):
    return bench.main(["--compare", *arguments])


def test_a_regression_beyond_noise_fails(files, capsys):
    before = files("a.json", row("ours", 100), row("rival", 100), row("noisy", 100, 20))
    after = files("b.json", row("ours", 110), row("rival", 80), row("noisy", 110, 20))
    assert run(before, after) == 1
    out = capsys.readouterr().out
    assert "1 slower, 1 faster, 1 same of 3 cells" in out
    lines = {name: line for line in out.splitlines() for name in ("ours", "rival", "noisy") if f", {name}" in line}
    assert "1.100" in lines["ours"] and "slower" in lines["ours"]
    assert "0.800" in lines["rival"] and "faster" in lines["rival"]
    assert "same" in lines["noisy"]
    assert run(after, before) == 1  # the rival's


def test_improvements_and_new_cells_pass(files, capsys):
    before, after = files("a.json", row("ours", 100)), files("b.json", row("ours", 90), row("new", 10))
    assert run(before, after) == 0
    assert "only in the second: a layer, forward, new" in capsys.readouterr().out


def test_a_cell_that_lost_its_figure_fails(files, capsys):
    lost = {"problem": "a layer", "pass": "forward", "provider": "ours", "gate": "failed: y"}
    assert run(files("a.json", row("ours", 100), row("x", 1)), files("b.json", lost, row("x", 1))) == 1
    assert "only in the first: a layer, forward, ours" in capsys.readouterr().out


@pytest.mark.parametrize(
    "change", [dict(device="another"), dict(benchmark="decode"), dict(method="other"), dict(threads=2)]
)
def test_what_differs_in_more_than_figures_is_refused_unless_told(files, capsys, change):
    before, after = files("a.json", row("ours", 100)), files("b.json", row("ours", 100), **change)
    assert run(before, after) == 2
    assert next(iter(change)) in capsys.readouterr().out
    assert run(before, after, "--anyway") == 0


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"rows": [{"median_us": 1.0}]}', '{"rows": [1]}'])
def test_what_is_no_result_is_named(files, tmp_path, capsys, text):
    (tmp_path / "b.json").write_text(text)
    assert run(files("a.json", row("ours", 100)), str(tmp_path / "b.json")) == 2
    assert f"{tmp_path / 'b.json'} is no result" in capsys.readouterr().out


def test_nothing_in_common_and_a_missing_file(files, tmp_path, capsys):
    before = files("a.json", row("ours", 100))
    assert run(before, files("b.json", row("ours", 100, problem="another"))) == 2
    assert "no timed row in common" in capsys.readouterr().out
    assert run(before, str(tmp_path / "none.json")) == 2


def test_committed_results_compare_with_themselves():
    from benchmarks.report import RESULTS

    timed = [path for path in sorted(RESULTS.glob("*/train.json")) if "problem" in path.read_text()]
    for path in timed:
        assert compare.main(str(path), str(path)) == 0
