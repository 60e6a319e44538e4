"""The half-hour report: its budget on a fake clock, stages that hang or crash, resuming, and the page."""

import json
import os
import sys
import tarfile
import time

import pytest
from conftest import INTERPRETED

from benchmarks import gpu_page, gpu_report, questions, timing
from benchmarks.gpu_report import CRASHED, DONE, HUNG, WENT_ON
from benchmarks.questions import STAGES, Room, Stage


def nothing(room):
    """Nothing."""


THREE = tuple(Stage(name, nothing, 100) for name in ("first", "second", "third"))


class Machine:
    """Runs stages on a clock of its own: `plan` has (seconds, status) for every run of a stage, in their order."""

    def __init__(self, **plan):
        self.now, self.ran = 0.0, []
        self.plan = {name: list(runs) for name, runs in plan.items()}

    def clock(self):
        return self.now

    def execute(self, command, seconds, log, environ):
        name = command[command.index("--stage") + 1]
        wanted, status = self.plan.get(name, [(10, DONE)]).pop(0) if self.plan.get(name) else (10, DONE)
        if wanted > seconds:
            wanted, status = seconds, status if status == WENT_ON else HUNG
        self.now += wanted
        self.ran.append((name, round(seconds)))
        return status, f"the log of {name}"

    def run(self, out, seconds, stages=THREE):
        state = gpu_report.run(stages, out, seconds, True, self.execute, self.clock, say=lambda *_: None)
        return {name: known["status"] for name, known in state.items()}


def test_every_stage_runs_once_within_its_share(tmp_path):
    machine = Machine()
    assert machine.run(tmp_path, 1000) == dict.fromkeys(("first", "second", "third"), DONE)
    assert machine.ran == [("first", 100), ("second", 100), ("third", 100)]


def test_a_hang_or_a_crash_costs_only_its_stage(tmp_path):
    machine = Machine(first=[(10**6, DONE)] * 9, second=[(1, CRASHED)] * 9)
    assert machine.run(tmp_path, 350) == {"first": HUNG, "second": CRASHED, "third": DONE}
    assert [name for name, _ in machine.ran] == ["first", "second", "third", "first", "second"]  # once more, at the end
    assert machine.now <= 350
    page = (tmp_path / "report.md").read_text()
    assert f"## Log of first: {HUNG}" in page and "the log of second" in page
    assert machine.run(tmp_path, 1000)["first"] == HUNG  # and no third time
    assert len(machine.ran) == 5


def test_what_has_more_to_do_gets_what_is_left(tmp_path):
    machine = Machine(second=[(100, WENT_ON), (30, DONE)])
    assert set(machine.run(tmp_path, 1000).values()) == {DONE}
    assert machine.ran[1] == ("second", 100) and machine.ran[3] == ("second", 1000 - 120)


def test_an_exhausted_budget_stops_and_another_run_goes_on(tmp_path):
    machine = Machine(first=[(90, DONE)], second=[(100, WENT_ON), (40, DONE)])
    assert machine.run(tmp_path, 150) == {"first": DONE, "second": WENT_ON}
    assert machine.ran == [("first", 100), ("second", 60)] and machine.now <= 150
    assert "third | Nothing | not run" in (tmp_path / "report.md").read_text()
    machine.now = 10**6
    assert machine.run(tmp_path, 150) == dict.fromkeys(("first", "second", "third"), DONE)
    assert [name for name, _ in machine.ran] == ["first", "second", "second", "third"]
    state = gpu_report.read_state(tmp_path)
    assert state["second"]["runs"] == 2 and state["second"]["seconds"] == 100.0


def test_three_runs_of_nine_minutes_do_the_plan(tmp_path):
    full = {stage.name: [(stage.seconds, DONE)] for stage in STAGES}
    machine = Machine(**full)
    for _ in range(3):
        before = machine.now
        state = machine.run(tmp_path, 9 * 60, STAGES)
        assert machine.now - before <= 9 * 60
    assert len(state) == len(STAGES) and set(state.values()) <= {DONE, HUNG}
    assert sum(stage.seconds for stage in STAGES) <= 25 * 60


