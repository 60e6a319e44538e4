"""The static gate: every kernel x dtype x architecture x row of the tile tables, compiled and judged without a GPU.

What is compiled is what would be launched: the backend runs on tensors without data, with `launch` replaced by a
recorder. The figures are recorded in tests/resources/static_gate.json, so that a diff shows a regression.
"""

import argparse
import functools
import hashlib
import inspect
import itertools
import json
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
from triton import knobs

from lora_kernels import configs, formats, machine_code
from lora_kernels.adapters.plan import BatchPlan, LayerAdapters
from lora_kernels.backends import dequantized, launcher, operands, triton_batched, triton_shared
from lora_kernels.backends import triton as backend
from lora_kernels.configs import legality, tuned
from lora_kernels.configs.legality import SHARED_LIMIT
from lora_kernels.dispatch import Problem
from lora_kernels.gate_cases import Case, cases_of, zeros

RECORD = Path(__file__).resolve().parent.parent / "tests" / "resources" / "static_gate.json"
WORKERS = 2
SAMPLE = 40
MEANT = ("a load of", "waits for all wgmma")  # over quantised weights: narrow scales, and operands out of registers
SHORT = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


class Variant(NamedTuple):
    """A launch, with the architecture to compile it for."""

    name: str
    capability: int
    kernel: Any
    args: tuple
    constants: dict
    config: configs.Config
    aligned: bool


class Result(NamedTuple):
    name: str
    figures: dict | None
    problems: list[str]


def variants(capabilities=configs.ARCHITECTURES) -> list[Variant]:
    """Every distinct launch of every case under every row of the tables, shipped tuned ones too, sorted by name."""
    found = {}
    for capability in capabilities:
        for row in (*configs.architecture(capability).ROWS, *_tuned_rows(capability)):
            for case in cases_of(row):
                for variant in variants_of(case, row, capability):
                    key = (variant.constants, variant.config, *map(launcher._specialization, variant.args))
                    if variant.name in found and found[variant.name][0] != key:
                        raise RuntimeError(f"two different launches are both called {variant.name!r}")
                    if variant.name not in found or case.aligned:
                        found[variant.name] = key, variant
    return [variant for _, (_, variant) in sorted(found.items())]


def _tuned_rows(capability):
    """A row for every tile of the tuned tables of this architecture, for problems such as it was measured for."""
    for path in sorted(tuned.DIRECTORY.glob("*.json")):
        if json.loads(path.read_text())["capability"] != capability:
            continue
        for key, choice in tuned.read(path).choices.items():
            if key.op not in configs.STRATEGIES:
                row = configs.Row(key.op, choice.value, max_rank=key.r, max_m=key.m, dropout=key.dropout)
                yield replace(row, unaligned=False)


def variants_of(case: Case, row: configs.Row, capability: int, num_sms: int | None = None) -> list[Variant]:
    """The launches of `case` on sm_`capability`, with `row`'s tile for its kernel wherever that is legal."""
    recorded = []
    goal = backend.Target(capability, num_sms or configs.architecture(capability).NUM_SMS, tma=capability >= 90)

    def lookup(kernel, goal, dtype, m, n, k, r, dropout, aligned, kn):
        if row.fits(kernel, dtype.itemsize, m, r, dropout, aligned):
            return row.config
        return configs.lookup(kernel, goal.capability, dtype.itemsize, m, n, r, goal.num_sms, dropout, aligned)

    def record(kernel, grid, args, constants, config):
        name = _name(capability, kernel, args, constants, config)
        recorded.append(Variant(name, capability, kernel, args, constants, config, case.aligned))

    with (
        mock.patch.object(backend, "target", lambda device: goal),
        mock.patch.object(backend, "_lookup", lookup),
        mock.patch.object(backend, "launch", record),
        mock.patch.object(triton_batched, "launch", record),
        mock.patch.object(dequantized, "launch", record),
        mock.patch.object(backend, "tf32_allowed", lambda: case.tf32),
    ):
        _run(case, row, goal)
    return recorded


