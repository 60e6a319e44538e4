"""The plots of a device's result files: overhead, roofline, decoding against adapters, memory. `python -m benchmarks.plots`.

Ours are blue and filled, rivals are not; where a rival lies left of us, it wins.
"""

import hashlib
import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt

from benchmarks import report
from benchmarks.providers import BASE, OURS
from benchmarks.readme import measured_folders

OUT = report.ROOT / "out" / "bench"
BLUES = ("#08519c", "#3182bd", "#00a0b0", "#6a51a3", "#084594", "#2171b5")
RIVALS = ("#d94801", "#238b45", "#cb181d", "#8c6d31", "#737373", "#e7298a", "#ad494a", "#b5cf6b", "#636363", "#fd8d3c")
MARKERS = "oDvs^<>PXd"
BASE_STYLE = {BASE: {"color": "black", "marker": "x", "label": BASE}}
MOST = 14  # lines in a plot of overheads


def draw(folder: Path, out: Path, names: dict[str, str] | None = None) -> list[Path]:
    """Every plot for which `folder` has a result file, or those of `names` under new ones; returns the files in `out`."""
    out.mkdir(parents=True, exist_ok=True)
    drawn = []
    for name, record, plot in _plots(folder):
        if (names is None or name in names) and (figure := plot(record)) is not None:
            drawn.append(out / f"{(names or {}).get(name, name)}.png")
            figure.savefig(drawn[-1], dpi=130, metadata={"Description": digest(record)})
            plt.close(figure)
    return drawn


def shown() -> dict[str, dict]:
    """The plots of docs/benchmarks.md, by file name: the records that they show, of a GPU where one is measured."""
    folder = measured_folders()[0]
    return {SHOWN[name]: record for name, record, _ in _plots(folder) if name in _names(folder)}


def draw_shown() -> list[Path]:
    """Draw them."""
    folder = measured_folders()[0]
    return draw(folder, report.ROOT / "docs" / "images", _names(folder))


def digest(record: dict) -> str:
    """What a plot was drawn from, in its file's metadata."""
    return hashlib.sha256(json.dumps(record["rows"]).encode()).hexdigest()


def _names(folder):
    """Without decoding on a GPU, the CPU's suite takes its place."""
    gpu = (folder / "decode.json").exists()
    return {name: file for name, file in SHOWN.items() if name not in (CPU_PLOTS if gpu else GPU_PLOTS)}


def _plots(folder):
    records = {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}
    if timed := [records[suite] for suite in ("train", "decode", "prefill", "cpu") if suite in records]:
        records["roofline"] = timed[0] | {"rows": [row for record in timed for row in record["rows"]]}
    return [(name, records[suite], plot) for name, suite, plot in PLOTS if suite in records]