@pytest.mark.parametrize(
    ("program", "expected"),
    [
        ("print('fine')", DONE),
        ("raise SystemExit(3)", WENT_ON),
        ("raise RuntimeError('no')", CRASHED),
        ("import os; os.abort()", CRASHED),
        ("import time; print('begun', flush=True); time.sleep(60)", HUNG),
        ("import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)", HUNG),
    ],
)
def test_a_real_process_ends_at_its_deadline(tmp_path, program, expected):
    start = time.monotonic()
    seconds = 1.0 if expected == HUNG else 20.0
    status, log = gpu_report._execute([sys.executable, "-c", program], seconds, tmp_path / "log", dict(os.environ))
    assert status == expected
    assert time.monotonic() - start < 15
    if "begun" in program:
        assert "begun" in log


def test_a_hung_stage_takes_its_children_with_it(tmp_path):
    sleep = "[sys.executable, '-c', 'import time; time.sleep(60)']"
    program = (
        f"import subprocess, sys, time; child = subprocess.Popen({sleep}); "
        f"open({str(tmp_path / 'pid')!r}, 'w').write(str(child.pid)); time.sleep(60)"
    )
    gpu_report._execute([sys.executable, "-c", program], 2.0, tmp_path / "log", dict(os.environ))
    pid = int((tmp_path / "pid").read_text())
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        try:
            with open(f"/proc/{pid}/stat") as file:
                if file.read().rpartition(")")[2].split()[0] == "Z":
                    return
        except FileNotFoundError:
            return
        time.sleep(0.05)
    raise AssertionError("the child is alive")


def test_results_travel_in_a_page_and_an_archive(tmp_path, monkeypatch):
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("OUT", str(home))
    Machine().run(tmp_path / "out", 1000)
    assert sorted(path.name for path in home.iterdir()) == ["gpu-report.tar.gz", "report.md"]
    with tarfile.open(home / "gpu-report.tar.gz") as archive:
        assert {"./report.md", "./state.json"} <= set(archive.getnames())


def figures(median, spread=0.1):
    return timing.summary([(median + spread * step) * 1e-6 for step in (-2, -1, 0, 1, 2)])


def bench_row(case, what, median, **more):
    return {"suite": "train", "case": case, "what": what, "ratio": median / 100, **figures(median), **more}


def test_the_page_says_what_was_won_lost_and_is_to_change():
    records = {
        "environment": {"capability": 90},
        "ceilings": {"rows": [{"case": "bfloat16", "what": "", "tflop_s": 700.0, "gb_s": 4300.0}]},
        "gpu_tests": {"rows": [{"case": "test_gpu.py", "status": 1, "failed": 2}, {"case": "ok.py", "status": 0}]},
        "gemm": {"rows": [{"case": "y 8192 × 4096 × 4096", "what": "cuBLAS", **figures(90)},
                          {"case": "y 8192 × 4096 × 4096", "what": "a tile", **figures(100)}]},
        "forward": {"rows": [{"case": "a layer", "what": what, **figures(us)}
                             for what, us in (("base only", 90), ("extended", 99), ("one_launch", 95))]},
        "tune": {"rows": [{"case": "extended 8192", "what": "block_m=64", "median_us": 90.0, "ratio": 0.9}]},
        "bench": {"rows": [
            bench_row("won", "base only", 1), bench_row("won", "ours: a", 105), bench_row("won", "PEFT", 130),
            bench_row("lost", "ours: a", 105), bench_row("lost", "ours: b", 120), bench_row("lost", "cuBLAS", 101),
            bench_row("level", "ours: a", 105), bench_row("level", "cuBLAS", 105),
            {"suite": "train", "case": "won", "what": "ours: b", "note": "failed: y: over budget"},
        ]},
    }  # fmt: skip
    found = gpu_page.findings(records)
    assert found["Won"] == ["train, won: ours: a 105.0 µs (1.050 × base), PEFT 130.0 µs (1.300 × base)"]
    assert len(found["Lost"]) == 1 and "cuBLAS 101.0" in found["Lost"][0] and "ours: a" in found["Lost"][0]
    assert len(found["Level"]) == 1
    change = "\n".join(found["To change"])
    assert "extended 8192: block_m=64, 0.900 ×" in change and "one_launch 95.0 µs, extended 99.0 µs" in change
    assert "0.900 of cuBLAS" in change and "FLOPS of lora_kernels.configs.sm90: 7.88e+14, measured 7e+14" in change
    assert "BANDWIDTH" not in change
    assert found["Broken"] == ["test_gpu.py: 2 failed, 0 errors", "won: ours: b: failed: y: over budget"]


