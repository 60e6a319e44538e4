"""Builds csrc: `LORA_KERNELS_BUILD=auto|cpu|cuda|none`; cuda is both; only auto goes without what it cannot build."""

import os
import platform
import shlex
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

COMPILER = shlex.split(os.environ.get("CXX", "g++"))
# -ffp-contract=off: what is fused is written so, and no other function can round differently from its neighbour.
FLAGS = shlex.split("-std=c++17 -O2 -fPIC -fopenmp -ffp-contract=off -fvisibility=hidden -fno-exceptions -fno-rtti")
FLAGS += ["-fno-tree-loop-distribute-patterns"]  # a call of memcpy takes longer than most copies here
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq"]
SOURCES = {"csrc/binding.cpp": [], "csrc/cpu/generic.cpp": []}
if platform.machine() in ("x86_64", "AMD64"):
    SOURCES |= {"csrc/cpu/avx2.cpp": AVX2, "csrc/cpu/avx512.cpp": AVX512}
    SOURCES |= {f"csrc/cpu/{name}.cpp": [*AVX512, "-mavx512bf16"] for name in ("avx512_bf16", "amx")}
CUDA_SOURCES = ["csrc/cuda/decode.cu", "csrc/cuda/nf4.cu"]
ARCHITECTURES = {"80": "[sm_80,compute_80]", "90a": "sm_90a", "100": "sm_100"}  # others compile what is for 80
NVCC_FLAGS = shlex.split("-std=c++17 -O3 -shared -cudart=static -cudadevrt=none -Xcompiler=-fPIC,-fvisibility=hidden")
NVCC_FLAGS += ["-Xlinker=--exclude-libs=ALL", f'-DLORA_CUDA_ARCHITECTURES="sm_{", sm_".join(ARCHITECTURES)}"']
MODE = os.environ.get("LORA_KERNELS_BUILD", "auto")
LIBRARIES = {"auto": ["_cpu", "_cuda"], "cpu": ["_cpu"], "cuda": ["_cpu", "_cuda"], "none": []}


def find_nvcc():
    """CUDA_HOME's, the one in PATH, that of the package nvidia-cuda-nvcc, or the one in CUDA's usual place."""
    homes = [Path(os.environ[name]) for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    others = [home for entry in sys.path for home in Path(entry).glob("nvidia/cu1*")] + [Path("/usr/local/cuda")]
    before, after = (os.pathsep.join(str(home / "bin") for home in group) for group in (homes, others))
    return shutil.which("nvcc", path=os.pathsep.join(filter(None, (before, os.environ.get("PATH"), after))))


class Build(build_ext):
    """Plain shared libraries: they know neither Python nor torch; OpenMP comes from the process that loads them."""

    def build_extension(self, ext):
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        target.unlink(missing_ok=True)  # it must not stay after a failure, and one in use must not change
        kernels, compiler = ("CUDA", "nvcc") if ext.name.endswith("_cuda") else ("CPU", "g++")
        try:
            self._cuda(target) if kernels == "CUDA" else self._cpu(target)
        except Exception as error:
            if not ext.optional:
                raise
            remedy = f"to get them, install {compiler} and install it again"
            print(f"lora_kernels: without its {kernels} kernels ({error}); {remedy}", file=sys.stderr)

    def _cpu(self, target):
        with ThreadPoolExecutor() as pool:
            objects = list(pool.map(self._compile, SOURCES))
        self.spawn([*COMPILER, "-shared", "-static-libgcc", *objects, "-o", str(target)])

    def _compile(self, source):
        result = Path(self.build_temp, source).with_suffix(".o")
        result.parent.mkdir(parents=True, exist_ok=True)
        self.spawn([*COMPILER, *FLAGS, *SOURCES[source], "-c", source, "-o", str(result)])
        return str(result)

    def _cuda(self, target):
        nvcc = find_nvcc()
        if nvcc is None:
            raise FileNotFoundError("no nvcc in CUDA_HOME, PATH or the package nvidia-cuda-nvcc")
        options = [f"-gencode=arch=compute_{name},code={code}" for name, code in ARCHITECTURES.items()]
        options += [f"--threads={os.cpu_count()}", f"-L{Path(nvcc).parent.parent / 'lib'}"]  # where the package has it
        self.spawn([nvcc, *NVCC_FLAGS, *options, *CUDA_SOURCES, "-o", str(target)])

    def get_ext_filename(self, name):
        return os.path.join(*name.split(".")) + ".so"

    def get_outputs(self):
        return [path for path in super().get_outputs() if os.path.exists(path)]


class Wheel(bdist_wheel):
    """One wheel for every Python."""

    def get_tag(self):
        *_, system = super().get_tag()
        return "py3", "none", system


if MODE not in LIBRARIES:
    raise SystemExit(f"LORA_KERNELS_BUILD: got {MODE!r}, expected auto, cpu, cuda or none")
possible = MODE != "auto" or (sys.platform == "linux" and Path("csrc").is_dir())
sources = {"_cpu": list(SOURCES), "_cuda": CUDA_SOURCES}
libraries = [Extension(f"lora_kernels.{name}", sources[name], optional=MODE == "auto") for name in LIBRARIES[MODE]]
setup(ext_modules=libraries if possible else [], cmdclass={"build_ext": Build, "bdist_wheel": Wheel})
