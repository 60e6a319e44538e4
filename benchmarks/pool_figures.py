"""The plots of docs/serving.md, from what `benchmarks/pool.py` found."""

import dataclasses
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from benchmarks.pool import RANKS, ROUTERS, ROWS, Case
from benchmarks.simulator import residence, zipf

IMAGES = Path(__file__).resolve().parent.parent / "docs" / "images"
BLUE, ORANGE, GREEN, GREY = "#1f5fa8", "#d9741a", "#2a8a4a", "#707070"
STYLE = {
    "font.size": 9, "axes.titlesize": 10, "axes.titleweight": "bold", "axes.titlelocation": "left",
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.25,
    "lines.markersize": 5, "lines.linewidth": 1.4, "legend.frameon": False, "svg.hashsalt": "pool",
}  # fmt: skip
H200_GB = 141


def draw(record: dict) -> None:
    """Write the plots to docs/images."""
    IMAGES.mkdir(exist_ok=True)
    results = Results(record)
    with matplotlib.rc_context(STYLE):
        for name, panels, widths in (
            ("memory", _memory, (1, 1)),
            ("waiting", _waiting, (1, 1)),
            ("fleet", _fleet, (4, 3, 4)),
        ):
            figure = Figure(figsize=(9.6, 3.6), layout="constrained")
            panels(results, *figure.subplots(1, len(widths), width_ratios=widths))
            figure.savefig(IMAGES / f"pool_{name}.svg", metadata={"Date": None})


class Results:
    """The rows of a record, by their case."""

    def __init__(self, record: dict):
        self.rows, self.parameters = record["rows"], record["parameters"]

    def where(self, **values) -> list[dict]:
        """The rows whose case is the usual one with `values`, for any memory and number of requests."""
        wanted = {**dataclasses.asdict(Case()), **values}
        del wanted["rows"], wanted["requests"]
        return [row for row in self.rows if all(row["case"][name] == value for name, value in wanted.items())]

    def curve(self, figure: str, scale: float = 1, **values) -> tuple[np.ndarray, list[float]]:
        """Gigabytes of the pool, and a figure of the row."""
        rows = self.where(**values)
        return self.gigabytes([row["case"]["rows"] for row in rows]), [scale * row[figure] for row in rows]

    def gigabytes(self, rows) -> np.ndarray:
        return np.array(rows) * self.parameters["row_bytes"] / 1e9


def _memory(results, left, right):
    targets = np.linspace(0.1, 0.99, 60)
    mean_rank = np.mean(RANKS[Case.ranks])
    for exponent, colour in ((1.1, GREEN), (1.0, BLUE), (0.9, ORANGE)):
        popularity = zipf(results.parameters["tenants"], exponent)
        rows = [mean_rank * residence(popularity, target).sum() for target in targets]
        left.plot(results.gigabytes(rows), 100 * targets, color=colour)
        left.plot(*results.curve("hit_rate", 100, exponent=exponent), "o", color=colour, label=f"Zipf {exponent}")
    left.axvline(H200_GB, color=GREY, linestyle=":")
    left.text(H200_GB * 1.1, 3, "an H200, all of it", color=GREY)
    left.set(title="90 % hits would take terabytes", ylabel="hits, %", xlim=(15, 16000), ylim=(0, 100))
    left.plot([], [], color=GREY, label="Che's approximation")
    left.legend(loc="upper left")
    _memory_axis(left, (20, 100, 500, 2000, 10000))

    gigabytes, hits = (values[: len(ROWS)] for values in results.curve("hit_rate", 100))
    padded = results.curve("hit_rate", 100, padded=True)[1]
    bound = results.curve("clairvoyant_hit_rate", 100, padded=True)[1]
    right.plot(gigabytes, bound, "--", color=GREY, label="padded, evicted by a clairvoyant")
    right.plot(gigabytes, hits, "o-", color=BLUE, label="packed, as the pool does")
    right.plot(gigabytes, padded, "s-", color=ORANGE, label="padded to rank 64")
    as_good = 2 ** np.interp(padded[-1], hits, np.log2(gigabytes))
    arrow = {"arrowstyle": "->", "color": "black", "shrinkA": 6}
    right.annotate("", (as_good, padded[-1]), (gigabytes[-1], padded[-1]), arrowprops=arrow)
    right.text(gigabytes[-1], 4, f"← the same hits from 1 / {gigabytes[-1] / as_good:.1f} of the memory", ha="right")
    right.set(title="Ranks are packed: the same hits from less", ylabel="hits, %", ylim=(0, 80))
    right.legend(loc="upper left")
    _memory_axis(right, gigabytes)


