"""Tuned tables: what `python -m lora_kernels tune` measured on one device, one JSON file a device, as package data.

A table is read once, on the first choice made for its device. A file or an entry that cannot be used is named in an error
of the logger `lora_kernels` and left out, so that the heuristics decide: no call fails for it. docs/tuning.md has the format.
"""

import functools
import json
import logging
import re
from dataclasses import fields
from pathlib import Path
from typing import NamedTuple

from lora_kernels.configs import STRATEGIES, Config, legality

SCHEMA = 1
DIRECTORY = Path(__file__).parent
ITEMSIZES = {"bfloat16": 2, "float16": 2}  # which fp32 kernel is best depends on torch's tf32 switch: not tuned
LARGEST_BUCKET = 2**20

logger = logging.getLogger("lora_kernels")


class Key(NamedTuple):
    """What a measured choice holds for. `op` is a kernel, or an operation (of `configs.STRATEGIES`) that has strategies.

    An output `[m, n]` is summed over k; m is a bucket. `kn` says that the wide operand lies in memory as `[k, n]`, as
    for dx. Rows lie on 16-byte boundaries.
    """

    op: str
    m: int
    n: int
    k: int
    r: int
    dtype: str
    dropout: bool = False
    kn: bool = False


class Choice(NamedTuple):
    """A measured choice, a `Config` or the name of a strategy, and where it comes from."""

    value: Config | str
    why: str


class Table(NamedTuple):
    """The choices of one device by `Key`, and what is wrong with the rest of its file."""

    choices: dict[Key, Choice]
    problems: list[str]


def bucket(m: int) -> int:
    """The bucket of m rows: the next power of two."""
    return min(1 << max(m - 1, 0).bit_length(), LARGEST_BUCKET)


def path_for(device: str) -> Path:
    """The file of a device, e.g. nvidia-h200.json for "NVIDIA H200"."""
    return DIRECTORY / f"{re.sub('[^a-z0-9]+', '-', device.lower()).strip('-')}.json"


@functools.cache
def table(device: str) -> dict[Key, Choice]:
    """The choices for a device by its name; none without a file. What is wrong with the file is logged, once."""
    path = path_for(device)
    if not device or not path.exists():
        return {}
    choices, problems = read(path, device)
    for problem in problems:
        logger.error("%s; the heuristics decide instead (make it anew with `python -m lora_kernels tune`)", problem)
    return choices


def read(path: Path, device: str | None = None) -> Table:
    """A tuned table from its file, which has to be of `device` if that is given. Raises nothing but OSError."""
    try:
        content = json.loads(path.read_text())
        entries = content["entries"]
        name, capability, schema = content["device"], content["capability"], content["schema"]
        complete = all((isinstance(entries, list), isinstance(name, str), isinstance(capability, int)))
    except (ValueError, KeyError, TypeError) as error:
        return Table({}, [f"{path}: not a tuned table: {type(error).__name__}: {error}"])
    if schema != SCHEMA or not complete or content.get("dry_run"):
        kind = "a dry run" if content.get("dry_run") else f"schema {schema!r}, expected {SCHEMA}"
        return Table({}, [f"{path}: {kind}"])
    if device is not None and name != device:
        return Table({}, [f"{path}: measured on {name!r}, but this is {device!r}"])
    choices, problems = {}, []
    for index, entry in enumerate(entries):
        try:
            key, choice = _parse(entry, name, capability)
            if key in choices:
                raise ValueError("the same problem as an entry before it")
            choices[key] = choice
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            reason = f"no {error}" if isinstance(error, KeyError) else error
            problems.append(f"{path}: entry {index}, {_named(entry)}: {reason}")
    return Table(choices, problems)


def _parse(entry, device, capability) -> tuple[Key, Choice]:
    """An entry's key and choice; raises ValueError, KeyError or TypeError where it is none, or not legal."""
    key = Key(**{name: entry[name] for name in Key._fields})
    if key.op not in (*STRATEGIES, *legality.KERNELS):
        raise ValueError(f"op={key.op!r}, expected one of {', '.join((*STRATEGIES, *legality.KERNELS))}")
    for name in ("m", "n", "k", "r"):
        if type(getattr(key, name)) is not int or getattr(key, name) < 1:
            raise ValueError(f"{name}={getattr(key, name)!r}, expected a positive integer")
    if bucket(key.m) != key.m:
        raise ValueError(f"m={key.m}, expected a bucket, a power of two")
    if key.dtype not in ITEMSIZES:
        raise ValueError(f"dtype={key.dtype!r}, expected one of {', '.join(ITEMSIZES)}")
    best, usual = (figures["median_us"] for figures in (entry["figures"], entry["heuristic"]["figures"]))
    commit = str(entry["commit"])[:10]
    why = f"measured on {device}, {best:.1f} µs (the heuristics' choice took {usual:.1f} µs), commit {commit}"
    if key.op in STRATEGIES:
        if entry["strategy"] not in STRATEGIES[key.op]:
            raise ValueError(f"strategy={entry['strategy']!r}, expected one of {', '.join(STRATEGIES[key.op])}")
        return key, Choice(entry["strategy"], why)
    if unknown := entry["config"].keys() - {field.name for field in fields(Config)}:
        raise ValueError(f"config has {', '.join(sorted(unknown))}, which this version does not know")
    config = Config(**entry["config"])
    itemsize = ITEMSIZES[key.dtype]
    if reasons := legality.reasons_illegal(key.op, config, capability, itemsize, key.r, key.m, key.dropout):
        raise ValueError("; ".join(reasons))
    return key, Choice(config, why)


def _named(entry):
    if not isinstance(entry, dict):
        return repr(entry)
    return " ".join(f"{name}={entry[name]}" for name in Key._fields if name in entry)
