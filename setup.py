"""Builds csrc where a C++ compiler is at hand: `LORA_KERNELS_BUILD=auto|cpu|none`; all else is in pyproject.toml."""

import os
import platform
import shlex
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

COMPILER = shlex.split(os.environ.get("CXX", "g++"))
# -ffp-contract=off: what is fused is written so, and no other function can round differently from its neighbour.
FLAGS = shlex.split("-std=c++17 -O2 -fPIC -fopenmp -ffp-contract=off -fvisibility=hidden -fno-exceptions -fno-rtti")
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq"]
SOURCES = {"csrc/binding.cpp": [], "csrc/cpu/generic.cpp": []}
if platform.machine() in ("x86_64", "AMD64"):
    SOURCES |= {"csrc/cpu/avx2.cpp": AVX2, "csrc/cpu/avx512.cpp": AVX512}
    SOURCES |= {"csrc/cpu/avx512_bf16.cpp": [*AVX512, "-mavx512bf16"]}
MODE = os.environ.get("LORA_KERNELS_BUILD", "auto")


class Build(build_ext):
    """A plain shared library: it knows neither Python nor torch, and takes OpenMP from the process that loads it."""

    def build_extension(self, ext):
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        target.unlink(
            missing_ok=True
        )  # a failure must not leave the library of other sources; nor may one in use change
        try:
            with ThreadPoolExecutor() as pool:
                objects = list(pool.map(self._compile, SOURCES))
            self.spawn([*COMPILER, "-shared", "-static-libgcc", *objects, "-o", str(target)])
        except Exception as error:
            if MODE == "cpu":
                raise
            missing = f"lora_kernels: without its CPU kernels ({error}); to get them, install g++ and install it again"
            print(missing, file=sys.stderr)

    def _compile(self, source):
        result = Path(self.build_temp, source).with_suffix(".o")
        result.parent.mkdir(parents=True, exist_ok=True)
        self.spawn([*COMPILER, *FLAGS, *SOURCES[source], "-c", source, "-o", str(result)])
        return str(result)

    def get_ext_filename(self, name):
        return os.path.join(*name.split(".")) + ".so"

    def get_outputs(self):
        return [path for path in super().get_outputs() if os.path.exists(path)]


class Wheel(bdist_wheel):
    """One wheel for every Python."""

    def get_tag(self):
        *_, system = super().get_tag()
        return "py3", "none", system


if MODE == "cuda":
    raise SystemExit("LORA_KERNELS_BUILD=cuda: CUDA kernels are still to come; use auto, cpu or none")
if MODE not in ("auto", "cpu", "none"):
    raise SystemExit(f"LORA_KERNELS_BUILD: got {MODE!r}, expected auto, cpu or none")
builds = MODE == "cpu" or (MODE == "auto" and sys.platform == "linux" and Path("csrc").is_dir())
setup(
    ext_modules=[Extension("lora_kernels._cpu", list(SOURCES), optional=MODE == "auto")] if builds else [],
    cmdclass={"build_ext": Build, "bdist_wheel": Wheel},
)
