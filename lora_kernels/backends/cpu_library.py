"""The compiled library of the CPU kernels, whose operators csrc/binding.cpp registers, and the instruction set that is used."""

import ctypes
import functools
import os
from pathlib import Path

import torch

PATH = Path(__file__).resolve().parent.parent / "_cpu.so"
ABI = 8  # LORA_ABI of csrc/lora.h
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def reasons_unsupported(problem) -> list[str]:
    """Why the compiled kernels cannot run `problem`; empty if they can. ValueError where LORA_KERNELS_CPU_ISA cannot be."""
    if problem.device != "cpu":
        return [f"x is on {problem.device}, not the CPU"]
    if isinstance(reason := library(), str):
        return [reason]
    instruction_set()
    return [] if problem.dtype in DTYPES else [f"{problem.dtype} is none of {', '.join(map(str, DTYPES))}"]


def strategy_reasons_unsupported(strategy, problem) -> list[str]:
    """Why `strategy` cannot run `problem`: never a reason."""
    return []


@functools.cache
def library() -> ctypes.CDLL | str:
    """The library, or why there is none. Its OpenMP is the one that torch has loaded: two would fight over the cores."""
    if not PATH.exists():
        return (
            "lora_kernels was installed without its CPU kernels "
            "(install g++ and torch 2.10 or newer, then lora_kernels again)"
        )
    try:
        found = ctypes.CDLL(str(PATH))
    except OSError as error:
        return f"its library does not load with torch {torch.__version__}, expected 2.10 or newer: {error}"
    if found.lora_abi() != ABI:
        return (
            f"its library is of other sources (version {found.lora_abi()}, expected {ABI}): install lora_kernels again"
        )
    found.lora_isa_name.restype = found.lora_maker.restype = ctypes.c_char_p
    return found


def instruction_sets() -> dict[str, bool]:
    """Those that the library was built for, the best first, and whether this machine has them."""
    sets, found = {}, library()
    while name := found.lora_isa_name(len(sets)):
        sets[name.decode()] = bool(found.lora_isa_supported(len(sets)))
    return sets


@functools.cache
def instruction_set() -> str:
    """The one in use: LORA_KERNELS_CPU_ISA, or the best; ValueError for one that is not built, or not of this machine."""
    sets = instruction_sets()
    usable = [name for name, supported in sets.items() if supported]
    asked = os.environ.get("LORA_KERNELS_CPU_ISA") or usable[0]
    if asked not in usable:
        why = "which this machine lacks" if asked in sets else "which is not built"
        raise ValueError(f"LORA_KERNELS_CPU_ISA: got {asked!r}, {why}, expected one of {', '.join(usable)}")
    return asked


@functools.cache
def measured_as() -> tuple[str, str]:
    """The processor as configs/cpu.py knows it: its maker (intel, amd or other), and the instruction set in use."""
    return library().lora_maker().decode(), instruction_set()


def multiplies_base(x, weight, rows) -> bool:
    """Whether the base layer's product, with x or dy, is one call with the adapters: `rows` is a table of configs/cpu.py."""
    first, last = rows.get((*measured_as(), str(x.dtype)), (1, 0))
    return first <= x.shape[0] <= last and weight.shape[0] >= 16 and weight.stride(1) == 1


def in_pairs(x):
    """x, or a copy, whose rows are whole pairs of elements: an odd last one has a zero beside it."""
    m, k = x.shape
    if x.dtype == torch.float32 or (k % 2 == x.stride(0) % 2 == 0 and x.data_ptr() % (2 * x.itemsize) == 0):
        return x
    padded = x.new_zeros(m, k + k % 2)
    padded[:, :k] = x
    return padded[:, :k]


@functools.cache
def operator(name):
    """The operator of that name, and the index of the instruction set in use."""
    index = list(instruction_sets()).index(instruction_set())
    return getattr(torch.ops.lora_kernels_cpu, name).default, index
