"""The compilers of csrc, and their flags: setup.py builds with it."""

import os
import platform
import shlex
import shutil
import site
import sys
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

CXX = shlex.split(os.environ.get("CXX", "g++"))
# -ffp-contract=off: what is fused is written so, and no other function can round differently from its neighbour.
CXX_FLAGS = shlex.split("-std=c++17 -O2 -fPIC -fopenmp -ffp-contract=off -fvisibility=hidden -fno-exceptions -fno-rtti")
CXX_FLAGS += ["-fno-tree-loop-distribute-patterns"]  # a call of memcpy takes longer than most copies here
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq"]
CPU_SOURCES = {"csrc/cpu/scratch.cpp": [], "csrc/cpu/generic.cpp": []}
if platform.machine() in ("x86_64", "AMD64"):
    CPU_SOURCES |= {"csrc/cpu/avx2.cpp": AVX2, "csrc/cpu/avx512.cpp": AVX512}
    CPU_SOURCES |= {f"csrc/cpu/{name}.cpp": [*AVX512, "-mavx512bf16"] for name in ("avx512_bf16", "amx")}
# One build for torch 2.10, the first with lists among its stable types, and all that follow. Its headers throw, in C++20.
STABLE_ABI = ["-DTORCH_TARGET_VERSION=0x020a000000000000", "-std=c++20", "-fexceptions", "-frtti"]

CUDA_SOURCES = ["csrc/cuda/decode.cu", "csrc/cuda/nf4.cu"]
ARCHITECTURES = {"80": "[sm_80,compute_80]", "90a": "sm_90a", "100": "sm_100"}  # others compile what is for 80
NVCC_FLAGS = shlex.split("-std=c++17 -O3 -shared -cudart=static -cudadevrt=none -Xcompiler=-fPIC,-fvisibility=hidden")
NVCC_FLAGS += ["-Xlinker=--exclude-libs=ALL", f'-DLORA_CUDA_ARCHITECTURES="sm_{", sm_".join(ARCHITECTURES)}"']
NVCC_FLAGS += [f"-gencode=arch=compute_{name},code={code}" for name, code in ARCHITECTURES.items()]


def find_nvcc():
    """CUDA_HOME's, the one in PATH, that of the package nvidia-cuda-nvcc, or the one in CUDA's usual place."""
    homes = [Path(os.environ[name], "bin") for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    packages = [home / "bin" for entry in sys.path for home in Path(entry).glob("nvidia/cu1*")]
    folders = [*homes, os.environ.get("PATH", os.defpath), *packages, "/usr/local/cuda/bin"]
    return shutil.which("nvcc", path=os.pathsep.join(map(str, folders)))


def find_torch():
    """The folder of the torch that this Python has; pip's isolated builds hide it from imports, but not its headers."""
    folders = [*sys.path, sysconfig.get_path("purelib"), site.getusersitepackages()]
    found = (Path(folder, "torch") for folder in folders)
    torch = next((torch for torch in found if (torch / "include/torch/csrc/stable/c/shim.h").exists()), None)
    if torch is None:
        raise FileNotFoundError(
            "no headers of torch 2.10 or newer beside this Python; --no-build-isolation may show them"
        )
    return torch


def build_cpu(target, run):
    """Each instruction set has a file, and flags of its own; `run` takes the words of a command, in any thread."""
    torch = find_torch()
    sources = {"csrc/binding.cpp": [*STABLE_ABI, f"-isystem{torch / 'include'}"], **CPU_SOURCES}
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor() as pool:
        objects = [str(Path(folder, Path(source).stem + ".o")) for source in sources]
        commands = [[*CXX, *CXX_FLAGS, *flags, "-c", source, "-o"] for source, flags in sources.items()]
        list(pool.map(run, [[*command, to] for command, to in zip(commands, objects, strict=True)]))
        run([*CXX, "-shared", *objects, f"-L{torch / 'lib'}", "-ltorch_cpu", "-o", str(target)])


def build_cuda(target, run):
    """All files, for all architectures, in one command."""
    if (nvcc := find_nvcc()) is None:
        raise FileNotFoundError("no nvcc in CUDA_HOME, PATH or the package nvidia-cuda-nvcc")
    libraries = Path(nvcc).parent.parent / "lib"  # where the package has them
    run([nvcc, *NVCC_FLAGS, f"--threads={os.cpu_count()}", f"-L{libraries}", *CUDA_SOURCES, "-o", str(target)])
