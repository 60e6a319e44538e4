"""Builds csrc: `LORA_KERNELS_BUILD=auto|cpu|cuda|none`; cuda is both; only auto goes without what it cannot build."""

import os
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

MODE = os.environ.get("LORA_KERNELS_BUILD", "auto")
LIBRARIES = {"auto": ["_cpu", "_cuda"], "cpu": ["_cpu"], "cuda": ["_cpu", "_cuda"], "none": []}


class Build(build_ext):
    """Shared libraries that know nothing of Python; torch and OpenMP are those of the process that loads them."""

    def build_extension(self, ext):
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        target.unlink(missing_ok=True)  # it must not stay after a failure, and one in use must not change
        is_cuda = ext.name.endswith("_cuda")
        build = compilers.build_cuda if is_cuda else compilers.build_cpu
        try:
            build(target, self.spawn)
        except Exception as error:
            if not ext.optional:
                raise
            kernels, needed = ("CUDA", "nvcc") if is_cuda else ("CPU", "g++ and torch 2.10 or newer")
            remedy = f"to get them, install {needed}, then it again"
            print(f"lora_kernels: without its {kernels} kernels ({error}); {remedy}", file=sys.stderr)

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
libraries = LIBRARIES[MODE] if MODE != "auto" or (sys.platform == "linux" and Path("csrc").is_dir()) else []
if libraries:
    sys.path.insert(0, "csrc")
    import compilers
# Their sources are compilers.py's, and MANIFEST.in takes all of csrc into a source distribution.
extensions = [Extension(f"lora_kernels.{name}", [], optional=MODE == "auto") for name in libraries]
setup(ext_modules=extensions, cmdclass={"build_ext": Build, "bdist_wheel": Wheel})
