"""`make gpu-report`: all that a first run on a GPU has to settle, in `--minutes`, on one page.

Every stage (benchmarks/questions.py) is a process of its own with a deadline, so that a hang or a crash costs that stage
alone. Its results are written as they come, the page is written anew after each stage, and another run goes on where this
one stopped. docs/tuning.md, "The half-hour report", says how to read the page.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks import gpu_page, report
from benchmarks.questions import STAGES, UNFINISHED, OutOfTime, Room, Stage

OUT = Path("out", "gpu-report")
LEAST = 20.0  # seconds: a stage is not begun for less
GRACE = 15.0  # of its share, that a stage has to end by itself
TRIES = 2  # of a stage that hung or crashed
DONE, WENT_ON, HUNG, CRASHED = "done", "unfinished", "killed at its deadline", "crashed"

Execute = Callable[[list[str], float, Path, dict], tuple[str, str]]


def run(
    stages: tuple[Stage, ...], out: Path, seconds: float, dry: bool,
    execute: Execute | None = None, clock: Callable[[], float] = time.monotonic, say: Callable = print,
) -> dict:  # fmt: skip
    """Run what is not done yet: first every stage within its share, then, in what time is left, those with more to do.

    Returns the state by stage, as state.json has it.
    """
    out.mkdir(parents=True, exist_ok=True)
    state = read_state(out)
    until = clock() + seconds
    for again in (False, True):
        for stage in stages:
            left, known = until - clock(), state.get(stage.name, {"status": None, "runs": 0, "seconds": 0.0})
            failed = known["status"] in (HUNG, CRASHED)
            if known["status"] == DONE or (failed and known["runs"] >= TRIES):
                continue
            if left < LEAST:
                say(f"{stage.name}: no time left for it")
                continue
            share = left if again and known["status"] == WENT_ON else stage.seconds
            given, start = min(share, left), clock()
            say(f"{stage.name}: {stage.title} (at most {given:.0f} s)")
            status, tail = (execute or _execute)(_command(stage, out, given, dry), given, out / f"{stage.name}.log",
                                                 _environ(stage, dry))  # fmt: skip
            spent = clock() - start
            state[stage.name] = {"status": status, "runs": known["runs"] + 1, "seconds": known["seconds"] + spent,
                                 "log": "" if status == DONE else tail}  # fmt: skip
            (out / "state.json").write_text(json.dumps(state, indent=1))
            (out / "report.md").write_text(gpu_page.page(out, stages, state, dry))
            _carry_home(out)
            say(f"{stage.name}: {status}, {spent:.0f} s")
    return state


def read_state(out: Path) -> dict:
    path = out / "state.json"
    return json.loads(path.read_text()) if path.exists() else {}


def _command(stage, out, seconds, dry):
    soft = max(seconds - GRACE, seconds / 2)
    command = [sys.executable, "-m", "benchmarks.gpu_report", "--out", str(out), "--stage", stage.name,
               "--seconds", f"{soft:.1f}"]  # fmt: skip
    return command + (["--dry-run"] if dry else [])


def _environ(stage, dry):
    environ = {**os.environ, "PYTHONPATH": str(report.ROOT), "PYTHONUNBUFFERED": "1"}
    environ.pop("TRITON_INTERPRET", None)
    return environ | ({"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"} if dry and stage.interprets else {})


def _execute(command, seconds, log, environ) -> tuple[str, str]:
    """Run a stage and what it starts; at the deadline all of it is killed. Returns its status and the end of its log."""
    with log.open("a") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environ, cwd=report.ROOT,
                                   start_new_session=True)  # fmt: skip
        try:
            code = process.wait(seconds)
            status = {0: DONE, UNFINISHED: WENT_ON}.get(code, CRASHED)
        except subprocess.TimeoutExpired:
            status = HUNG
        finally:
            try:
                os.killpg(process.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
            process.wait()
    return status, log.read_text(errors="replace")[-2000:]


def _carry_home(out):
    """Where a machine is borrowed, `OUT` names a folder that comes back from it: a few files only, so one archive."""
    home = os.environ.get("OUT")
    if home and Path(home).is_dir() and Path(home).resolve() != out.resolve():
        shutil.copy(out / "report.md", home)
        shutil.make_archive(str(Path(home) / "gpu-report"), "gztar", out)


def _stage(arguments) -> int:
    [stage] = [stage for stage in STAGES if stage.name == arguments.stage]
    if arguments.dry_run and stage.interprets:
        from lora_kernels import testing

        testing.mend_interpreter()
    try:
        stage.run(Room(stage.name, arguments.out, time.monotonic() + arguments.seconds, arguments.dry_run))
    except OutOfTime:
        return UNFINISHED
    return 0


def main(argv: list[str] | None = None) -> int:
    """0 if every stage is done, 1 if not."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_report", description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=25, help="of this run; another goes on (default: 25)")
    parser.add_argument("--out", type=Path, default=report.ROOT / OUT, help=f"the folder (default: {OUT})")
    parser.add_argument("--fresh", action="store_true", help="forget what an earlier run left there")
    parser.add_argument("--dry-run", action="store_true", help="pass through every stage on a CPU; times nothing")
    parser.add_argument("--stage", choices=[stage.name for stage in STAGES], help="this stage alone, in this process")
    parser.add_argument("--seconds", type=float, default=600, help="with --stage: its time")
    arguments = parser.parse_args(argv)
    if arguments.fresh and arguments.out.exists():
        shutil.rmtree(arguments.out)
    if arguments.stage:
        arguments.out.mkdir(parents=True, exist_ok=True)
        return _stage(arguments)
    if not arguments.dry_run and report.local_device().type != "cuda":
        print("gpu-report: torch sees no GPU here (--dry-run passes through every stage on a CPU)")
        return 1
    dry = gpu_page.is_dry(arguments.out)
    if dry is not None and dry != arguments.dry_run:
        print(
            f"gpu-report: {arguments.out} has a {'dry' if dry else 'real'} run; --fresh forgets it, --out is elsewhere"
        )
        return 2
    state = run(STAGES, arguments.out, 60 * arguments.minutes, arguments.dry_run)
    print(arguments.out / "report.md")
    unfinished = [stage.name for stage in STAGES if state.get(stage.name, {}).get("status") != DONE]
    if unfinished:
        print(f"not done: {', '.join(unfinished)}; run it again to go on")
    return int(bool(unfinished))


if __name__ == "__main__":
    raise SystemExit(main())
