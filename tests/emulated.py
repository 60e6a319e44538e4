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
    "-std=c++17 -fPIC -shared -Wall -Wextra -Werror -Wno-unknown-pragmas "
    '-DLORA_CUDA_ARCHITECTURES="emulated" -I tests/emulator -I csrc/cuda -I csrc -x c++'
).split()


EVERY_KERNEL = """\
  const bool few = p.rows <= 8;
  if (p.dtype == LORA_BF16)
    return few ? launch_kernel<bf16, 1, Weights>(p, stream) : launch_kernel<bf16, 2, Weights>(p, stream);
  return few ? launch_kernel<fp16, 1, Weights>(p, stream) : launch_kernel<fp16, 2, Weights>(p, stream);
"""
ONE_KERNEL = "  return launch_kernel<fp16, 2, Weights>(p, stream);\n"


class Emulator:
    """An emulated library, called as the compiled one; a launch may read its operands and nothing beside them."""

    def __init__(self, library, infix=""):
        library.emulator_seed.argtypes = (ctypes.c_uint64,)
        library.emulator_allow.argtypes = (ctypes.c_void_p, ctypes.c_uint64)
        self.library, self.seed, self.shared_bytes = library, library.emulator_seed, library.emulator_shared_bytes
        self.infix = infix

    def allow(self, begin, rows, stride, columns, itemsize=2):
        if begin and rows:
            self.library.emulator_allow(begin, ((rows - 1) * stride + columns) * itemsize)

    def lora_cuda_decode(self, p, stream):
        self.allow(p.w, _columns(p), p.stride_wn, (p.k - 1) * p.stride_wk + 1)
        self.allow_rest(p)
        return self.launch("decode", p, stream)

    def lora_cuda_decode_nf4(self, p, stream):
        size = _columns(p) * p.k
        self.allow(p.w, 1, 0, size // 2, itemsize=1)
        self.allow(p.absmax, 1, 0, -(-size >> p.block_shift), itemsize=4)
        self.allow_rest(p)
        return self.launch("decode_nf4", p, stream)

    def launch(self, name, p, stream):
        launch = self.library[f"lora_cuda_{self.infix}{name}"]
        launch.argtypes = (ctypes.POINTER(cuda_library.Decode), ctypes.c_void_p)
        launch.restype = ctypes.c_char_p
        return launch(p, stream)

    def allow_rest(self, p):
        slices, n = p.slices[: p.num_slices], _columns(p)
        self.allow(p.x, p.rows, p.stride_x, p.k)
        self.allow(p.bias, 1, 0, n)
        self.allow(p.planes, p.parts * p.rows * p.adapters_per_row, p.stride_h, p.stride_h, itemsize=4)
        for one in slices:
            for rank, row in zip(
                _array(one.ranks, ctypes.c_int32, p), _array(one.first_row, ctypes.c_int64, p), strict=True
            ):
                self.allow(one.a + row * p.k * 2, rank, p.k, p.k)
                of_rank = one.stride_bn == 1  # else there is room for the largest, and whole chunks are read
                self.allow(one.b + row * one.width * 2, rank if of_rank else one.max_rank, one.width, one.width)


def _columns(p):
    return sum(one.width for one in p.slices[: p.num_slices])


def _array(address, kind, p):
    return (kind * p.num_slots).from_address(address)


def _sources(*names):
    """What includes there are, and the kernels in one piece behind them."""
    text = "".join((KERNELS / name).read_text() for name in ("decode.h", *names))
    lines = text.replace('#include "decode.h"\n', "").replace("#pragma once\n", "").splitlines(keepends=True)
    includes = [line for line in lines if line.startswith("#include")]
    return "".join(includes), "".join(line for line in lines if line not in includes)


@functools.cache
def build() -> Emulator:
    """The kernels, emulated."""
    return Emulator(_compiled("".join(_sources("decode.cu", "nf4.cu")), "-O1"))


def build_faulty(source: str, faults: dict[str, tuple[str, str]]) -> dict[str, Emulator]:
    """For each name the kernels for fp16 and 16 rows with a piece of `source` replaced by another; in one compilation."""
    includes, kernels = _sources(source)
    kernels, sources = _replace(kernels, EVERY_KERNEL, ONE_KERNEL), []
    for i, (piece, by) in enumerate(faults.values()):
        renamed = (
            _replace(kernels, piece, by).replace("lora_cuda_", f"lora_cuda_{i}_").replace("#define EXPORT", "#define E")
        )
        sources.append(f"namespace faulty_{i} {{\n{renamed}\n}}\n")
    export = '#define EXPORT extern "C" __attribute__((visibility("default")))\n'
    library = _compiled(includes + export + "".join(sources), "-O0")
    return {name: Emulator(library, f"{i}_") for i, name in enumerate(faults)}


def _compiled(source, optimization):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "decode.cu")
        path.write_text(source)
        target = path.with_suffix(".so")
        subprocess.run([COMPILER, optimization, *FLAGS, str(path), "-o", str(target)], check=True, cwd=ROOT)
        return ctypes.CDLL(str(target))


def _replace(source, piece, by):
    if piece not in source:
        raise ValueError(f"csrc/cuda has no {piece!r}")
    return source.replace(piece, by, 1)


@contextlib.contextmanager
def emulating(emulator):
    """Inside, `backend="cuda"` is `emulator` on the CPU, whose sums over K come in parts for short K too."""

    def reasons_unsupported(problem):
        return real(problem._replace(device="cuda", capability=80))

    real = cuda_batched.reasons_unsupported
    choose.cache_clear()
    with (
        mock.patch.object(cuda_library, "library", lambda: emulator),
        mock.patch.multiple(cuda_batched, reasons_unsupported=reasons_unsupported, STEPS_A_PART=1),
    ):
        yield emulator
    choose.cache_clear()
