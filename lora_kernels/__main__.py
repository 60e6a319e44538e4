"""The command line: `python -m lora_kernels info | explain | demo | bench | tune | compile`."""

import argparse
import importlib
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parent.parent
DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32", "fp64": "float64"}


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = _parser()
    arguments, rest = parser.parse_known_args(argv)
    if rest and not arguments.forwards:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    return arguments.run(arguments, rest) or 0


def _parser():
    parser = argparse.ArgumentParser(prog="python -m lora_kernels", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name, run, summary, forwards=False):
        command = commands.add_parser(name, help=summary, description=summary, add_help=not forwards)
        command.set_defaults(run=run, forwards=forwards)
        return command

    add("info", _info, "versions, the device, and which backends work here and why not")
    _add_explain_arguments(add("explain", _explain, "which kernel runs a problem, why, and what it should cost"))
    add(
        "demo",
        _forward_to("demo"),
        "fine-tune two adapters on a real model, serve 32; --qlora: over a base in 4 bits (--help for options)",
        forwards=True,
    )
    add(
        "bench",
        _benchmarks("benchmarks"),
        "time ours against every rival that is installed; simulate a pool (--help for options)",
        forwards=True,
    )
    add(
        "tune",
        _benchmarks("benchmarks.tune"),
        "search for the fastest tiles and strategies on this GPU (--help)",
        forwards=True,
    )
    add("compile", _forward_to("static_gate"), "cross-compile every kernel and check the machine code", forwards=True)
    return parser


def _add_explain_arguments(explain):
    for name, meaning in (("m", "rows of x"), ("n", "output features"), ("k", "input features"), ("r", "rank")):
        explain.add_argument(f"--{name}", type=int, required=True, help=meaning)
    explain.add_argument("--dtype", choices=DTYPES, default="bf16", help="of x and the base weight (default: bf16)")
    explain.add_argument("--dropout", action="store_true", help="with dropout on the adapter's input")
    explain.add_argument("--adapters", type=int, metavar="8", help="of lora_linear_batched, with as many in the batch")
    explain.add_argument(
        "--device-capability", type=int, metavar="90", help="e.g. 90 for sm_90 (default: the local device)"
    )
    explain.add_argument(
        "--weight-format", metavar="nf4", help="of a quantised base weight: where it is dequantised, and why"
    )
    explain.add_argument("--backend", help="ask for this backend")
    explain.add_argument("--strategy", help="ask for this strategy")


def _explain(arguments, _):
    import torch

    from lora_kernels import explain

    try:
        explanation = explain(
            arguments.m,
            arguments.n,
            arguments.k,
            arguments.r,
            getattr(torch, DTYPES[arguments.dtype]),
            capability=arguments.device_capability,
            dropout=arguments.dropout,
            backend=arguments.backend,
            strategy=arguments.strategy,
            adapters=arguments.adapters,
            weight_format=arguments.weight_format,
        )
    except (ValueError, NotImplementedError) as error:
        print(error, file=sys.stderr)
        return 1
    print(explanation)


def _info(*_):
    import torch

    from lora_kernels import __version__
    from lora_kernels.backends import BACKENDS, ON_REQUEST, cpu_library, cuda_library, triton
    from lora_kernels.dispatch import Problem

    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    target = triton.target(device)
    for name, version in (("lora_kernels", __version__), ("python", platform.python_version())):
        print(f"{name:<13} {version}")
    for package in ("torch", "triton", "safetensors", "peft", "transformers"):
        print(f"{package:<13} {_version(package)}")
    if device.type == "cuda":
        print(f"device        {torch.cuda.get_device_name(device)}, sm_{target.capability}, {target.num_sms} SMs")
    else:
        print(f"device        CPU, {torch.get_num_threads()} threads; torch sees no GPU")
    problem = Problem(
        m=4096, n=4096, k=4096, r=16, dtype=torch.bfloat16, lora_dtype=torch.bfloat16, dropout=False,
        device=device.type, capability=target.capability, num_sms=target.num_sms, tma=target.tma,
    )  # fmt: skip
    for name, backend in BACKENDS.items():
        try:
            reasons = backend.reasons_unsupported(problem)
        except ValueError as error:  # of LORA_KERNELS_CPU_ISA
            reasons = [str(error)]
        print(f"{name:<13} {'not usable here: ' + '; '.join(reasons) if reasons else 'usable'}")
    if isinstance(reason := cpu_library.library(), str):
        print(f"csrc/cpu      not usable here: {reason}")
    else:
        sets = (
            name if there else f"{name} (not on this machine)" for name, there in cpu_library.instruction_sets().items()
        )
        print(f"csrc/cpu      the CPU's kernels; built for {', '.join(sets)}; uses {_instruction_set()}")
    if isinstance(reason := cuda_library.library(), str):
        print(f"csrc/cuda     not usable here: {reason}")
    else:
        built = f"batched inference of up to 16 rows on a GPU; built for {cuda_library.architectures()}"
        print(f"csrc/cuda     {built}; on request only: {ON_REQUEST['cuda']}")


def _instruction_set():
    from lora_kernels.backends import cpu_library

    try:
        return cpu_library.instruction_set()
    except ValueError as error:
        return f"none: {error}"


def _version(package):
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _forward_to(module):
    def run(_, rest):
        return importlib.import_module(f"lora_kernels.{module}").main(rest)

    return run


def _benchmarks(module):
    def run(arguments, rest):
        if not (CHECKOUT / "benchmarks").is_dir():
            why = "the benchmarks are not part of the installed package; run it in a checkout"
            print(f"{arguments.command}: {why}", file=sys.stderr)
            return 1
        return subprocess.call([sys.executable, "-m", module, *rest], cwd=CHECKOUT)

    return run


if __name__ == "__main__":
    sys.exit(main())
