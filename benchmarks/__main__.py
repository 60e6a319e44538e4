"""Run the benchmarks: `python -m benchmarks [host] [train] [--full]`."""

import argparse

from benchmarks import host, train
from benchmarks.report import refuse_interpreter

BENCHMARKS = {"train": train.main, "host": host.main}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m lora_kernels bench", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"{' or '.join(BENCHMARKS)} (default: both)")
    parser.add_argument("--full", action="store_true", help="every shape and more repeats; default: under 3 minutes")
    arguments = parser.parse_args()
    if unknown := set(arguments.names) - set(BENCHMARKS):
        parser.error(f"no benchmark {', '.join(sorted(unknown))}; there are {', '.join(BENCHMARKS)}")
    refuse_interpreter()
    for name in arguments.names or BENCHMARKS:
        BENCHMARKS[name](arguments.full)


if __name__ == "__main__":
    main()