def reasons_illegal(
    case: Case, row: configs.Row, capability: int, num_sms: int | None = None, kn: bool = False, keep: bool = False
) -> list[str]:
    """Why `row`'s tile cannot run `case` on sm_`capability`; where the rules know nothing, the compiler is asked.

    Of launches with a wide operand only those where it lies as `kn` says. What compiles is left in Triton's cache with `keep`.
    """
    dropout = case.dropout_p > 0.0
    reasons = legality.reasons_illegal(row.kernel, row.config, capability, row.itemsize, case.r, case.m, dropout)
    if reasons or capability == configs.INTERPRETER:
        return reasons
    launches = {
        variant.name: variant
        for variant in variants_of(case, row, capability, num_sms)
        if variant.config == row.config and variant.constants.get("KN", variant.constants.get("LAYOUT", kn)) == kn
    }
    return [problem for variant in launches.values() for problem in check(variant, keep).problems]


def _run(case, row, goal):
    """Forward and backward pass of `case` on tensors without data, under the strategy that launches `row`'s kernel."""
    kernel = row.kernel.removeprefix("quantized_")
    strategy = kernel if kernel in backend.STRATEGIES else "chained"
    lora_dtype = case.lora_dtype or case.dtype
    x, weight, dy = (_empty(case.dtype, *shape) for shape in ((case.m, case.k), (case.n, case.k), (case.m, case.n)))
    lora_a, lora_b = _empty(lora_dtype, case.r, case.k), _empty(lora_dtype, case.n, case.r)
    bias = _empty(case.dtype, case.n) if case.bias else None
    scaling = _empty(torch.float32) if case.scaling_on_device else 2.0
    dropout = (case.dropout_p, _empty(torch.int64) if case.dropout_p else None)
    if case.weight is not None:
        weight = zeros(case)
    if row.kernel == "dequantize":
        dequantized.dequantize(weight, _empty(case.dtype, case.n, case.k))
        return
    if kernel.startswith("batched_"):
        _run_batched(case, kernel, x[: row.max_m], weight, bias)
        return
    tma = case.weight is None and backend.tma_applies(x, weight, lora_a, lora_b)
    problem = Problem(
        m=case.m, n=case.n, k=case.k, r=case.r, dtype=case.dtype, lora_dtype=lora_dtype, dropout=case.dropout_p > 0,
        device="cuda", capability=goal.capability, num_sms=goal.num_sms, tma=tma, tf32=case.tf32,
    )  # fmt: skip
    if backend.strategy_reasons_unsupported(strategy, problem):
        return
    y, h = backend.forward(x, weight, bias, lora_a, lora_b, scaling, *dropout, strategy)
    if case.weight is not None:
        return
    for needs in ((True, True, True), (False, False, True)):
        backend.backward(dy, x, h, weight, lora_a, lora_b, scaling, *dropout, needs, strategy)
    for activation in ("silu", "gelu_tanh"):
        triton_shared.glu_backward(triton_shared.glu(y, y, activation), y, y, activation)


def _run_batched(case, kernel, x, weight, bias):
    slots, several = 8, (case.per_row,) if case.per_row > 1 else ()
    rows = (slots * case.r,) if case.packed else (slots, case.r)
    tables = _empty(torch.int32, slots), _empty(torch.float32, slots)
    packing = (_empty(torch.int64, slots), case.r) if case.packed else ()
    adapters = tuple(
        LayerAdapters(
            _empty(case.dtype, *rows, case.k),
            _empty(case.dtype, *((*rows, width) if case.packed else (slots, width, case.r))),
            *tables,
            *packing,
        )
        for width in case.widths or (case.n,)
    )
    entries = _empty(torch.int32, x.shape[0], *several)
    plan = BatchPlan.of_parts(
        entries, _empty(torch.float32, *entries.shape) if several else None, *3 * [entries.view(-1)]
    )
    strategy = kernel.removeprefix("batched_")
    triton_batched.forward(x, weight, bias, adapters, plan, "chained" if strategy == "shrink" else strategy)


def _empty(dtype, *shape):
    return torch.empty(shape, dtype=dtype, device="meta")


