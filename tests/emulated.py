"""The CUDA backend where there is no GPU: its kernels compiled by g++ against tests/emulator, on tensors of the CPU."""

import contextlib
import ctypes
import functools
import shutil
import subprocess
import tempfile
from pathlib import Path
from unittest import mock

from lora_kernels.backends import cuda_batched, cuda_library
from lora_kernels.dispatch import choose

ROOT = Path(__file__).resolve().parent.parent
KERNELS = ROOT / "csrc" / "cuda"
COMPILER = shutil.which("g++")
FLAGS = (
    "-std=c++17 -O1 -fPIC -shared -Wall -Wextra -Werror -Wno-unknown-pragmas "
    '-DLORA_CUDA_ARCHITECTURES="emulated" -I tests/emulator -I csrc/cuda -I csrc -x c++'
).split()


@functools.cache
def build(replaced: str = "", by: str = "") -> ctypes.CDLL:
    """The emulated kernels, with a piece of decode.cu replaced by another."""
    source = (KERNELS / "decode.cu").read_text()
    if replaced not in source:
        raise ValueError(f"decode.cu has no {replaced!r}")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "decode.cu")
        path.write_text(source.replace(replaced, by, 1) if replaced else source)
        target = path.with_suffix(".so")
        subprocess.run([COMPILER, *FLAGS, str(path), "-o", str(target)], check=True, cwd=ROOT)
        with mock.patch.object(cuda_library, "PATH", target):
            library = cuda_library.library.__wrapped__()
    library.emulator_seed.argtypes = (ctypes.c_uint64,)
    return library


@contextlib.contextmanager
def emulating(library):
    """Inside, `backend="cuda"` is `library` on the CPU, whose sums over K come in parts for short K too."""

    def reasons_unsupported(problem):
        return real(problem._replace(device="cuda", capability=80))

    real = cuda_batched.reasons_unsupported
    choose.cache_clear()
    with (
        mock.patch.object(cuda_library, "library", lambda: library),
        mock.patch.object(cuda_batched, "reasons_unsupported", reasons_unsupported),
        mock.patch.object(cuda_batched, "STEPS_A_PART", 1),
    ):
        yield library
    choose.cache_clear()
