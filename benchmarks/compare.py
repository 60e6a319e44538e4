"""`bench --compare A.json B.json`: what became faster or slower, cell by cell, and whether that is more than noise."""

import json
from pathlib import Path
from typing import NamedTuple

from benchmarks import report

LEAST = 0.01  # a change of a median by less is no change
FASTER, SLOWER, SAME = "faster", "slower", "same"


class Cell(NamedTuple):
    """A row that both files have; `ratio` is B's median over A's."""

    name: str
    ratio: float
    verdict: str


def verdict(before: dict, after: dict) -> str:
    """Of two summaries (`timing.summary`): FASTER or SLOWER where the boxes of quartiles do not meet, else SAME."""
    ratio = after["median_us"] / before["median_us"]
    (before_low, before_high), (after_low, after_high) = before["quartiles_us"], after["quartiles_us"]
    if ratio < 1 - LEAST and after_high < before_low:
        return FASTER
    if ratio > 1 + LEAST and after_low > before_high:
        return SLOWER
    return SAME


def compare(before: dict, after: dict) -> tuple[list[Cell], list[str]]:
    """The cells of two results, and what only one of them has."""
    old, new = _timed(before), _timed(after)
    cells = [
        Cell(name, new[name]["median_us"] / figures["median_us"], verdict(figures, new[name]))
        for name, figures in old.items()
        if name in new
    ]
    alone = [f"only in the {which}: {name}" for which, ours, theirs in (("first", old, new), ("second", new, old))
             for name in ours if name not in theirs]  # fmt: skip
    return cells, alone


def main(first: str, second: str, anyway: bool = False) -> int:
    """Print the comparison; 1 if anything is slower or no longer timed, 2 where the files do not compare."""
    records = []
    for path in (first, second):
        try:
            records.append(json.loads(Path(path).read_text()))
            _timed(records[-1])
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            print(f"--compare: {path} is no result of a benchmark: {type(error).__name__}: {error}")
            return 2
    different = _differences(*records)
    if different and not anyway:
        print(f"--compare: {first} and {second} differ in {', '.join(different)}; --anyway compares them all the same")
        return 2
    cells, alone = compare(*records)
    if not cells:
        print(f"--compare: {first} and {second} have no timed row in common")
        return 2
    cells.sort(key=lambda cell: cell.ratio, reverse=True)
    rows = [[cell.name, f"{cell.ratio:.3f}", cell.verdict] for cell in cells]
    report.show(f"{second} against {first}: ratio of medians", None, ["cell", "B / A", "verdict"], rows)
    print(*alone, sep="\n", end="\n" if alone else "")
    counts = {kind: sum(cell.verdict == kind for cell in cells) for kind in (SLOWER, FASTER, SAME)}
    print(", ".join(f"{count} {kind}" for kind, count in counts.items()), f"of {len(cells)} cells")
    return int(bool(counts[SLOWER] or any(line.startswith("only in the first") for line in alone)))


def _differences(before, after):
    """What two results must have in common to be compared, and have not."""
    names = ("benchmark", "device", "threads", "method")
    return [
        f"{name} ({before.get(name)!r}, {after.get(name)!r})" for name in names if before.get(name) != after.get(name)
    ]


def _timed(record) -> dict[str, dict]:
    """The rows with figures, by what they are of."""
    found = {}
    for row in record["rows"]:
        name = ", ".join(row[field] for field in ("problem", "pass", "provider"))
        if "median_us" in row:
            if not row["median_us"] > 0 or len(row["quartiles_us"]) != 2:
                raise ValueError(f"{name}: figures that are none")
            found[name] = row
    return found
