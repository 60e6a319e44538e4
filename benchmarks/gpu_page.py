"""The page of `make gpu-report`: from the stages' files to what was won, what was lost and which config to change."""

import json
import re
from pathlib import Path

from benchmarks import compare
from benchmarks.providers import BASE, OURS
from lora_kernels import configs

DRY = "**Dry run on a CPU: every stage passed through at toy size, nothing timed.**"


def page(out: Path, stages, state: dict, dry: bool) -> str:
    """The whole page in Markdown, whatever of it is there yet."""
    records = {stage.name: _read(out, stage.name) for stage in stages}
    parts = ["# GPU report", DRY if dry else _machine(records.get("environment", {})), "## What came out"]
    parts += [f"### {title}\n\n{_list(lines)}" for title, lines in findings(records).items()]
    parts += ["## Stages", _stages(stages, state)]
    for stage in stages:
        if rows := records[stage.name].get("rows"):
            parts.append(f"## {stage.name}\n\n{stage.title}.\n\n{_rows(rows)}")
    parts += [f"## Log of {name}: {known['status']}\n\n```text\n{known['log'].strip()}\n```"
              for name, known in state.items() if known["log"]]  # fmt: skip
    return "\n\n".join(part for part in parts if part) + "\n"


def is_dry(out: Path) -> bool | None:
    """Whether the run in this folder is a dry one; None if there is none."""
    path = out / "report.md"
    return DRY in path.read_text() if path.exists() else None


def findings(records: dict[str, dict]) -> dict[str, list[str]]:
    """Won, lost and level against the rivals, what to change, and what is broken, a line each."""
    won, lost, level = _against_rivals(records.get("bench", {}).get("rows", []))
    return {
        "Won": won,
        "Lost": lost,
        "Level": level,
        "To change": [*_tiles(records), *_strategies(records), *_ceilings(records)],
        "Broken": _broken(records),
    }


def _against_rivals(rows):
    """The best of ours against the best rival in every case."""
    timed = [row for row in rows if "median_us" in row]
    won, lost, level = [], [], []
    for case in dict.fromkeys((row["suite"], row["case"]) for row in timed):
        here = [row for row in timed if (row["suite"], row["case"]) == case and row["what"] != BASE]
        ours = [row for row in here if row["what"].startswith(OURS)]
        rivals = [row for row in here if not row["what"].startswith(OURS)]
        if not ours or not rivals:
            continue
        best, rival = (min(some, key=lambda row: row["median_us"]) for some in (ours, rivals))
        line = f"{', '.join(case)}: {best['what']} {best['median_us']:.1f} µs ({best['ratio']:.3f} × base), " \
               f"{rival['what']} {rival['median_us']:.1f} µs ({rival['ratio']:.3f} × base)"  # fmt: skip
        verdict = compare.verdict(rival, best)
        {compare.FASTER: won, compare.SLOWER: lost, compare.SAME: level}[verdict].append(line)
    return won, lost, level


def _tiles(records):
    entries = records.get("tune", {}).get("rows", [])
    lines = [f"{row['case']}: {row['what']}, {row['ratio']:.3f} × the heuristics' time" for row in entries]
    if lines:
        lines.append(
            "the table with these is beside this page (*.tuned); it goes into lora_kernels/configs/tuned/ as *.json"
        )
    return lines


def _strategies(records):
    """The order of the strategies, and where no GEMM of ours is worth having."""
    lines = []
    for case, rows in _by_case(records.get("forward", {})).items():
        times = {row["what"]: row["median_us"] for row in rows if row["what"] != "base only"}
        if len(times) > 1:
            ranked = ", ".join(f"{name} {times[name]:.1f} µs" for name in sorted(times, key=times.get))
            lines.append(f"forward, {case}, fastest first: {ranked}")
    for case, rows in _by_case(records.get("gemm", {})).items():
        times = {row["what"]: row["median_us"] for row in rows}
        if cublas := times.pop("cuBLAS", None):
            name = min(times, key=times.get, default=None)
            k = int(case.split(" × ")[-1])
            if name and (fraction := cublas / times[name]) < 1 - 184 / k:
                lines.append(f"gemm, {case}: {fraction:.3f} of cuBLAS at best ({name}), below {1 - 184 / k:.3f}: "
                             "`chained` is the better choice there")  # fmt: skip
    return lines


def _ceilings(records):
    capability = records.get("environment", {}).get("capability")
    if not capability:
        return []
    table, lines = configs.architecture(capability), []
    for row in records.get("ceilings", {}).get("rows", []):
        if "gb_s" in row and row["case"] == "bfloat16":
            for name, measured, modelled in (("FLOPS", row["tflop_s"] * 1e12, table.FLOPS),
                                             ("BANDWIDTH", row["gb_s"] * 1e9, table.BANDWIDTH)):  # fmt: skip
                if abs(measured / modelled - 1) > 0.05:
                    lines.append(f"{name} of {table.__name__}: {modelled:.3g}, measured {measured:.3g}")
    return lines


def _broken(records):
    """Test files with failures, and what of ours did not pass its gate."""
    lines = [
        f"{row['case']}: {row.get('failed', 0)} failed, {row.get('error', row.get('errors', 0))} errors"
        for name in ("gpu_tests", "suite")
        for row in records.get(name, {}).get("rows", [])
        if row["status"] not in (0, 5, None)
    ]
    rows = (row for record in records.values() for row in record.get("rows", []))
    wrong = re.compile("failed|raised|Error")
    return lines + [
        f"{row['case']}: {row['what']}: {row['note']}"
        for row in rows
        if "what" in row and wrong.search(row.get("note", ""))
    ]


def _by_case(record):
    found = {}
    for row in record.get("rows", []):
        if "median_us" in row:
            found.setdefault(row["case"], []).append(row)
    return found


def _machine(environment):
    if not environment:
        return ""
    versions = ", ".join(f"{name} {version}" for name, version in environment["versions"].items() if version)
    changed = ", with uncommitted changes" if environment["uncommitted_changes"] else ""
    lines = [f"{environment['device']}, driver {environment.get('driver')}, clocks {environment.get('clocks')}; {versions}; "
             f"commit {environment['commit']}{changed}.", "", "Rivals that are not there:", ""]  # fmt: skip
    return "\n".join(lines + [f"* {name}: {why}" for name, why in environment["not_there"].items()])


def _stages(stages, state):
    rows = [["stage", "what", "status", "runs", "seconds"], ["---"] * 5]
    for stage in stages:
        known = state.get(stage.name, {"status": "not run", "runs": 0, "seconds": 0.0})
        rows.append([stage.name, stage.title, known["status"], str(known["runs"]), f"{known['seconds']:.0f}"])
    return _table(rows)


def _rows(rows):
    columns = [name for name in ("suite", "case", "what", "median_us", "quartiles_us", "ratio", "tflop_s", "gb_s",
               "passed", "failed", "skipped", "status", "note") if any(name in row for row in rows)]  # fmt: skip
    return _table([columns, ["---"] * len(columns), *([_cell(row.get(name)) for name in columns] for row in rows)])


def _cell(value):
    if isinstance(value, list):
        return " - ".join(f"{item:.1f}" for item in value)
    if isinstance(value, float):
        return f"{value:.4g}"
    return "" if value is None else str(value).strip().splitlines()[-1][:160].replace("|", "/") if value != "" else ""


def _table(rows):
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _list(lines):
    return "\n".join(f"* {line}" for line in lines) or "nothing"


def _read(out, name):
    path = out / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else {}