def _name(capability, kernel, args, constants, config) -> str:
    """Architecture, kernel, dtypes, constexprs, the integers that are 1 or not a multiple of 16, launch shape."""
    named = [
        (f"{name}{i}" if isinstance(arg, tuple) else name, item)
        for name, arg in zip(kernel.arg_names, args, strict=False)
        for i, item in enumerate(arg if isinstance(arg, tuple) else (arg,))
    ]
    tensors = [getattr(arg, "base", arg) for _, arg in named]
    dtypes = [SHORT.get(tensor.dtype) for tensor in tensors if isinstance(tensor, torch.Tensor)]
    switches = {**constants, "ACC": False, "PRECISION": constants.get("PRECISION") == "tf32" and "tf32"}
    if "LOAD" in switches:
        of_w = _weight_switches(switches.pop("LOAD"), switches["LAYOUT"], args[kernel.arg_names.index("w")])
        items = (of_w.items() if name == "LAYOUT" else [(name, value)] for name, value in switches.items())
        switches = dict(itertools.chain.from_iterable(items))
    settings = [name if value is True else f"{name}={value}" for name, value in switches.items() if value is not False]
    settings += [f"slices={len(arg)}" for name, arg in zip(kernel.arg_names, args, strict=False) if name == "ranks"]
    integers = [(name, arg) for name, arg in named if isinstance(arg, int)]
    settings += [f"one={name}" for name, arg in integers if arg == 1]
    odd = ",".join(name for name, arg in integers if arg != 1 and arg % 16)
    settings += [f"odd={odd}"] if odd else []
    return " ".join(
        (f"sm_{capability}", kernel.__name__, *dict.fromkeys(filter(None, dtypes)), *settings,
         f"warps={config.num_warps}", f"stages={config.num_stages}")
    )  # fmt: skip


def _weight_switches(load, layout, w) -> dict:
    if load is operands.loads("dense"):
        return {"KN": layout}
    return {load.__name__: ",".join(map(str, layout)) or True, "operands": sum(item is not None for item in w)}


def check(variant: Variant, keep: bool = False) -> Result:
    """Compile, measure and judge one variant."""
    try:
        code = machine_code.compile_launch(*variant[2:6], variant.capability, keep)
    except Exception as error:  # the compiler's own: none of its exceptions share a base class
        return Result(variant.name, None, [f"does not compile: {type(error).__name__}: {str(error).strip()[:200]}"])
    figures, load = machine_code.measure(code), variant.constants.get("LOAD")
    quantized = load is not None and load is not operands.loads("dense")
    problems = machine_code.judge(code, figures, variant.aligned)
    if not quantized or not figures.mma:
        return Result(variant.name, asdict(figures), problems)
    problems = [problem for problem in problems if not any(words in problem for words in MEANT)]
    config, most = variant.config, formats.named(load.__name__).INSTRUCTIONS
    weights_a_thread = config.block_n * config.block_k / (32 * config.num_warps)
    per_weight = round(figures.loop_length / weights_a_thread, 2)
    if "one_launch" in variant.kernel.__name__ and config.block_m == 16 and per_weight > most:
        problems.append(f"{per_weight} instructions a weight > {most}")
    return Result(variant.name, asdict(figures) | {"per_weight": per_weight}, problems)


def digest(variant: Variant) -> str:
    """Of all that its machine code and the judgement follow from, but for the versions of the tools."""
    specialised = [str(launcher._specialization(arg)) for arg in variant.args]
    judge = inspect.getsource(machine_code), SHARED_LIMIT
    constants = {name: getattr(value, "cache_key", value) for name, value in variant.constants.items()}
    parts = variant.kernel.cache_key, specialised, sorted(map(str, constants.items())), variant.config, judge
    return hashlib.sha256(repr((parts, variant.capability, variant.aligned)).encode()).hexdigest()[:16]


def regressions(figures: dict | None, recorded: dict | None) -> list[str]:
    """How `figures`, if there are any, are worse than those in the record."""
    if figures is None:
        return []
    if recorded is None:
        return ["not in the record (add it with --update)"]
    worse = []
    for name, value in figures.items():
        before = recorded[name]
        higher_is_better = name in ("buffers", "wait_depth", "async_copies", "narrowest_load")
        if isinstance(value, dict) or value is None or before is None:
            is_worse = value != before
        else:
            is_worse = value < before if higher_is_better else value > before
        if is_worse:
            worse.append(f"{name} was {before}, is {value}")
    return worse


def versions() -> dict[str, str]:
    tools = {"ptxas": knobs.nvidia.ptxas, "ptxas_blackwell": knobs.nvidia.ptxas_blackwell}
    return {"triton": triton.__version__, **{name: tool.version for name, tool in tools.items()}}