@pytest.mark.skipif(not INTERPRETED, reason="runs kernels: needs TRITON_INTERPRET=1, on the CPU")
@pytest.mark.parametrize(
    "stage", [s for s in STAGES if s.interprets and s.name != "tune"], ids=lambda stage: stage.name
)
def test_a_stage_passes_through_on_a_cpu_and_keeps_no_figure(stage, tmp_path):
    for _ in range(2):  # what is done is not done again
        room = Room(stage.name, tmp_path, time.monotonic() + 60, dry=True)
        stage.run(room)
    rows = json.loads((tmp_path / f"{stage.name}.json").read_text())["rows"]
    assert rows and not any({"median_us", "tflop_s", "gb_s"} & row.keys() for row in rows)
    assert {row["note"] for row in rows if "note" in row} <= {"ran; not timed", "not built"}
    timed = [(row["case"], row["what"]) for row in rows if "note" in row]
    assert len(timed) == len(set(timed))


def test_a_stage_stops_between_cases_and_goes_on(tmp_path, monkeypatch):
    room = Room("gemm", tmp_path, time.monotonic() + 60, dry=True)
    ran = []
    room.race("a", {"x": lambda _: ran.append("a")}, [None], "x")
    room.until = 0.0
    with pytest.raises(questions.OutOfTime):
        room.race("b", {"x": lambda _: ran.append("b")}, [None], "x")
    room = Room("gemm", tmp_path, time.monotonic() + 60, dry=True)
    for case in "ab":
        room.race(case, {"x": lambda _, case=case: ran.append(case)}, [None], "x")
    assert ran == ["a", "b"]


def test_a_racer_that_raises_is_a_line(tmp_path):
    def broken(_):
        raise RuntimeError("no such kernel")

    room = Room("gemm", tmp_path, time.monotonic() + 60, dry=True)
    room.race("a", {"broken": broken, "fine": lambda _: None}, [None], "fine")
    assert [row["note"] for row in room.record["rows"]] == ["RuntimeError: no such kernel", "ran; not timed"]


def test_races_on_a_device_have_ratios(tmp_path, monkeypatch):
    monkeypatch.setattr(questions, "REPEATS", 5)
    room = Room("gemm", tmp_path, time.monotonic() + 60, dry=True)
    room.dry = False
    seconds = {"cuBLAS": 1.0, "ours": 1.25}
    calls = {name: lambda _, name=name: name for name in seconds}
    room.race("a", calls, [None], "cuBLAS", flops=2e12, timer=lambda steps: lambda: seconds[steps[0]()])
    rows = {row["what"]: row for row in room.record["rows"]}
    assert rows["ours"]["ratio"] == 1.25 and rows["cuBLAS"]["tflop_s"] == 2.0


def test_test_files_are_recorded_one_by_one_and_a_hung_one_is_left_after_two_tries(tmp_path, monkeypatch):
    import subprocess

    seen = []

    def run(command, timeout, **_):
        seen.append(command[-1])
        if "hangs" in command[-1]:
            raise subprocess.TimeoutExpired(command, timeout)
        code, out = (1, "F\n1 failed, 3 passed in 0.1s") if "broken" in command[-1] else (0, "4 passed in 0.1s")
        return subprocess.CompletedProcess(command, code, stdout=out, stderr="")

    monkeypatch.setattr(subprocess, "run", run)
    files = ("test_fine.py", "test_broken.py", "test_hangs.py", "test_last.py")
    for _ in range(2):
        with pytest.raises(questions.OutOfTime):
            questions._run_tests(Room("suite", tmp_path, time.monotonic() + 60, dry=True), files, "not gpu")
    questions._run_tests(Room("suite", tmp_path, time.monotonic() + 60, dry=True), files, "not gpu")
    assert seen == [f"tests/test_{name}.py" for name in ("fine", "broken", "hangs", "hangs", "last")]
    rows = {row["case"]: row for row in json.loads((tmp_path / "suite.json").read_text())["rows"]}
    assert rows["test_broken.py"]["failed"] == 1 and rows["test_broken.py"]["passed"] == 3
    assert rows["test_hangs.py"]["status"] is None and "killed" in rows["test_hangs.py"]["note"]


def test_command_line(tmp_path, capsys):
    assert gpu_report.main(["--out", str(tmp_path)]) == 1
    assert "no GPU" in capsys.readouterr().out
    (tmp_path / "report.md").write_text(gpu_page.page(tmp_path, STAGES, {}, dry=False))
    assert gpu_report.main(["--out", str(tmp_path), "--dry-run"]) == 2
    assert "has a real run" in capsys.readouterr().out
