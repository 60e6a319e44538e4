"""The kernels with one line of their source changed."""

import importlib
import sys
from pathlib import Path

from lora_kernels.backends import triton

KERNELS = Path(triton.__file__).parents[1] / "kernels"


def broken_kernels(mutant, monkeypatch, tmp_path):
    """The kernel modules by name, from a copy of their package with `mutant.old` replaced by `mutant.new` in one of them."""
    package = tmp_path / "broken_kernels"
    package.mkdir()
    for path in KERNELS.glob("*.py"):
        source = path.read_text()
        if path.stem == mutant.module:
            assert source.count(mutant.old) == 1, f"{mutant.name}: {path.name} has changed; adapt the mutant to it"
            source = source.replace(mutant.old, mutant.new)
        package.joinpath(path.name).write_text(source.replace("lora_kernels.kernels.", "broken_kernels."))
    monkeypatch.syspath_prepend(tmp_path)
    for name in [name for name in sys.modules if name.partition(".")[0] == package.name]:
        del sys.modules[name]
    return {path.stem: importlib.import_module(f"{package.name}.{path.stem}") for path in KERNELS.glob("*.py")}
