"""Run the benchmarks: `python -m benchmarks [train] [host] [pool] [cpu] [cpu_roofline] [--full]`."""

import argparse
from importlib import import_module

from benchmarks.report import refuse_interpreter

TIMED = ("train", "host")
ON_REQUEST = ("pool", "cpu", "cpu_roofline")


def main() -> None:
    names = (*TIMED, *ON_REQUEST)
    parser = argparse.ArgumentParser(prog="python -m lora_kernels bench", description=__doc__)
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help=f"of {', '.join(names)} (default: {' and '.join(TIMED)})"
    )
    parser.add_argument("--full", action="store_true", help="every case and more repeats; default: under 3 minutes")
    arguments = parser.parse_args()
    if unknown := set(arguments.names) - set(names):
        parser.error(f"no benchmark {', '.join(sorted(unknown))}; there are {', '.join(names)}")
    refuse_interpreter()
    for name in arguments.names or TIMED:
        import_module(f"benchmarks.{name}").main(arguments.full)


if __name__ == "__main__":
    main()
