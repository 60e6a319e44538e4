"""Time the suites, all of them unless some are named; each one's table is printed, its figures go to benchmarks/results."""

import argparse
import os
from importlib import import_module

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # before torch: its profiler talks to the terminal otherwise

import torch

from benchmarks import compare, providers, runner
from benchmarks.report import local_device, path_of, refuse_interpreter, show

COLUMNS = ("provider", "ms", "quartiles", "× base", "% of roofline", "TFLOP/s", "GB/s", "launches", "peak MiB")
MEMORY = ("provider", "saved MiB", "peak MiB", "scratch MiB", "launches")
SUITES = ("train", "decode", "prefill", "merge", "host", "memory", "layer", "qlora", "cpu")
ON_REQUEST = ("pool", "cpu_roofline")


def main(argv: list[str] | None = None) -> int:
    names = (*SUITES, *ON_REQUEST)
    parser = argparse.ArgumentParser(prog="python -m lora_kernels bench", description=__doc__)
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help=f"of {', '.join(names)} (default: all but the last two)"
    )
    parser.add_argument(
        "--full", action="store_true", help="every problem, more rounds; goes on where it was interrupted"
    )
    parser.add_argument("--fresh", action="store_true", help="measure again what the result files have already")
    parser.add_argument("--without", nargs="+", default=[], metavar="PROVIDER", choices=providers.MODULES,
                        help=f"leave out, of {', '.join(providers.MODULES)}")  # fmt: skip
    parser.add_argument("--compare", nargs=2, metavar=("A.json", "B.json"), help="what B made faster or slower than A")
    parser.add_argument("--anyway", action="store_true", help="compare results of different devices, too")
    arguments = parser.parse_args(argv)
    if arguments.compare:
        return compare.main(*arguments.compare, arguments.anyway)
    if unknown := set(arguments.names) - set(names):
        parser.error(f"no suite {', '.join(sorted(unknown))}; there are {', '.join(names)}")
    refuse_interpreter()
    for name in arguments.names or SUITES:
        if name in ON_REQUEST:
            import_module(f"benchmarks.{name}").main(arguments.full)
        else:
            suite = import_module(f"benchmarks.suites.{name}").SUITE
            _run(suite, arguments.full, arguments.fresh, tuple(arguments.without))
    _draw()
    return 0


def _run(suite, full, fresh, without):
    device = torch.device("cpu") if suite.name == "cpu" else local_device()
    if not suite.problems[device.type]:
        print(f"{suite.title}: not run, it needs a GPU and torch sees none\n")
        return
    rows = (record := runner.run(suite, device, full, fresh, without))["rows"]
    columns, lines = (MEMORY, memory_table) if suite.name == "memory" else (COLUMNS, table)
    show(f"{suite.title}: {record['device']}", path_of(suite.name, device), columns, lines(rows))
    reasons = dict.fromkeys((row["provider"], row["gate"]) for row in rows if "peak_mib" not in row)
    for name, why in (*record["not_run"].items(), *reasons):
        print(f"no figure: {name}: {why}")
    print()


def _draw():
    try:
        from benchmarks import plots
    except ImportError as error:
        print(f"no plots: {providers.reason(error)}")
        return
    plots.main()


def table(rows: list[dict]) -> list[list[str]]:
    """The rows with figures for reading, a section for each problem and pass."""
    lines, head = [], None
    for row in rows:
        if head != (head := (row["problem"], row["pass"])):
            lines += [[], [f"[bold]{row['problem']}, {row['pass']}[/bold]"]]
        if "median_us" in row:
            low, high = row["quartiles_us"]
            lines.append([
                f"  {row['provider']}", f"{row['median_us'] / 1e3:.3f}", f"{low / 1e3:.3f} - {high / 1e3:.3f}",
                f"{row['ratio_to_base']:.3f}", f"{row['of_roofline']:.0%}", f"{row['tflop_s']:.3g}", f"{row['gb_s']:.3g}",
                str(row["launches"] or "-"), f"{row['peak_mib']:.1f}",
            ])  # fmt: skip
    return lines


def memory_table(rows: list[dict]) -> list[list[str]]:
    """As `table`, of the suite that times nothing."""
    lines, head = [], None
    for row in rows:
        if head != (head := row["problem"]):
            lines += [[], [f"[bold]{head}[/bold]"]]
        if "peak_mib" in row:
            figures = [f"{row[name]:.2f}" for name in ("saved_mib", "peak_mib", "scratch_mib")]
            lines.append([f"  {row['provider']}", *figures, str(row["launches"] or "-")])
    return lines


if __name__ == "__main__":
    raise SystemExit(main())