def _waiting(results, left, right):
    for crowds, colour in ((True, ORANGE), (False, BLUE)):
        for prefetch, line in ((False, "o--"), (True, "o-")):
            label = f"{'crowds' if crowds else 'steady'}, {'with' if prefetch else 'no'} prefetch"
            rows = results.where(crowds=crowds, prefetch=prefetch)[: len(ROWS)]
            gigabytes = results.gigabytes([row["case"]["rows"] for row in rows])
            left.plot(gigabytes, [row["wait_ms"]["99"] for row in rows], line, color=colour)
            right.plot(gigabytes, [100 * row["stalled"] for row in rows], line, color=colour, label=label)
    left.set(
        title="Prefetch keeps the queue short in a crowd", ylabel="wait for queue and copy, ms (99 %)", yscale="log"
    )
    left.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    left.set_ylim(8, 8000)
    left.annotate(
        "too few rows for\nthe batch: refusals", (gigabytes[0], 850), (gigabytes[0] * 0.98, 12), color=GREY,
        arrowprops={"arrowstyle": "->", "color": GREY, "relpos": (0.02, 1)},
    )  # fmt: skip
    right.set(title="... since the batch hardly waits for copies", ylabel="time spent waiting, %", ylim=(0, 16))
    right.legend(loc="center right", bbox_to_anchor=(1, 0.36))
    for axes in (left, right):
        _memory_axis(axes, gigabytes)


def _fleet(results, left, middle, right):
    machines = results.parameters["machines"]
    for router, colour in zip(ROUTERS, (GREY, ORANGE, BLUE), strict=True):
        gigabytes, hits = results.curve("hit_rate", 100, machines=machines, router=router)
        left.plot(gigabytes, hits, "o-", color=colour, label=router)
        busiest = results.where(machines=machines, router=router)[0]["busiest"]
        bar = router.replace(", ", ",\n")
        middle.bar(bar, busiest, color=colour, width=0.6)
        middle.text(bar, busiest, f"{busiest:.2f}", ha="center", va="bottom")
    left.set(title="Sticky routing beats 4 × the memory", ylabel="hits, %", ylim=(0, 100))
    left.legend(loc="upper left")
    _memory_axis(left, gigabytes)
    middle.axhline(1, color="black", linewidth=0.8)
    middle.set(title="... with its load bounded", ylabel="load of the busiest machine / mean", ylim=(0, 1.7))
    middle.grid(False)
    for router, label, colour in (
        ("hashed, bounded", "rendezvous", BLUE),
        ("modulo, bounded", "hash % machines", ORANGE),
    ):
        [row] = results.where(machines=machines, router=router, lost=True)
        seconds, hits = np.array(row["hit_rate_around_loss"]).T
        right.plot(seconds, 100 * hits, color=colour, label=label)
    right.axvline(0, color=GREY, linestyle=":")
    right.text(0.6, 92, f"one of {machines} is lost", color=GREY)
    right.set(title="... and by rendezvous, not modulo", xlabel="seconds", ylabel="hits, %", ylim=(0, 100))
    right.legend(loc="lower left")


def _memory_axis(axes, ticks):
    axes.set_xscale("log")
    axes.set_xticks(ticks, [f"{tick:,.0f}" for tick in ticks])
    axes.minorticks_off()
    axes.set_xlabel("device memory for adapters, GB")