def overhead(record: dict):
    """Time / base layer's time, a line for each problem and pass, a mark for each provider."""
    rows = [row for row in record["rows"] if "median_us" in row and row["provider"] != BASE]
    lines = list(dict.fromkeys((row["problem"], row["pass"]) for row in rows))[:MOST]
    if not lines:
        return None
    styles = _styles(rows)
    figure, axes = plt.subplots(figsize=(9, 1.9 + 0.42 * len(lines)), layout="constrained")
    for row in rows:
        if (line := (row["problem"], row["pass"])) in lines:
            axes.plot(row["ratio_to_base"], lines.index(line), ls="", ms=9, alpha=0.85, **styles[row["provider"]])
    for i in range(len(lines)):
        axes.axhline(i, color="0.9", zorder=0)
    axes.axvline(1.0, color="black", lw=1.2)
    axes.set_xscale("log")
    shown = [row["ratio_to_base"] for row in rows if (row["problem"], row["pass"]) in lines]
    coarse = (0.5, 0.7, 1, 1.5, 2, 3, 5, 8, 12, 20, 50)
    ticks = coarse if max(shown) > 2 else (0.8, 0.9, 1, 1.1, 1.2, 1.3, 1.5, 1.7, 2)
    ticks = [tick for tick in ticks if min(*shown, 1) / 1.3 <= tick <= 1.3 * max(shown)]
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.set_ylim(-0.6, len(lines) - 0.4)
    axes.minorticks_off()
    axes.set_yticks(range(len(lines)), [f"{problem}\n{what}" for problem, what in lines], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("time / base layer's time in the same round (1 = LoRA for free; left is better)")
    return _finish(figure, axes, styles, record)


def roofline(record: dict):
    """TFLOP/s of the base layer and of ours against arithmetic intensity, under the measured ceilings of one dtype."""
    dtype = "bfloat16" if "bfloat16" in record["ceilings"] else next(iter(record["ceilings"]), None)
    rows = [row for row in record["rows"] if "median_us" in row and row["case"]["dtype"] == dtype]
    rows = [row for row in rows if row["provider"] == BASE or row["provider"].startswith(OURS)]
    if not rows:
        return None
    peak, bandwidth = record["ceilings"][dtype]["flops"] / 1e12, record["ceilings"][dtype]["bandwidth"] / 1e12
    styles = _styles(rows) | BASE_STYLE
    figure, axes = plt.subplots(figsize=(9, 5), layout="constrained")
    intensity = [row["tflop_s"] * 1e3 / row["gb_s"] for row in rows]
    knee = peak / bandwidth
    ends = min(*intensity, knee) / 3, max(*intensity, knee) * 2
    axes.plot([ends[0], knee, ends[1]], [ends[0] * bandwidth, peak, peak], color="0.4", lw=2)
    axes.annotate(f"{peak:.3g} TFLOP/s", (ends[1], peak), ha="right", va="bottom", color="0.3")
    axes.annotate(f"{bandwidth * 1e3:.3g} GB/s", (ends[0], ends[0] * bandwidth), color="0.3", xytext=(12, 0),
                  textcoords="offset points")  # fmt: skip
    for row, x in zip(rows, intensity, strict=True):
        axes.plot(x, row["tflop_s"], ls="", ms=7, alpha=0.8, **styles[row["provider"]])
    axes.set(xscale="log", yscale="log", xlabel=f"least flops / least bytes, {dtype}", ylabel="TFLOP/s that count")
    return _finish(figure, axes, styles, record)


def adapters(record: dict):
    """Milliseconds of one layer against the distinct adapters in the batch, of the batch with the most points."""
    rows = [
        row for row in record["rows"] if "median_us" in row and "distinct" in row["case"] and row["case"]["sets"] < 2
    ]
    sizes = {}
    for row in rows:
        case = row["case"]
        sizes.setdefault((case["m"], case["n"], case["k"], tuple(case["ranks"]), case["dtype"]), []).append(row)
    if not sizes:
        return None
    (m, n, k, ranks, dtype), rows = max(sizes.items(), key=lambda item: len({r["case"]["distinct"] for r in item[1]}))
    styles = _styles(rows) | BASE_STYLE
    figure, axes = plt.subplots(figsize=(9, 5), layout="constrained")
    for name, style in styles.items():
        points = sorted(
            (r["case"]["distinct"], r["median_us"] / 1e3, r["quartiles_us"]) for r in rows if r["provider"] == name
        )
        x, y = [p[0] for p in points], [p[1] for p in points]
        axes.plot(x, y, lw=2.2 if name.startswith(OURS) else 1.2, ms=7, **style)
        axes.fill_between(x, *([p[2][i] / 1e3 for p in points] for i in (0, 1)), color=style["color"], alpha=0.12, lw=0)
    distinct = sorted({row["case"]["distinct"] for row in rows})
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(distinct, map(str, distinct))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("{x:g}")
    axes.set(xlabel="distinct adapters in the batch", ylabel="ms a layer (quartiles shaded)")
    axes.set_title(f"{m} rows × {n} × {k}, r {'/'.join(map(str, ranks))}, {dtype}", fontsize=10)
    return _finish(figure, axes, styles, record)


def memory(record: dict):
    """What is saved for the backward pass, and the peak of a step: a bar for each provider."""
    rows = [row for row in record["rows"] if "peak_mib" in row]
    problems = list(dict.fromkeys(row["problem"] for row in rows))[:2]
    if not problems:
        return None
    names = list(dict.fromkeys(row["provider"] for row in rows))
    figure, grid = plt.subplots(len(problems), 2, figsize=(10, 1 + 0.32 * len(names) * len(problems)), squeeze=False,
                                sharey=True, layout="constrained")  # fmt: skip
    for axes_of, problem in zip(grid, problems, strict=True):
        for axes, kind in zip(axes_of, ("saved", "peak"), strict=True):
            found = {row["provider"]: row[f"{kind}_mib"] for row in rows if row["problem"] == problem}
            colors = [BLUES[0] if name.startswith(OURS) else "black" if name == BASE else "0.65" for name in names]
            bars = axes.barh(names, [found.get(name, 0.0) for name in names], color=colors)
            labels = [f"{found[name]:.3g}" if name in found else "cannot run" for name in names]
            axes.bar_label(bars, labels, padding=3, fontsize=8)
            axes.margins(x=0.15)
            what = "MiB saved for the backward pass" if kind == "saved" else "MiB at the peak of a step"
            axes.set_xlabel(what, fontsize=9)
            axes.spines[["top", "right"]].set_visible(False)
        axes_of[0].set_title(problem, fontsize=10, loc="left")
    grid[0][0].invert_yaxis()
    figure.supxlabel(_origin(record), fontsize=8, color="0.4")
    return figure


PLOTS = (
    ("overhead_train", "train", overhead),
    ("overhead_decode", "decode", overhead),
    ("overhead_prefill", "prefill", overhead),
    ("overhead_layer", "layer", overhead),
    ("overhead_merge", "merge", overhead),
    ("overhead_host", "host", overhead),
    ("overhead_cpu", "cpu", overhead),
    ("roofline", "roofline", roofline),
    ("adapters_decode", "decode", adapters),
    ("adapters_cpu", "cpu", adapters),
    ("memory", "memory", memory),
)

GPU_PLOTS, CPU_PLOTS = ("overhead_train", "adapters_decode"), ("overhead_cpu", "adapters_cpu")
SHOWN = {
    "overhead_train": "bench_overhead", "overhead_cpu": "bench_overhead", "adapters_decode": "bench_adapters",
    "adapters_cpu": "bench_adapters", "roofline": "bench_roofline", "memory": "bench_memory",
}  # fmt: skip


def _styles(rows):
    names = [name for name in dict.fromkeys(row["provider"] for row in rows) if name != BASE]
    own = [name for name in names if name.startswith(OURS)]
    rivals = [name for name in names if name not in own]
    looks = {}
    for group, colors in ((own, BLUES), (rivals, RIVALS)):
        for i, name in enumerate(group):
            looks[name] = {"color": colors[i % len(colors)], "marker": MARKERS[i % len(MARKERS)], "label": name}
    for name in rivals:
        looks[name]["markerfacecolor"] = "white"
    return looks


def _finish(figure, axes, styles, record):
    handles = [plt.Line2D([], [], ls="", **style) for style in styles.values()]
    figure.legend(handles=handles, loc="outside right upper", fontsize=8, frameon=False)
    figure.supxlabel(_origin(record), fontsize=8, color="0.4")
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def _origin(record):
    changes = " with changes" if record["uncommitted_changes"] else ""
    return f"{record['device']}, torch {record['versions']['torch']}, commit {(record['commit'] or 'unknown')[:9]}{changes}"


def main() -> None:
    for folder in sorted(path for path in report.RESULTS.iterdir() if path.is_dir() and path.name != "simulation"):
        for path in draw(folder, OUT / folder.name):
            print(path.relative_to(report.ROOT))


if __name__ == "__main__":
    main()
