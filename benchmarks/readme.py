"""The benchmark tables of the pages, from the result files; what has no file is "unmeasured"."""

import json
from pathlib import Path

from benchmarks import report
from benchmarks.problems import BOTH, INFERENCE, Batched, Linear
from benchmarks.providers import BASE, OURS

GPU = (
    ("train", Linear(8192, 4096, 4096, 16), BOTH, "training, 8192 × 4096², r 16"),
    ("train", Linear(8192, 14336, 4096, 16), BOTH, "training, 8192 × 14336 × 4096, r 16"),
    ("decode", Batched(32, 4096, 4096, 1), INFERENCE, "decoding, 32 rows, 1 adapter, 4096²"),
    ("decode", Batched(32, 4096, 4096, 32), INFERENCE, "decoding, 32 rows, 32 adapters, 4096²"),
)
CPU = (
    ("train", Linear(256, 1024, 1024, 16), BOTH, "training, 256 × 1024², r 16"),
    ("cpu", Batched(32, 2048, 2048, 1), INFERENCE, "decoding, 32 rows, 1 adapter, 2048²"),
    ("cpu", Batched(32, 2048, 2048, 32), INFERENCE, "decoding, 32 rows, 32 adapters, 2048²"),
    ("cpu", Batched(32, 2048, 2048, 32, dtype="float32"), INFERENCE, "the same in fp32"),
)
COLUMNS = ("device", "case, bf16", "ours, the best", "PEFT", "the best of the others")


def headline(root: str = "") -> str:
    """Time / base layer's time of ours, of PEFT and of whoever else is best, in Markdown; `root` leads there from the page."""
    rows = [list(COLUMNS), ["---"] * len(COLUMNS)]
    folders = measured_folders()
    for cases, kind, found in (
        (GPU, "NVIDIA GPU", [f for f in folders if _capability(f)]), (CPU, "CPU", [f for f in folders if not _capability(f)])
    ):  # fmt: skip
        for folder in found or [None]:
            for suite, problem, what, words in cases:
                record = _record(folder, suite)
                device = f"[{record['device']}]({root}{_path(folder, suite)})" if record else kind
                rows.append([device, words, *_figures(record, str(problem), what)])
    return markdown(rows)


def measured_folders() -> list[Path]:
    """The folders of timed devices, GPUs first."""
    folders = (
        path for path in report.RESULTS.iterdir() if any((path / f"{s}.json").exists() for s in ("train", "cpu"))
    )
    return sorted(folders, key=lambda folder: (not _capability(folder), folder.name))


def markdown(rows: list[list[str]]) -> str:
    """A table; the first two rows are its head."""
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _figures(record, problem, what):
    timed = {
        row["provider"]: row["ratio_to_base"]
        for row in (record or {}).get("rows", ())
        if row["problem"] == problem and row["pass"] == what and "median_us" in row
    }
    groups = {"ours": [], "PEFT": [], "others": []}
    for name, ratio in timed.items():
        if name != BASE:
            group = "ours" if name.startswith(OURS) else "PEFT" if name.startswith("PEFT") else "others"
            groups[group].append((ratio, name.removeprefix(f"{OURS}: ").removeprefix("PEFT ").removeprefix("PEFT, ")))
    best = [min(group) if group else None for group in groups.values()]
    cells = [f"{found[0]:.2f} ({found[1]})" if found else "unmeasured" for found in best]
    if any(best):
        winner = best.index(min(found for found in best if found))
        cells[winner] = f"**{cells[winner]}**"
    return cells


def _record(folder, suite):
    path = folder and folder / f"{suite}.json"
    return json.loads(path.read_text()) if path and path.exists() else None


def _capability(folder):
    return next(json.loads(path.read_text()).get("capability") for path in sorted(folder.glob("*.json")))


def _path(folder, suite):
    return f"benchmarks/results/{folder.name}/{suite}.json"
