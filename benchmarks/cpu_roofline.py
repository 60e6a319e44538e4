"""What this CPU can do at most: multiplications a second of a core, and bytes a second of each cache and of the memory.

It compiles cpu_roofline.cpp with g++; the processor must have AVX-512.
"""

import ctypes
import subprocess
import tempfile
from pathlib import Path

import torch

from benchmarks import report

SIZES = {"L1": 16 << 10, "L2": 256 << 10, "L3": 4 << 20, "memory": 128 << 20}  # bytes a thread
LANES = {"fp32 FMA": 16, "bf16 dot": 32, "bf16 tiles": 16 * 16 * 32}  # multiplications of an instruction


def main(full: bool = False) -> None:
    repeats = 15 if full else 5
    with tempfile.TemporaryDirectory() as folder:
        library = _compile(Path(folder) / "roofline.so")
        rows = [row for threads in (1, torch.get_num_threads()) for row in run(library, threads, repeats)]
    method = f"the best of {repeats}; a thread's own; copies are counted once, reads and writes together"
    path = report.write("cpu_roofline", method, rows, torch.device("cpu"))
    table = [[str(row["threads"]), row["what"], f"{row['value']:.1f} {row['unit']}"] for row in rows]
    report.show("A thread's peaks", path, ["threads at once", "what", "peak"], table)


def run(library: ctypes.CDLL, threads: int, repeats: int) -> list[dict]:
    """A row for each peak of a thread, where `threads` run at once."""

    def row(what, unit, measure):
        return {"threads": threads, "what": what, "unit": unit, "value": round(max(map(measure, range(repeats))), 2)}

    rows = [
        row(name, "Gflop/s", lambda _, i=i, lanes=lanes: 2e-9 * lanes * library.multiplications(i, threads, 1 << 20))
        for i, (name, lanes) in enumerate(LANES.items())
    ]
    for name, size in SIZES.items():
        source, target = (torch.zeros(threads * size, dtype=torch.uint8) for _ in range(2))
        passes, a, b = max(1, (64 << 20) // size), source.data_ptr(), target.data_ptr()
        rows.append(row(f"{name} read", "GB/s", lambda _: 1e-9 * library.reads(a, size, threads, passes)))  # noqa: B023
        rows.append(row(f"{name} copy", "GB/s", lambda _: 1e-9 * library.copies(a, b, size, threads, passes)))  # noqa: B023
    return rows


def _compile(target):
    source = Path(__file__).with_suffix(".cpp")
    command = [
        "g++",
        "-std=c++17",
        "-O2",
        "-fopenmp",
        "-march=native",
        "-shared",
        "-fPIC",
        str(source),
        "-o",
        str(target),
    ]
    subprocess.run(command, check=True)
    library = ctypes.CDLL(str(target))
    int32, int64, pointer = ctypes.c_int32, ctypes.c_int64, ctypes.c_void_p
    library.multiplications.argtypes = (int32, int32, int64)
    library.reads.argtypes = (pointer, int64, int32, int64)
    library.copies.argtypes = (pointer, pointer, int64, int32, int64)
    for function in (library.multiplications, library.reads, library.copies):
        function.restype = ctypes.c_double
    return library