def write_record(path: Path, results: dict[str, dict]):
    """One line per variant, so that a diff reads as a list of what changed."""
    compact = functools.partial(json.dumps, separators=(",", ":"))
    lines = [f"{compact(name)}: {compact(figures)}" for name, figures in sorted(results.items())]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f'{{"versions": {json.dumps(versions())},\n"variants": {{\n' + ",\n".join(lines) + "\n}}\n")


def main(argv: list[str] | None = None) -> int:
    """Run the gate; 1 if a variant has a problem or is worse than in the record."""
    parser = argparse.ArgumentParser(prog="python -m lora_kernels compile", description=__doc__.splitlines()[0])
    parser.add_argument("--arch", type=int, choices=configs.ARCHITECTURES, help="only this architecture")
    parser.add_argument("-k", metavar="WORDS", default="", help="only variants whose name has all these words")
    parser.add_argument(
        "--changed",
        action="store_true",
        help=f"only variants that are not as recorded in source, and every {SAMPLE}th of the others",
    )
    parser.add_argument("--update", action="store_true", help="record the figures instead of comparing with the record")
    parser.add_argument("--record", type=Path, default=RECORD, help="the record (default: that of the checkout)")
    parser.add_argument("--table", action="store_true", help="print the table of all figures, not only the problems")
    options = parser.parse_args(argv)
    if knobs.runtime.interpret:
        parser.error("TRITON_INTERPRET is set, and the interpreter compiles nothing; unset it")
    words = set(options.k.split())
    capabilities = (options.arch,) if options.arch else configs.ARCHITECTURES
    chosen = [variant for variant in variants(capabilities) if words <= set(variant.name.split())]
    names = {variant.name for variant in chosen}
    if not chosen:
        parser.error(f"no variant matches -k {options.k!r}")
    record = {"versions": versions(), "variants": {}}
    if options.record.exists():
        record = json.loads(options.record.read_text())
    if options.changed and record["versions"] == versions():
        known = [record["variants"].get(variant.name, {}).get("digest") == digest(variant) for variant in chosen]
        chosen = [variant for i, variant in enumerate(chosen) if not known[i] or i % SAMPLE == 0]
    results = _check_all(chosen)
    if options.update:
        narrowed = options.arch or options.k
        kept = {name: figures for name, figures in record["variants"].items() if narrowed or name in names}
        digests = {variant.name: digest(variant) for variant in chosen}
        passed = {r.name: r.figures | {"digest": digests[r.name]} for r in results if r.figures and not r.problems}
        write_record(options.record, kept | {r.name: r.figures for r in results if r.figures} | passed)
    elif record["versions"] != versions():
        print(f"recorded with {record['versions']}, but this is {versions()}: figures are not compared")
    else:
        results = [
            r._replace(problems=r.problems + regressions(r.figures, record["variants"].get(r.name))) for r in results
        ]
    _print(results, options.table)
    return int(any(result.problems for result in results))


def _check_all(chosen: list[Variant]) -> list[Result]:
    from rich.progress import track

    # fork: a variant holds kernels and constexprs, which do not pickle; its results do.
    with ProcessPoolExecutor(WORKERS, multiprocessing.get_context("fork"), _adopt, (chosen,)) as pool:
        return list(track(pool.map(_check_adopted, range(len(chosen))), "compiling", total=len(chosen)))


_adopted: list[Variant] = []


def _adopt(chosen):
    _adopted[:] = chosen


def _check_adopted(index):
    return check(_adopted[index])


def _print(results, with_table):
    """The table if asked for, then the problems as plain lines, which survive a narrow log."""
    from rich.console import Console
    from rich.table import Table

    if with_table:
        columns = [field.name for field in fields(machine_code.Figures)]
        table = Table("variant", *(name.replace("_", "\n") for name in columns), "problems")
        for name, figures, problems in results:
            table.add_row(name, *map(_cell, (figures or dict.fromkeys(columns)).values()), "\n".join(problems))
        Console().print(table)
    failed = [result for result in results if result.problems]
    for name, _, problems in failed:
        print(name, *problems, sep="\n    ")
    print(f"{len(results)} variants, {len(failed)} with problems")


def _cell(value) -> str:
    if isinstance(value, dict):
        return "\n".join(f"{name} x{count}" for name, count in value.items())
    return "" if value is None else str(value)
