"""The house rules: who imports whom, what importing costs, what the wheel holds, what the files may say."""

import ast
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "lora_kernels"
MODULES = sorted(PACKAGE.rglob("*.py"))
MAX_LINES = 420
# Tools may import anything, and nothing imports them.
TOOLS = {"__main__", "demo", "gate_cases", "machine_code", "static_gate", "testing"}
# What each part may import: of the package, and of what is installed.
ALLOWED = {
    "__init__": {"adapters", "blocks", "dispatch", "functional", "integrations", "modules"},
    "adapters": {"adapters", "formats", "functional", "modules", "torch", "safetensors"},
    "integrations": {"__init__", "formats", "integrations", "sharding", "torch"}
    | set("bitsandbytes deepspeed litgpt loralib nemo_automodel peft sglang torchtune transformers vllm".split()),
    "blocks": {"autograd", "backends", "blocks", "dispatch", "formats", "functional", "modules", "ops", "torch"},
    "modules": {"formats", "functional", "sharding", "torch"},
    "functional": {"adapters", "autograd", "formats", "ops", "dispatch", "sharding", "torch"},
    "ops": {"adapters", "autograd", "backends", "dispatch", "dtensor", "formats", "sharding", "torch"},
    "dtensor": {"torch"},
    "sharding": {"torch"},
    "autograd": {"backends", "dispatch", "torch"},
    "dispatch": {"backends", "configs", "formats", "roofline", "torch"},
    "roofline": set(),
    "backends": {"backends", "kernels", "configs", "formats", "reference", "torch", "triton"},
    "formats": {"formats", "torch"},
    "kernels": {"kernels", "triton"},
    "configs": {"configs"},
    "reference": {"torch"},
}


def part(path: Path) -> str:
    """The file's place in ALLOWED: its folder in the package, or its own name."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path) -> set[str]:
    """What a file imports: parts of this package, and top-level names of everything else that is not Python's own."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}:{node.lineno}: a relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            top, *rest = name.split(".")
            if top != "lora_kernels":
                found |= {top} - set(sys.stdlib_module_names)
            elif (PACKAGE / rest[0]).is_dir() or (PACKAGE / f"{rest[0]}.py").exists():
                found.add(rest[0])
            else:
                found.add("__init__")
    return found


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_follow_the_graph(path):
    if part(path) in TOOLS:
        return
    assert part(path) in ALLOWED, f"{path.name} has no line in ALLOWED: say what it may import"
    assert imports(path) <= ALLOWED[part(path)]


def test_the_graph_has_no_line_without_a_file():
    assert {part(path) for path in MODULES} == ALLOWED.keys() | TOOLS


IMPORT = """
import sys
{before}
import torch
seen = set(sys.modules)
import lora_kernels, lora_kernels.testing
new = {{name.split(".")[0] for name in set(sys.modules) - seen}} - set(sys.stdlib_module_names)
assert new == {{"lora_kernels"}}, new
assert not torch.cuda.is_initialized()
x, w, a, b = torch.ones(2, 8), torch.ones(4, 8), torch.ones(1, 8), torch.ones(4, 1)
assert lora_kernels.lora_linear(x, w, a, b, 1.0).tolist() == [[16.0] * 4] * 2
"""


@pytest.mark.parametrize("missing", [(), ("triton",), ("numpy", "safetensors", "triton")], ids=" ".join)
def test_importing_has_no_side_effects(missing):
    hide = f"sys.modules.update(dict.fromkeys({missing!r}))"  # None makes an import fail
    script = IMPORT.format(before=hide)
    run = subprocess.run([sys.executable, "-W", "error::ResourceWarning", "-c", script], capture_output=True, text=True,
                         cwd=ROOT, env=_environment())  # fmt: skip
    assert run.returncode == 0, run.stderr


def _environment():
    import os

    return {
        name: value for name, value in os.environ.items() if name not in ("TRITON_INTERPRET", "LORA_KERNELS_BACKEND")
    }


def test_the_wheel_holds_every_module(tmp_path):
    pytest.importorskip("setuptools", minversion="77")
    source = tmp_path / "source"
    shutil.copytree(PACKAGE, source / "lora_kernels", ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    build = "from setuptools import build_meta; print(build_meta.build_wheel('dist'))"
    subprocess.run([sys.executable, "-c", build], cwd=source, check=True, capture_output=True)
    [wheel] = (source / "dist").glob("*.whl")
    packed = {name for name in zipfile.ZipFile(wheel).namelist() if name.startswith("lora_kernels/")}
    tables = PACKAGE.joinpath("configs", "tuned").glob("*.json")
    expected = {str(path.relative_to(ROOT)) for path in (*MODULES, *tables, PACKAGE / "py.typed")}
    assert packed == expected


def tracked_files() -> list[Path]:
    run = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if run.returncode:
        pytest.skip("not a git checkout")
    return [path for path in map(ROOT.joinpath, run.stdout.splitlines()) if path.is_file()]


def test_no_python_file_is_too_long():
    files = [path for path in tracked_files() if path.suffix == ".py"]
    lengths = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in files}
    assert not {name: length for name, length in lengths.items() if length > MAX_LINES}


def test_files_name_no_machine_and_no_registry():
    forbidden = re.compile(
        r"/wor[k]/|/tm[p]/|/roo[t]/|/hom[e]/|pypi\.or[g]|pythonhosted\.or[g]|huggingface\.c[o]|/issue[s]/\d"
    )
    found = []
    for path in tracked_files():
        try:
            lines = path.read_text().splitlines()
        except UnicodeDecodeError:
            continue
        found += [
            f"{path.relative_to(ROOT)}:{i}: {line.strip()}" for i, line in enumerate(lines, 1) if forbidden.search(line)
        ]
    assert not found, "\n".join(found)
